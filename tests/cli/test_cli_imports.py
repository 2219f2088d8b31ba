"""What is imported before there is work for it: help, mistakes and finished runs are told at once. By what is imported, not by
time."""

import subprocess
import sys

import pytest

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.models import build

TABOO = PROMPTS / "taboo.csv"
SCAN = ("scan", MODEL, TABOO)
# Each takes a tenth of a second to seconds.
HEAVY = {"torch", "transformers", "pandas", "scipy", "matplotlib", "pyarrow"}
LIGHTER = {"numpy", "jinja2", "psutil", "pydantic"}
# In a process of its own: those of tests/support/warm.py have all of it.
COMMAND = "from shipsfast.cli import main; main()"
THEN = "import sys; print(); print(code, *sys.modules)"


def imported(code: str, *arguments) -> tuple[int, set[str]]:
    """The exit status of that code, and the packages that are imported at its end."""
    code = f"try: {code}\nexcept SystemExit as stop: code = stop.code or 0\nelse: code = 0\n{THEN}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    status, *names = done.stdout.splitlines()[-1].split()
    return int(status), {name for name in names if "." not in name}


def test_the_package_imports_nothing_heavy():
    _, names = imported("import shipsfast; dir(shipsfast)")
    assert "shipsfast" in names and not names & (HEAVY | LIGHTER)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("scan", "--help"), ("info", "--help"), ("--version",)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    status, names = imported(COMMAND, *arguments)
    assert status == 0
    assert "typer" in names and not names & (HEAVY | LIGHTER)


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
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_mistake_is_told_before_anything_heavy_is_imported(arguments):
    status, names = imported(COMMAND, *arguments)
    assert status == 2
    assert "typer" in names and not names & HEAVY


def test_a_finished_run_is_shown_without_a_model_s_libraries(tmp_path):
    shipsfast.scan(build(), [[3, 4, 5], [3, 4, 6]], out=tmp_path / "run", progress=False, rescored=0)
    status, names = imported(COMMAND, "show", tmp_path / "run")
    assert status == 0
    assert "pandas" in names and not names & {"torch", "transformers", "matplotlib"}


def test_a_scan_that_is_kept_nowhere_needs_no_tables():
    """They take longer to import than such a scan of a small model takes."""
    _, names = imported("import shipsfast; shipsfast.scan; shipsfast.load_prompts")
    assert "torch" in names and not names & {"pandas", "pyarrow", "matplotlib"}
