"""A lock on a run folder: one writer at a time, and none that outlives its process.

The kernel holds the lock (`flock` on the file .lock) and lets go of it when the process ends, however it ends; what the
file says is only who to ask. A table beside it tells threads of one process apart where flock cannot, as on NFS, whose
client turns it into a lock of the process. Readers need no lock: all they trust is in the manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from pathlib import Path

from ..clock import now
from ..errors import InputError, note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
NAME = ".lock"
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_held: dict[tuple[int, int], FolderLock] = {}  # by (device, inode) of the folder
_table = threading.Lock()


class FolderLock:
    """Held from the moment it is made until `release`.

    folder: must exist. Raises InputError, naming who writes there, if somebody else does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._fd = folder, None
        place = folder.stat()
        self._key = (place.st_dev, place.st_ino)
        self.owner = {"pid": os.getpid(), "host": os.uname().nodename, "since": now()}
        with _table:
            if self._key in _held:
                raise InputError(self._taken(_held[self._key].owner))
            _held[self._key] = self
        try:
            self._fd = self._open()
        except BaseException:
            self.release()
            raise

    def _open(self) -> int | None:
        path = self.folder / NAME
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if not self._flock(fd):
                    os.close(fd)
                    return None
                # The one before removes the file when it is done: is this still the file that others open?
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                            os.ftruncate(fd, 0)
                            os.pwrite(fd, json.dumps(self.owner).encode(), 0)
                        return fd
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(fd)
                raise
            os.close(fd)

    def _flock(self, fd: int) -> bool:
        """Raises InputError if it is taken; False where there is no such thing."""
        problem = "this system has no flock"
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                owner = None
                with contextlib.suppress(OSError, ValueError):
                    owner = json.loads(os.pread(fd, 4096, 0))
                raise InputError(self._taken(owner)) from None
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
                problem = error.strerror
        note(
            f"{self.folder} cannot be locked ({problem}): make sure that no other process writes there meanwhile"
        )
        return False

    def _taken(self, owner) -> str:
        owner = owner if isinstance(owner, dict) else {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
        return f"{self.folder} is being written to by {who}: wait for it, or choose another output folder"

    def release(self) -> None:
        """Let go; may be called again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            path = self.folder / NAME
            with contextlib.suppress(OSError):  # removed while it is held, so that nobody can have locked it
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    path.unlink()
            os.close(fd)
        with _table:
            if _held.get(self._key) is self:
                del _held[self._key]


def _forget() -> None:
    """A forked child does not hold its parent's locks, nor keep them alive when the parent is gone."""
    for lock in _held.values():
        if lock._fd is not None:
            os.close(lock._fd)
            lock._fd = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
