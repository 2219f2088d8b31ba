"""What a command says and records of its prompt files."""

import json
from types import SimpleNamespace

import pytest

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from tests.support.command_line import run
from tests.support.prompt_files import write

SET = [("instruction", "input", "output"), ("Name the metal.", "tin, oil", ""), ("Mend a kettle.", "", "")]
FEW = ("--heads", "0-0", "--limit", 1)


def lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("shipsfast: ")]


def record(out) -> dict:
    return json.loads((out / "run.json").read_text())["prompts_from"]


def test_columns_are_said_once_and_recorded(capsys, tmp_path):
    path, out = write(tmp_path / "set.csv", *SET[:1], SET[1:]), tmp_path / "run"
    status, _, err = run(capsys, "scan", MODEL, path, *FEW, "--out", out)
    assert status == 0, err
    assert lines(err) == [
        "shipsfast: prompts: 2 prompts of set.csv; columns instruction and input; the layout of Alpaca; 1 of them taken"
    ]
    expected = {
        "file": "set.csv",
        "rows": 2,
        "columns": ["instruction", "input"],
        "layout": "Alpaca",
        "limit": 1,
    }
    assert record(out) == expected and shipsfast.load(out).record["prompts_from"] == expected
    assert run(capsys, "verify", out)[0] == 0
    status, _, err = run(capsys, "scan", MODEL, path, *FEW, "--column", "instruction", "-q")
    assert status == 0 and lines(err) == []


def test_the_file_is_no_part_of_what_a_run_is(capsys, tmp_path):
    out = tmp_path / "run"
    for name in ("one.csv", "other.jsonl"):
        path = write(tmp_path / name, ("prompt",), [("Mend a kettle.",)])
        status, text, err = run(capsys, "scan", MODEL, path, *FEW, "--out", out)
        assert status == 0, err
    assert "nothing was run" in text and record(out)["file"] == "one.csv"


def test_each_file_of_a_command_is_named(capsys, tmp_path):
    path, out = write(tmp_path / "set.csv", *SET[:1], SET[1:]), tmp_path / "run"
    args = (
        "evaluate",
        MODEL,
        PROMPTS / "taboo.csv",
        "--sample",
        2,
        "--seed",
        3,
        "--groups",
        "0-0",
        "--ablation",
        "mean",
    )
    more = ("--source", path, "--control", PROMPTS / "ordinary.csv", "--max-new-tokens", 2, "--out", out)
    status, _, err = run(capsys, *args, *more)
    assert status == 0, err
    assert [line.split(";")[0].split(": ", 1)[1] for line in lines(err)][:3] == [
        "prompts: 48 prompts of taboo.csv", "--source: 2 prompts of set.csv", "--control: 48 prompts of ordinary.csv",
    ]  # fmt: skip
    found = record(out)
    assert found["sample"] == {"prompts": 2, "seed": 3} and found["file"] == "taboo.csv"
    assert found["source"]["layout"] == "Alpaca" and found["control"]["columns"] == ["prompt"]


def test_bench_says_it_too(capsys, monkeypatch, tmp_path):
    path = write(tmp_path / "set.csv", *SET[:1], SET[1:])
    monkeypatch.setattr("shipsfast.scans.bench.bench", lambda *_, **__: SimpleNamespace(render=str))
    status, _, err = run(capsys, "bench", MODEL, path)
    assert status == 0 and lines(err)[0].startswith(
        "shipsfast: prompts: 2 prompts of set.csv; columns instruction"
    ), err


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "c\u202ed"])
def test_names_of_columns_steer_no_terminal(capsys, tmp_path, name):
    path = write(tmp_path / "p.csv", (name, "x"), [("Mend a kettle.", "y")])
    status, _, err = run(capsys, "scan", MODEL, path, *FEW, "--column", name)
    assert status == 0 and "\x1b[2J" not in lines(err)[0] and "\u202e" not in err and "[U+" in lines(err)[0]
