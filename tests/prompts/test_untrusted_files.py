"""Prompt files and models that somebody else made: data, in bounded memory, or refused in one line."""

import contextlib
import json
import os
import socket
import sys
import time
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shipsfast import cli
from shipsfast.demo.run import MODEL
from shipsfast.errors import InputError
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.models.without_weights import hollow_model
from shipsfast.prompts import text_files as files
from shipsfast.prompts.datasets import load_prompts
from shipsfast.text import MOST_CHARS, one_line, visible
from tests.support.models import build
from tests.support.places import ROOT

FOUND = [
    ("bom-crlf.csv", b"\xef\xbb\xbfgoal,x\r\nmend,1\r\nfill,2\r\n", ["mend", "fill"]),
    ("newlines.csv", b'goal\n"one\ntwo\r\nthree"\nfour\n', ["one\ntwo\r\nthree", "four"]),
    ("formulas.csv", b'goal\n"=HYPERLINK(""x"")"\n+1\n@SUM(A1)\n', ['=HYPERLINK("x")', "+1", "@SUM(A1)"]),
    ("na.csv", b"goal\nNA\nnull\n007\n1e5\n", ["NA", "null", "007", "1e5"]),
    ("cr-only.csv", b"goal\rone\rtwo\r", ["one", "two"]),
    ("blank-lines.csv", b"\n\ngoal\n\none\n\n", ["one"]),
    ("huge-int.jsonl", b'{"goal": "one", "n": 123456789012345678901234567890}\n', ["one"]),
    ("pair.jsonl", b'{"goal": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    ("control.txt", b"one\x1b[2Jtwo\n\xe2\x80\xaethree\n", ["one\x1b[2Jtwo", "\u202ethree"]),
]  # fmt: skip
REFUSED = [
    ("nul.csv", b"goal\na\x00b\n", "the prompt in row 1 holds a NUL character"),
    ("nul.txt", b"\x00" * 100, "line 1 holds a NUL"),
    ("utf16.csv", "goal\nmend\n".encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
    ("latin1.txt", b"x" * (1 << 20) + b"\ncaf\xe9\n", r"not UTF-8 text \(byte 1048580\)"),
    ("cut.txt", b"caf\xc3", r"not UTF-8 text \(byte 3\)"),
    ("split.txt", b"x" * ((1 << 20) - 1) + b"\xc3\xa9\n\xff", r"not UTF-8 text \(byte 1048578\)"),
    ("open-quote.csv", b'goal\n"one\ntwo\n', "cannot be read as csv: line 3: unexpected end of data"),
    ("more-fields.csv", b"goal,target\none,b,\n", "line 2 has 3 fields, the first row 2"),
    ("fewer-fields.csv", b"goal,target\none\n", "line 2 has 1 fields"),
    ("twice.csv", b"goal,goal\na,b\n", "has 2 columns named 'goal': rename one"),
    ("surrogate.jsonl", b'{"goal": "\\ud800"}\n', r"row 1 holds half of a surrogate pair, U\+D800"),
    ("deep.jsonl", b"[" * 200_000 + b"\n", "is not JSON lines: line 1 is nested too deep"),
    ("digits.jsonl", b'{"goal": ' + b"9" * 5000 + b"}\n", "cannot be read as JSON lines: line 1: Exceeds the limit"),
    ("number.jsonl", b'{"goal": 1}\n', "row 1 is a value of type int: expected text, or a list of messages"),
    ("list.jsonl", b'{"goal": ["one"]}\n', "row 1 is a list whose element 1 is no message: expected role and con"),
    ("rubbish.csv", os.urandom(4096), "rubbish.csv"),
    ("rubbish.parquet", b"PAR1" + os.urandom(4096) + b"PAR1", "cannot be read as parquet"),
    ("codes.csv", b"a\x1b[2J\x07,b\n1,2\n", r"it has a\[U\+001B\]\[2J\[U\+0007\], b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "prompts"), FOUND, ids=[c[0] for c in FOUND])
def test_what_is_odd_and_right(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content)
    assert load_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[c[0] for c in REFUSED])
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(tmp_path / name)
    assert "\n" not in str(error.value) and visible(str(error.value)) == str(error.value)


def test_a_file_of_a_gigabyte_is_refused_in_little_memory(tmp_path):
    """One field, sparse on the disk: too long a line; and too large a file."""
    path = tmp_path / "p.csv"
    with open(path, "wb") as file:
        file.write(b'goal\n"')
        file.truncate(files.MOST_FILE_BYTES)
    tracemalloc.start()
    for message in (
        "a line of more than 16,777,216 bytes",
        "and prompt files of up to 1,073,741,824 are read",
    ):
        with pytest.raises(InputError, match=message):
            load_prompts(path)
        os.truncate(path, files.MOST_FILE_BYTES + 1)
    path.write_bytes(b'goal\n"' + (b"a" * 999 + b"\n") * 18_000 + b'"\n')  # 18 MB in one field of many lines
    with pytest.raises(InputError, match="field larger than field limit"):
        load_prompts(path)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_a_million_rows_take_seconds(tmp_path):
    path, count = tmp_path / "p.csv", 1_000_000
    path.write_text("id,goal\n" + "".join(f"{i},mend kettle {i}\n" for i in range(count)))
    started = time.process_time()
    prompts = load_prompts(path)
    assert len(prompts) == count and prompts[-1] == "mend kettle 999999"
    assert time.process_time() - started < 15


def test_rows_with_a_thousand_keys_each_take_no_table_of_all(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = ({"goal": f"x{i}"} | {f"k{i}-{j}": 1 for j in range(50)} for i in range(2000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    assert len(load_prompts(path, "goal")) == 2000
    assert tracemalloc.get_traced_memory()[1] < 100 << 20  # 2,000 rows x 100,001 columns would be 1.6 GB
    tracemalloc.stop()


def test_parquet_that_lies(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"goal": [1, 2]}).to_parquet(path)
    with pytest.raises(InputError, match="column 'goal' holds int64, expected text"):
        load_prompts(path)
    # A hundred times 12 MB that are written once.
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * (12 << 20)]))
    pq.write_table(pa.table({"goal": long}), path)
    assert path.stat().st_size < 2 << 20
    with pytest.raises(InputError, match="column 'goal' has more text than prompt files are read with"):
        load_prompts(path)
    pq.write_table(pa.table({"goal": pa.array(["a", None, "b"])}), path)
    with pytest.raises(InputError, match="row 2 is empty"):
        load_prompts(path)
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["goal", "goal"]), path)
    with pytest.raises(InputError, match="columns named 'goal'"):
        load_prompts(path)


