"""The command line. Results go to stdout, progress and errors to stderr; bad input exits with status 2.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from .._version import __version__
from ..errors import InputError, Stopped, WriteError
from . import answers, direction, runs, scans
from .asked import running

app = typer.Typer(
    name="shipsfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "default_map": {
            "help": False
        },  # else typer imports pydantic to find out, before the help of a command
    },
)
# In the order in which --help lists them.
COMMANDS = {
    "scan": scans.scan,
    "top": scans.top,
    "scan-dataset": scans.scan_dataset,
    "sahara": scans.sahara,
    "top-tokens": scans.top_tokens,
    "direction": direction.direction,
    "generate": answers.generate,
    "evaluate": answers.evaluate,
    "contrast": runs.contrast,
    "demo": runs.demo,
    "show": runs.show,
    "verify": runs.verify,
    "info": runs.info,
    "bench": scans.bench,
}
for name, function in COMMANDS.items():
    app.command(name)(function)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"shipsfast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Say which version this is."),
    ] = False,
) -> None:
    """Find the attention heads that carry a language model's behaviour: switch each one off, measure what changes."""


# Errors of a disk, a network share, their permissions, and of paths that cannot be.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG,
    errno.EMFILE, errno.ENODEV, errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def main() -> None:
    """Entry point. Exit status: 0, 2 for bad input or a disk that fails, 130 after Ctrl-C, 143 after SIGTERM, 141 where
    nobody reads what is printed any more, such as head; of verify, 1 for a run that is damaged or not finished."""
    running["out"] = None
    _let_threads_sleep()
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # typer's own for Ctrl-C, which says nothing
            _fail(_with_kept("interrupted"))
        if _unheard(stop):
            sys.exit(141)
        raise
    except Stopped:
        _fail(_with_kept("terminated (SIGTERM)"))
        sys.exit(143)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno not in DISK and not isinstance(error, WriteError):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_fail(_with_kept(f"cannot read or write{where}: {error.strerror}")))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _let_threads_sleep() -> None:
    """Threads of OpenMP that wait for others give their core away instead of spinning, unless the user says how they wait:
    beside another busy program, spinning takes most of the time (docs/performance.md). It counts as torch is loaded, and for
    this command only: the library leaves the process that it is used in as it is."""
    if "torch" not in sys.modules and not os.environ.keys() & {
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "KMP_BLOCKTIME",
    }:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _stop(_number, _frame) -> None:
    raise Stopped


def _unheard(stop: SystemExit) -> bool:
    """Whether the reader of stdout has gone. typer and rich make status 1 of it, and print nothing; what is still to be
    written would be told of by Python itself at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        stop.__context__ = sys.exception()
    if not isinstance(stop.__context__, BrokenPipeError):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _with_kept(message: str) -> str:
    """The message, and what of the run at hand is safe."""
    if running["out"] is None:
        return message
    from ..runs.folder import kept

    safe = kept(running["out"])
    return f"{message}; {safe}" if safe else message


def _fail(message: str) -> int:
    print(f"shipsfast: {' '.join(message.split())}", file=sys.stderr)
    return 2
