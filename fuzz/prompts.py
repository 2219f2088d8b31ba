"""Prompt files: any bytes under any of the suffixes. A list of texts that can be tokenized comes out, or InputError.

Input: a byte for suffix and column, then the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shipsfast.errors import InputError
from shipsfast.prompts.datasets import SUFFIXES, load_prompts
from shipsfast.text import visible

from .engine import Reader

COLUMNS = (None, "goal", "a,b", "\x00")
_folder: Path


@contextlib.contextmanager
def setup() -> Iterator[None]:
    global _folder
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        _folder = Path(name)
        yield


def one(data: bytes) -> None:
    reader = Reader(data)
    choice = reader.byte()
    path = _folder / f"file{SUFFIXES[choice % len(SUFFIXES)]}"
    column = COLUMNS[(choice // len(SUFFIXES)) % len(COLUMNS)]
    path.write_bytes(reader.rest())
    try:
        prompts = load_prompts(path, column)
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, f"not one line: {message[:300]!r}"
        assert visible(message) == message, f"steers the terminal: {message[:300]!r}"
        return
    assert prompts and all(type(p) is str and p.strip() for p in prompts)
    for prompt in prompts:
        prompt.encode("utf-8")  # tokenizers take nothing else


def seeds() -> Iterator[bytes]:
    for choice, text in [
        (0, 'goal,target\n"mend, a kettle",b\n"two\nlines",c\n'),
        (0, "\ufeffprompt;x\r\na;b\r\n"),
        (0, 'input\n"=1+1"\n"a ""quoted"" word"\n'),
        (1, '{"prompt": "mend a kettle"}\n{"prompt": "\\ud83d\\ude00"}\n'),
        (1, '{"prompt": "a", "n": [1, {"b": null}], "x": 1e999}\r\n'),
        (3, "one\ntwo\r\nthree\u2028four\n"),
    ]:
        yield bytes([choice]) + text.encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"goal": ["a", "b"], "n": [[1], None]}), out, compression="none")
    yield b"\x02" + out.getvalue()
    yield b"\x01" + json.dumps({"goal": "x" * 50}).encode()