def test_a_damaged_parquet_file_does_not_end_the_process(tmp_path):
    """Found by fuzzing: pyarrow ends the process when it is asked for the metadata of a column with such statistics."""
    path = ROOT / "fuzz" / "corpus" / "prompts" / "aborts-pyarrow"
    (tmp_path / "p.parquet").write_bytes(path.read_bytes()[1:])
    assert load_prompts(tmp_path / "p.parquet") == ["a", "b"]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "device.csv"):
        with pytest.raises(
            InputError, match="is a device or a pipe: expected a csv, tsv, jsonl, json, parquet or txt file"
        ):
            load_prompts(tmp_path / name)
    with pytest.raises(InputError, match="is a folder without a csv"):
        load_prompts(tmp_path)
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "loop.csv").symlink_to(loop)
    (loop / "round.csv").symlink_to("round.csv")
    for name, message in (
        (loop, "is a folder without a csv"), (loop / "round.csv", "round.csv"), ("x" * 500 + ".csv", "cannot be read"),
        ("a\0b.csv", "no prompt file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_prompts(name)


def test_messages_are_one_line_that_steers_nothing():
    assert one_line("a\nb\x1b]0;x\x07\u202ec\r\n d") == "a b[U+001B]]0;x[U+0007][U+202E]c d"
    assert str(InputError("a\n\n  b\x00")) == "a b[U+0000]"
    assert len(one_line("x" * 10**6)) < MOST_CHARS + 50


def test_pickled_weights_are_refused(tmp_path):
    model = build(dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights as pickle only .*safetensors"):
        load_model(str(tmp_path))


def test_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    """Whatever the folder says, and without a question on the terminal."""
    config = json.loads((MODEL / "config.json").read_text()) | {"model_type": "made_up"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Made", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError) as error:
            load(str(tmp_path))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_run_for_a_plan_when_asked_for(tmp_path, monkeypatch, capsys):
    """And else neither run nor asked about."""
    config = json.loads((MODEL / "config.json").read_text()) | {"model_type": "made_up"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'made_up'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "p.txt").write_text("How do I mend a kettle?\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for more, status in (([], 2), (["--trust-remote-code"], 0)):
        args = ["scan", tmp_path, tmp_path / "p.txt", "--plan", "-q", "--template", "none", *more]
        monkeypatch.setattr("sys.argv", ["shipsfast", *map(str, args)])
        found = 0
        try:
            cli.main()
        except SystemExit as stop:
            found = stop.code or 0
        out, err = capsys.readouterr()
        assert found == status, err
        assert ("nothing was run" in out) == (status == 0)
    with pytest.raises(InputError, match="cannot build"):
        hollow_model(str(tmp_path))


_sockets: list[str] | None = None  # what opens one while it is a list: an audit hook stays for ever


def test_nothing_opens_a_socket(tmp_path, monkeypatch, capsys):
    """A whole scan from the command line, with nothing set that says offline: no hub, no telemetry, no port."""
    global _sockets
    (tmp_path / "p.csv").write_text("goal\nHow do I mend a kettle?\n")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    sys.addaudithook(
        lambda event, _args: (
            _sockets.append(event) if _sockets is not None and event.startswith("socket.") else None
        )
    )
    args = ["scan", MODEL, tmp_path / "p.csv", "-q", "--heads", "0-0", "--out", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", ["shipsfast", *map(str, args)])
    _sockets = []
    try:
        with contextlib.suppress(SystemExit):
            cli.main()
        seen = list(_sockets)
        socket.socket().close()  # the hook does see them
        assert _sockets, "the audit hook sees nothing"
    finally:
        _sockets = None
    assert (tmp_path / "run" / "run.json").is_file() and "Ships" in capsys.readouterr().out
    assert seen == []


def test_no_module_reads_pickles_or_runs_text():
    for path in (ROOT / "shipsfast").rglob("*.py"):
        text = path.read_text("utf-8")
        for name in ("import pickle", "torch.load(", "allow_pickle", "eval(\"", "exec(", "joblib", "os.system", "shell=True"):  # fmt: skip
            assert name not in text, f"{path}: {name}"
