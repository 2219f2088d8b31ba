"""The command line, run in this process."""

import sys

from shipsfast import cli


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, run in this process."""
    before = sys.argv
    sys.argv = ["shipsfast", *map(str, args)]
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *args: str, quiet: bool = True) -> str:
    """The one line that a refusal prints; nothing else may be on either stream. quiet: the command has such an option."""
    status, out, err = run(capsys, *args, *["--quiet"] * quiet)
    assert status == 2, (out, err)
    assert out == ""
    assert err.startswith("shipsfast: ") and err.count("\n") == 1, err
    return err
