"""`shipsfast show RUN`: what the command that wrote the folder printed."""

import shutil

import pytest

from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.command_line import run
from tests.support.manifests import edit

TABOO = (MODEL, PROMPTS / "taboo.csv", "--limit", 4)
ANSWERED = ("--max-new-tokens", 6)
COMMANDS = {
    "scan": ("scan", *TABOO, "--heads", "0", "--metric", "kl", "--metric", "js"),
    "rates": ("scan", *TABOO, "--heads", "0", "--rank-by", "asr", *ANSWERED),
    "top": ("top", *TABOO, "-k", 3, "--screen", "bfloat16"),
    "scan-dataset": ("scan-dataset", *TABOO, "--heads", "0,1"),
    "sahara": ("sahara", *TABOO, "--group-size", 2, "--heads", "0", "--beam", 2),
    "evaluate": ("evaluate", *TABOO, "--groups", "0-2", *ANSWERED),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_every_kind_is_shown_as_it_was(capsys, tmp_path, name):
    out, many = tmp_path / "run", 2 if name == "sahara" else 10
    status, text, err = run(capsys, *COMMANDS[name], "--out", out, "-q")
    assert status == 0, err
    assert run(capsys, "show", out, "--top", many) == (0, text, "")
    as_json = run(
        capsys,
        *COMMANDS[name],
        "--out",
        out,
        "-q",
        "--json",
        *[] if name in ("sahara", "top") else ["--top", many],
    )
    assert as_json[0] == 0 and run(capsys, "show", out, "--top", many, "--json") == (0, as_json[1], "")
    status, _, err = run(capsys, "show", out, "--plot", tmp_path / "a.png")
    if name == "evaluate":
        assert status == 2 and "no map of heads" in err
    else:
        assert status == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "expected a name ending in .png" in run(capsys, "show", out, "--plot", tmp_path / "a.txt")[2]


def test_a_run_that_is_not_finished(capsys, tmp_path):
    out = tmp_path / "run"
    assert run(capsys, *COMMANDS["scan"][:7], "--out", out, "-q")[0] == 0
    cut = shutil.copytree(out, tmp_path / "cut")
    edit(cut, lambda manifest: manifest.update(status="running"))
    status, text, err = run(capsys, "show", cut)
    assert status == 0 and "is not finished" in err and "layer-head" in text
    edit(cut, lambda manifest: manifest.update(parts=[]))
    status, text, err = run(capsys, "show", cut)
    assert status == 0 and "is not finished" in err


def test_what_is_no_run(capsys, tmp_path):
    status, out, err = run(capsys, "show", tmp_path)
    assert status == 2 and out == "" and "is not a shipsfast run: it has no run.json" in err
    assert "it does not exist" in run(capsys, "show", tmp_path / "nowhere")[2]
