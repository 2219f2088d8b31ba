"""Processes that begin with torch, transformers and shipsfast imported: forked from a server that did so once.

They are processes of their own, with their own arguments, environment, folder, streams and signals. What must be seen from
the very start, such as the console script or an import, is tested with subprocess.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "pandas",
    "torch",
    "transformers",
    "shipsfast.scans.ships",
    "shipsfast.results.tables",
    "shipsfast.models.loading",
]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


class Warm:
    """A running one. code: of Python, or the path of a script; argv: its arguments, as in sys.argv[1:]."""

    def __init__(
        self, code: str | Path, argv: Sequence = (), *, cwd: Path | None = None, env: Mapping | None = None
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))
        atexit.register(
            lambda: [p.unlink(missing_ok=True) for p in self._folder.glob("*")] and self._folder.rmdir()
        )
        self._process = _server.Process(
            target=_run,
            args=(
                code,
                list(map(str, argv)),
                str(cwd or os.getcwd()),
                dict(env or os.environ),
                str(self._folder),
            ),
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """As `subprocess.run` gives it: returncode is minus the signal's number where one ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a warm process", timeout)
        out, err = ((self._folder / name).read_text("utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], self._process.exitcode, out, err)


def run(code: str | Path, argv: Sequence = (), **how) -> subprocess.CompletedProcess:
    return Warm(code, argv, **how).wait()


def _run(code, argv: list[str], cwd: str, env: dict, folder: str) -> None:
    atexit._clear()  # what the server has registered is the server's
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(os.path.join(folder, name), "wb") as file:
            os.dup2(file.fileno(), number)
        setattr(
            sys,
            name,
            io.TextIOWrapper(os.fdopen(number, "wb", 0, closefd=False), "utf-8", write_through=True),
        )
    sys.path[:0] = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    status = 1
    try:
        sys.argv = [str(code) if isinstance(code, Path) else "-c", *argv]
        if isinstance(code, Path):
            runpy.run_path(str(code), run_name="__main__")
        else:
            exec(compile(code, "<warm>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
