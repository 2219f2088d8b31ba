"""Formats beside csv: json, tsv, and the folders of the datasets library's `save_to_disk`."""

import json
import random

import pyarrow as pa
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts import json_files
from shipsfast.prompts.datasets import load_prompts, read_prompts


def test_tabs_between_fields(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text('goal\ttarget\nmend, a kettle\tb\n"two\nlines\t"\tc\n')
    assert load_prompts(path) == ["mend, a kettle", "two\nlines\t"]
    path.write_text("goal\ttarget\na\n")
    with pytest.raises(
        InputError, match="cannot be read as tsv: .* 1 fields, the first row 2: .* text with tabs"
    ):
        load_prompts(path)


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('["a", "\\ud83d\\ude00"]', ["a", "\U0001f600"]),
        (' [\n"a"\r\n,\t"b"\n]\n', ["a", "b"]),
        ('[{"prompt": "a", "n": 1e9}, {"prompt": "b"}]', ["a", "b"]),
        ('[[{"role": "user", "content": "a"}]]', [[{"role": "user", "content": "a"}]]),
        ('\ufeff["a"]', ["a"]),
    ],
)
def test_lists_of_json(tmp_path, content, prompts):
    (tmp_path / "p.json").write_text(content, "utf-8")
    assert load_prompts(tmp_path / "p.json") == prompts


