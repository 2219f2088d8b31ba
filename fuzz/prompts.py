"""Prompt files: any bytes under any of the suffixes, or as the data of a folder of `save_to_disk`. A list of texts and chats
that can be tokenized comes out, or InputError.

Input: a byte for form and column, then the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import load_prompts
from shipsfast.text import visible

from .engine import Reader

FORMS = ("file.csv", "file.jsonl", "file.parquet", "file.txt", "file.tsv", "file.json", "saved/data.arrow")
COLUMNS = (None, "goal", "a,b", "\x00")
_folder: Path


@contextlib.contextmanager
def setup() -> Iterator[None]:
    global _folder
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        _folder = Path(name)
        (_folder / "saved").mkdir()
        (_folder / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        yield


def one(data: bytes) -> None:
    reader = Reader(data)
    choice = reader.byte()
    path = _folder / FORMS[choice % len(FORMS)]
    column = COLUMNS[(choice // len(FORMS)) % len(COLUMNS)]
    path.write_bytes(reader.rest())
    try:
        prompts = load_prompts(path.parent if path.suffix == ".arrow" else path, column)
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, f"not one line: {message[:300]!r}"
        assert visible(message) == message, f"steers the terminal: {message[:300]!r}"
        return
    assert prompts
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if type(prompt) is str else prompt
        assert messages and messages[-1]["role"] != "assistant"
        for message in messages:
            assert set(message) == {"role", "content"} and all(type(text) is str for text in message.values())
            assert message["content"].strip() or message["role"] == "system"
            json.dumps(message, ensure_ascii=False).encode("utf-8")  # tokenizers take nothing else


def seeds() -> Iterator[bytes]:
    for choice, text in [
        (0, 'goal,target\n"mend, a kettle",b\n"two\nlines",c\n'),
        (0, "\ufeffprompt;x\r\na;b\r\n"),
        (0, 'input\n"=1+1"\n"a ""quoted"" word"\n'),
        (1, '{"prompt": "mend a kettle"}\n{"prompt": "\\ud83d\\ude00"}\n'),
        (1, '{"prompt": "a", "n": [1, {"b": null}], "x": 1e999}\r\n'),
        (3, "one\ntwo\r\nthree\u2028four\n"),
        (4, 'goal\ttarget\nmend, a kettle\tb\n"two\tlines"\tc\n'),
        (0, "instruction,input,output\na,b,c\nd,,e\n"),
        (1, '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'),
        (5, '[{"conversations": [{"from": "human", "value": "a"}], "n": 1.5}]'),
        (5, '["mend", "\\ud83d\\ude00"]'),
    ]:
        yield bytes([choice]) + text.encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    for table in (pa.table({"goal": ["a", "b"], "n": [[1], None]}), pa.table({"messages": chat})):
        out = io.BytesIO()
        pq.write_table(table, out, compression="none")
        yield b"\x02" + out.getvalue()
        out = io.BytesIO()
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        yield b"\x06" + out.getvalue()
    yield b"\x01" + json.dumps({"goal": "x" * 50}).encode()
