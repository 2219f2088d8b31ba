"""Commands whose reader has gone, as in `shipsfast scan ... | head -1`: a quiet end with status 141."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from shipsfast import cli
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.places import ROOT

ASKED = (MODEL, PROMPTS / "taboo.csv", "--limit", 2, "--quiet")
COMMANDS = {
    "scan": ("scan", *ASKED, "--heads", "0-0"),
    "scan as JSON": ("scan", *ASKED, "--heads", "0-0", "--json"),
    "top": ("top", *ASKED, "-k", 1, "--heads", "0-0"),
    "scan-dataset": ("scan-dataset", *ASKED, "--heads", "0-0"),
    "sahara": ("sahara", *ASKED, "--group-size", 1, "--heads", "0"),
    "top-tokens": ("top-tokens", *ASKED, "--heads", "0-0"),
    "direction": (
        "direction",
        MODEL,
        *[PROMPTS / "taboo.csv", PROMPTS / "ordinary.csv"],
        "--limit",
        2,
        "--quiet",
    ),
    "generate": ("generate", *ASKED, "--max-new-tokens", 4),
    "evaluate": ("evaluate", *ASKED, "--max-new-tokens", 4, "--groups", "0-0"),
    "plan": ("scan", *ASKED, "--plan"),
    "contrast": ("contrast", "run", "run"),
    "demo": ("demo", "--quiet"),
    "show": ("show", "run"),
    "verify": ("verify", "run"),
    "info": ("info",),
    "info as JSON": ("info", "--json"),
    "bench": ("bench", MODEL, "--quiet"),
    "help": ("--help",),
    "version": ("--version",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_reads(tmp_path, monkeypatch, capfd, command):
    monkeypatch.chdir(tmp_path)
    report = SimpleNamespace(render=lambda: "report\n" * 9)  # what these have to say takes long, or a run
    monkeypatch.setattr("shipsfast.demo.run.run", lambda *_, **__: print(report.render()))
    monkeypatch.setattr("shipsfast.scans.bench.bench", lambda *_, **__: report)
    shown = SimpleNamespace(show=lambda _, console: console.print(report.render()))
    monkeypatch.setattr("shipsfast.results.contrast.contrast", lambda *_, **__: shown)
    monkeypatch.setattr("shipsfast.runs.verify.verify", lambda _: {"verdict": "damaged"})
    monkeypatch.setattr("shipsfast.results.load.load", lambda _: SimpleNamespace(record={}))
    monkeypatch.setattr("shipsfast.results.tables.show", lambda *_: print(report.render()))
    monkeypatch.setattr("shipsfast.runs.verify.render", lambda _: report.render())
    monkeypatch.setattr(sys, "argv", ["shipsfast", *map(str, COMMANDS[command])])
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        monkeypatch.undo()
    assert stop.value.code == 141
    out, err = capfd.readouterr()
    assert out == "" and "Error" not in err


def test_commands_are_all_tried():
    assert {x.name for x in cli.app.registered_commands} <= {words[0] for words in COMMANDS.values()}


def test_head_in_a_shell(tmp_path):
    command = f"{sys.executable} -m shipsfast scan --help | head -1; echo ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() in (["141"], ["0"]), (
        done.stdout
    )  # 0 where all was written before head had gone
    assert done.stderr == ""
    done = subprocess.run(
        ["bash", "-c", command.replace("head -1", "exec 0<&-")], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["141"] and done.stderr == ""