def test_jsonl_of_texts(tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n\n"b"\n')
    assert read_prompts(tmp_path / "p.jsonl")[:2] == (["a", "b"], {"file": "p.jsonl", "rows": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no JSON list"),
        ("[]", "holds no prompts"),
        ('{"data": ["a"]}', r"holds no JSON list: expected one of texts, .* an object a line \.jsonl"),
        ('["a"', "is not JSON: its list has no end after element 1"),
        ('["a', "is not JSON: element 1: Unterminated string"),
        ('["a",]', "is not JSON: element 2: Expecting value"),
        ('["a" "b"]', "expected a comma or the end of the list after element 1"),
        ('["a"] ["b"]', "expected a comma or the end of the list after element 1"),
        ('["a", 12', "is not JSON: its list has no end after element 2"),
        ('["a", 12]', "the prompt in row 2 is a value of type int"),
        ('["a", {"prompt": "b"}]', "element 2 is an object, what is before it is not"),
        ('[{"prompt": "b"}, null]', "element 2 is no object"),
        ("[" * 100_000, "element 1 is nested too deep"),
        (f"[{'9' * 5000}]", "cannot be read as JSON: element 1: Exceeds the limit"),
        ('["\ud800"]', "not UTF-8"),
        (f'["a", tru, "{"x" * 3_000_000}"]', "element 2: Expecting value"),
    ],
)
def test_what_is_no_list_of_json(tmp_path, content, message):
    (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=message) as error:
        load_prompts(tmp_path / "p.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_blocks_may_end_anywhere_in_a_value(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_files, "BLOCK", block)
    rng = random.Random(block)
    objects = [
        {
            "prompt": "".join(rng.choices('ab"\\\n\u00e9\U0001f600 ]},', k=9)) + "x",
            "n": rng.choice([12345, -1.5e-7, None, [[]]]),
        }
        for _ in range(40)
    ]
    for form in ({}, {"indent": 2}, {"ensure_ascii": False}):
        (tmp_path / "p.json").write_text(json.dumps(objects, **form), "utf-8")
        assert load_prompts(tmp_path / "p.json") == [each["prompt"] for each in objects]
        assert load_prompts(tmp_path / "p.json", "prompt") == [each["prompt"] for each in objects]


def test_a_value_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK", 100)
    monkeypatch.setattr(json_files, "MOST_FIELD_BYTES", 1000)
    (tmp_path / "p.json").write_text(json.dumps(["a" * 900] * 5))
    assert len(load_prompts(tmp_path / "p.json")) == 5
    (tmp_path / "p.json").write_text(json.dumps(["a", "a" * 5000]))
    with pytest.raises(InputError, match="element 2 has more than 1,000 bytes"):
        load_prompts(tmp_path / "p.json")


def saved(folder, *tables, state=None):
    """A folder as `Dataset.save_to_disk` writes it (datasets 5.2), a part for each table."""
    folder.mkdir(parents=True)
    files = []
    for number, table in enumerate(tables):
        name = f"data-{number:05d}-of-{len(tables):05d}.arrow"
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        files.append({"filename": name})
    body = {"_data_files": files, "_fingerprint": "0", "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(body | (state or {})))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def texts(*prompts, column="prompt"):
    return pa.table({"id": list(range(len(prompts))), column: list(prompts)})


def test_folders_of_save_to_disk(tmp_path):
    folder = saved(tmp_path / "set", texts("a", "b", "c"), texts("d"))
    assert read_prompts(folder)[:2] == (
        ["a", "b", "c", "d"],
        {"file": "set", "rows": 4, "columns": ["prompt"]},
    )
    chat = [{"role": "user", "content": "Mend a kettle"}]
    folder = saved(
        tmp_path / "chats", texts([*chat, {"role": "assistant", "content": "Sure"}], column="messages")
    )
    assert load_prompts(folder) == [chat]
    with pytest.raises(InputError, match="has no splits: name the folder or a file, without :train"):
        load_prompts(f"{folder}:train")


def test_splits_of_save_to_disk(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, texts(split))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    found = read_prompts(f"{tmp_path / 'set'}:test")
    assert found[:2] == (["test"], {"file": "set", "split": "test", "rows": 1, "columns": ["prompt"]})
    for name, asked in [("", "several splits"), (":x", "no split 'x'")]:
        with pytest.raises(InputError, match=f"has {asked}: name one of train, test as .*set:SPLIT"):
            load_prompts(f"{tmp_path / 'set'}{name}")
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert load_prompts(tmp_path / "set") == ["train"]
    for wrong in ({"splits": ["../train"]}, {"splits": "train"}, {}, [], {"splits": [""]}):
        (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="does not name the splits of a data set|is not a JSON object"):
            load_prompts(tmp_path / "set")


def test_what_is_no_folder_of_save_to_disk(tmp_path):
    folder = saved(tmp_path / "set", texts("a", "b"), texts("c"))
    part, state = folder / "data-00000-of-00002.arrow", folder / "state.json"
    whole, body = part.read_bytes(), json.loads(state.read_text())
    for length in (len(whole) - 8, len(whole) - 9, len(whole) // 2, 3, 0):
        part.write_bytes(whole[:length])
        with pytest.raises(InputError, match="is cut off|cannot be read as Arrow"):
            load_prompts(folder)
    part.write_bytes(whole)
    for change, message in [
        ({"_data_files": [{"filename": "../p.arrow"}]}, "does not name the Arrow files"),
        ({"_data_files": []}, "does not name the Arrow files"),
        ({"_data_files": None}, "does not name the Arrow files"),
        ({"_data_files": [{"filename": "other.arrow"}]}, "lacks other.arrow, which its state.json names"),
        (
            {"_indices_data_files": [{"filename": "indices.arrow"}]},
            "keeps a selection of rows beside its data",
        ),
    ]:
        state.write_text(json.dumps(body | change))
        with pytest.raises(InputError, match=message):
            load_prompts(folder)
    state.write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not JSON"):
        load_prompts(folder)


def test_other_columns_and_offsets_that_lie(tmp_path):
    folder = saved(tmp_path / "mixed", texts("a"), texts("b", column="goal"))
    with pytest.raises(InputError, match="00001-of-00002.arrow has no column 'prompt': it has id, goal"):
        load_prompts(folder)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1 << 30, 2))
    wild = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"ab"))
    folder = saved(tmp_path / "wild", pa.table({"prompt": wild}))
    with pytest.raises(InputError, match="cannot be read as Arrow: .*[Oo]ffset"):
        load_prompts(folder)
    folder = saved(tmp_path / "bytes", pa.table({"prompt": [b"a"]}))
    with pytest.raises(
        InputError, match=r"column 'prompt' holds bytes \(binary\), expected text: decode them"
    ):
        load_prompts(folder)
