"""Columns of prompt files, which anybody may have made: read as data, in bounded memory, or refused in one line.

Text is UTF-8. A file may have MOST_FILE_BYTES, a line or a field MOST_FIELD_BYTES; both are checked before anything of
that size is held. Csv is RFC 4180 with the first row as names; formulas, numbers and "NA" are text like any other.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

MOST_FILE_BYTES = 1 << 30
MOST_FIELD_BYTES = 16 << 20  # no context holds a prompt of that size
MOST_ROWS = 50_000_000
_BLOCK = 1 << 20


def lines(path: Path) -> Iterator[str]:
    """Lines end at line breaks only: str.splitlines would also cut at rarer separators inside a prompt."""
    _check_text(path)
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield line.removesuffix("\n")


def names(path: Path) -> list[str]:
    """The columns of a csv, jsonl or parquet file, in their order."""
    return {".csv": _csv_names, ".jsonl": _jsonl_names, ".parquet": _parquet_names}[path.suffix.lower()](path)


def column(path: Path, name: str) -> list:
    """One column: texts, and in their place anything else that a file of jsonl or parquet holds."""
    return {".csv": _csv_column, ".jsonl": _jsonl_column, ".parquet": _parquet_column}[path.suffix.lower()](
        path, name
    )


def _check_text(path: Path) -> None:
    """Raises InputError for a file that is too large, has too long a line, or is no UTF-8 text; reads it in blocks."""
    size = path.stat().st_size
    if size > MOST_FILE_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes, and prompt files of up to {MOST_FILE_BYTES:,} are read: take a part of it"
        )
    decoder = codecs.getincrementaldecoder("utf-8")()
    since_break = at = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            pending = len(decoder.getstate()[0])
            _decode(decoder, block, at - pending, path)
            first, last = block.find(b"\n"), block.rfind(b"\n")
            longest = since_break + (len(block) if first < 0 else first)
            if longest > MOST_FIELD_BYTES:
                raise InputError(
                    f"{path} has a line of more than {MOST_FIELD_BYTES:,} bytes: it is no file of prompts"
                )
            since_break = since_break + len(block) if last < 0 else len(block) - last - 1
            at += len(block)
        _decode(decoder, b"", at - len(decoder.getstate()[0]), path)


def _decode(decoder, block: bytes, at: int, path: Path) -> None:
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {at + error.start}): save it as UTF-8") from error


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """Rows that are not blank, the names first."""
    _check_text(path)
    before = csv.field_size_limit(MOST_FIELD_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            width = None
            for row in reader:
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise InputError(
                        f"{path} cannot be read as csv: the row that ends in line {reader.line_num} has {len(row)} "
                        f"fields, the first row {width}: put quotes around text with commas"
                    )
                yield row
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as csv: line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _csv_names(path: Path) -> list[str]:
    rows = _csv_rows(path)
    try:
        return next(rows, [])
    finally:
        rows.close()


def _csv_column(path: Path, name: str) -> list[str]:
    rows = _csv_rows(path)
    header = next(rows)
    if header.count(name) > 1:
        raise InputError(f"{path} has {header.count(name)} columns named {name!r}: rename one")
    at = header.index(name)
    return [row[at] for row in rows]


def _objects(path: Path) -> Iterator[dict]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise InputError(f"{path} is not JSON lines: line {number} is nested too deep") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON lines: line {number}: {error}") from error
        except ValueError as error:  # an integer of thousands of digits
            raise InputError(f"{path} cannot be read as jsonl: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: every line must be a JSON object with the prompt under one of its keys (line {number})"
            )
        yield row


def _jsonl_names(path: Path) -> list[str]:
    return list(dict.fromkeys(key for row in _objects(path) for key in row))


def _jsonl_column(path: Path, name: str) -> list:
    return [row.get(name) for row in _objects(path)]


def _parquet_names(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return _of_parquet(path, lambda: list(pq.ParquetFile(path).schema_arrow.names))


def _parquet_column(path: Path, name: str) -> list:
    """Texts stay in their dictionaries until their lengths are known: a small file can name a large text many times.

    Metadata of column chunks is not read: pyarrow 26 ends the process over some that are damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def read() -> list:
        file = pq.ParquetFile(path, read_dictionary=[name])
        found = [field for field in file.schema_arrow if field.name == name]
        if len(found) > 1:
            raise InputError(f"{path} has {len(found)} columns named {name!r}: rename one")
        if not _is_text(found[0].type):
            raise InputError(f"{path}: column {name!r} holds {found[0].type}, expected text")
        if not 0 <= file.metadata.num_rows <= MOST_ROWS:
            raise InputError(f"{path} declares {file.metadata.num_rows:,} rows: take a part of it")
        out, held = [], 0
        for batch in file.iter_batches(8192, columns=[name]):
            texts = batch.column(0)
            if pa.types.is_dictionary(texts.type):
                lengths = pc.binary_length(texts.dictionary)
                held += pc.sum(lengths.take(texts.indices)).as_py() or 0
                if held > MOST_FILE_BYTES or (pc.max(lengths).as_py() or 0) > MOST_FIELD_BYTES:
                    raise InputError(f"{path}: column {name!r} has more text than prompt files are read with")
            out += texts.to_pylist()
        return out

    return _of_parquet(path, read)


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _of_parquet(path: Path, read):
    """What pyarrow makes of a file that is not what it says."""
    try:
        return read()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error
