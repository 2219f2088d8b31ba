"""Prompt files of lines and of fields: txt, csv and tsv.

Text is UTF-8. A file may have MOST_FILE_BYTES, a line or a field MOST_FIELD_BYTES; both are checked before anything of
that size is held. Csv is RFC 4180 with the first row as names, tsv the same with tabs; formulas, numbers and "NA" are text
like any other.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError

MOST_FILE_BYTES = 1 << 30
MOST_FIELD_BYTES = 16 << 20  # no context holds a prompt of that size
MOST_ROWS = 50_000_000
BLOCK = 1 << 20


def lines(path: Path) -> Iterator[str]:
    """Lines end at line breaks only: str.splitlines would also cut at rarer separators inside a prompt."""
    check_text(path)
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            yield line.removesuffix("\n")


def check_text(path: Path, lines: bool = True) -> None:
    """Raises InputError for a file that is too large, has too long a line, or is no UTF-8 text; reads it in blocks.

    lines: its lines may be held, so that they have a limit.
    """
    size = path.stat().st_size
    if size > MOST_FILE_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes, and prompt files of up to {MOST_FILE_BYTES:,} are read: take a part of it"
        )
    decoder = codecs.getincrementaldecoder("utf-8")()
    since_break = at = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            pending = len(decoder.getstate()[0])
            _decode(decoder, block, at - pending, path)
            first, last = block.find(b"\n"), block.rfind(b"\n")
            longest = since_break + (len(block) if first < 0 else first)
            if lines and longest > MOST_FIELD_BYTES:
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


def _fields(path: Path) -> Iterator[list[str]]:
    """Rows that are not blank, the names first."""
    kind = path.suffix.lower().removeprefix(".")
    comma, delimiter = ("tabs", "\t") if kind == "tsv" else ("commas", ",")
    check_text(path)
    before = csv.field_size_limit(MOST_FIELD_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            width = None
            for row in reader:
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise InputError(
                        f"{path} cannot be read as {kind}: the row that ends in line {reader.line_num} has {len(row)} "
                        f"fields, the first row {width}: put quotes around text with {comma}"
                    )
                yield row
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as {kind}: line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def names(path: Path) -> list[str]:
    """The columns of a csv or tsv file."""
    rows = _fields(path)
    try:
        return next(rows, [])
    finally:
        rows.close()


def columns(path: Path, chosen: Sequence[str]) -> list[tuple]:
    """The rows of some columns."""
    rows = _fields(path)
    header = next(rows)
    for name in chosen:
        if header.count(name) > 1:
            raise InputError(f"{path} has {header.count(name)} columns named {name!r}: rename one")
    at = [header.index(name) for name in chosen]
    return [tuple(row[i] for i in at) for row in rows]
