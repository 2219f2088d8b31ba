"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import WriteError


def write_whole(path: Path, write: Callable[[Path], None], *, sync: bool = True) -> None:
    """Let `write` make a file that appears at `path` complete or not at all. Raises WriteError, an OSError.

    sync: wait until it is on the disk, name and all.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        temporary.chmod(0o666 & ~_umask())
        write(temporary)
        if sync:
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(temporary, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(error.errno, os.strerror(error.errno or errno.EIO), str(path)) from error
        raise


def _umask() -> int:
    """The process's umask; temporary files are made readable by their owner only, results should not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
