"""What a command line imports before there is work to do: help and a mistake are told at once. By what is imported, not by
time."""

import json
import subprocess
import sys

import pytest

TABOO = "shipsfast/demo/prompts/taboo.csv"
SCAN = ("scan", "shipsfast/demo/village", TABOO)
# Each takes a tenth of a second up to seconds to import.
HEAVY = {"torch", "transformers", "pandas", "scipy", "matplotlib", "pyarrow"}
LIGHTER = {"numpy", "jinja2", "psutil"}
# In a process of its own: those of tests/support/warm.py have all of it.
CODE = """
import sys, json
sys.argv = ["shipsfast", *json.loads(sys.argv[1])]
try:
    if sys.argv[1:]:
        from shipsfast.cli import main
        main()
    else:
        import shipsfast
        dir(shipsfast)
except SystemExit as stop:
    code = stop.code
else:
    code = 0
print("\\n" + json.dumps([code, sorted(name for name in sys.modules if "." not in name)]))
"""


def imported(*arguments: str) -> tuple[int, set[str]]:
    """The exit status, and the top modules that are there at the end."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names)


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("scan", "--help"), ("info", "--help"), ("--version",)]
)
def test_help_imports_nothing_heavy(arguments):
    code, names = imported(*arguments)
    assert code == 0
    assert "shipsfast" in names and not names & (HEAVY | LIGHTER)


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "nowhere", "nowhere.csv"),
        ("scan", "./nowhere", TABOO),
        (*SCAN, "--heads", "9x"),
        (*SCAN, "--ablation", "nope"),
        (*SCAN, "--max-memory", "much"),
        ("evaluate", "./nowhere", TABOO, "--groups", "none"),
        ("show", "nowhere"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_anything_heavy_is_imported(arguments):
    code, names = imported(*arguments)
    assert code == 2
    assert "shipsfast" in names and not names & HEAVY
