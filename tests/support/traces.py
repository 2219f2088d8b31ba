"""Doing something before the n-th line that runs, and counting the lines."""

import functools
import os
import signal
import sys

import shipsfast

PACKAGE = os.path.dirname(shipsfast.__file__)


def trace(
    files: tuple[str, ...], at: int, seen: list[int], then=lambda: os.kill(os.getpid(), signal.SIGKILL)
):
    """Count the lines that run in `files` (or below a folder), and do `then` before number `at`."""

    def local(frame, event, _arg):
        if event == "line":
            seen[0] += 1
            if seen[0] == at:
                then()
        return local

    def entered(frame, _event, _arg):
        return local if frame.f_code.co_filename.startswith(files) else None

    return functools.partial(sys.settrace, entered)


def lines(files: tuple[str, ...], run) -> int:
    """How many lines of `files` a run takes."""
    seen = [0]
    trace(files, -1, seen)()
    try:
        run()
    finally:
        sys.settrace(None)
    return seen[0]
