"""Columns of a prompt file beside its prompts, such as the group of each."""

import json

import pandas as pd
import pytest

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import read_prompts
from tests.support.prompt_files import FORMATS, write

HEADER = ("prompt", "kind", "target")
ROWS = [("Mend a kettle.", "tin", "a"), ("Light a lantern.", "oil", "b"), ("Fill a pot.", "tin", "c")]


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_in_the_order_of_the_prompts(tmp_path, suffix):
    found = read_prompts(write(tmp_path / f"p{suffix}", HEADER, ROWS), beside=["target", "kind", "kind"])
    assert found.prompts == [row[0] for row in ROWS]
    assert found.beside == {"target": ["a", "b", "c"], "kind": ["tin", "oil", "tin"]}
    assert found.origin["columns"] == ["prompt"]


def test_beside_what_a_published_set_mixes(tmp_path):
    header, rows = ("prompt", "category"), [("Mend a kettle.", "tin"), ("Light a lantern.", "oil")]
    for name in ("p.csv", "p.parquet"):  # a column that is asked for twice
        found = read_prompts(write(tmp_path / name, header, rows), beside=["category"])
        assert found.beside == {"category": ["tin", "oil"]}
        assert found.origin["kinds"] == {"category": {"oil": 1, "tin": 1}}


def test_beside_prompts_of_several_columns_and_parts(tmp_path):
    for part in (0, 1):
        rows = [("Name the metal.", "tin, oil", "x", f"of part {part}")]
        write(tmp_path / f"train-0000{part}-of-00002.csv", ("instruction", "input", "output", "kind"), rows)
    found = read_prompts(tmp_path, "input,instruction", ["kind"])
    assert found.prompts == ["tin, oil\n\nName the metal."] * 2
    assert found.beside == {"kind": ["of part 0", "of part 1"]}


def test_whole_numbers_are_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "level": level}) + "\n" for level in (1, "2", 30)))
    assert read_prompts(path, beside=["level"]).beside == {"level": ["1", "2", "30"]}


REFUSED = [
    ("p.csv", "prompt,kind\na,x\n", "Kind", "p.csv has no column 'Kind': it has prompt, kind"),
    ("p.csv", "prompt,kind\na,x\nb,  \n", "kind", "p.csv: column 'kind' in row 2 is empty"),
    ("p.csv", "prompt,kind\na,x\n", "prompt", "p.csv: column 'prompt' holds the prompts"),
    ("p.csv", "prompt,kind,kind\na,x,y\n", "kind", "p.csv has 2 columns named 'kind'"),
    ("p.jsonl", '{"prompt": "a", "kind": "x"}\n{"prompt": "b"}\n', "kind", "column 'kind' in row 2 is empty"),
    ("p.jsonl", '{"prompt": "a", "kind": 1.5}\n', "kind", "column 'kind' in row 1 is a value of type float"),
    ("p.jsonl", '{"prompt": "a", "kind": ["x"]}\n', "kind", "column 'kind' in row 1 is a value of type list"),
    ("p.jsonl", '"a"\n"b"\n', "kind", "p.jsonl has prompts and no columns, so none is named 'kind'"),
    ("p.txt", "a\nb\n", "kind", "p.txt has prompts and no columns, so none is named 'kind'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "column", "message"), REFUSED)
def test_what_is_refused(tmp_path, name, content, column, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name, beside=[column])


def test_numbers_of_parquet_are_refused(tmp_path):
    pd.DataFrame({"prompt": ["a"], "level": [3]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(InputError, match="column 'level' holds int64, expected text"):
        read_prompts(tmp_path / "p.parquet", beside=["level"])
