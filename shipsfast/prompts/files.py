"""Rows of prompt files, which anybody may have made: read as data, in bounded memory, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import arrow_files, json_files, text_files


class Rows(NamedTuple):
    """names: the columns, None where a row is a prompt itself; of: the rows of some columns, or of None."""

    names: list[str] | None
    of: Callable[[Sequence[str] | None], list[tuple]]
    unit: str = "row"


def _lines(path: Path, _none=None) -> list[tuple]:
    return [(line,) for line in text_files.lines(path) if line.strip()]


# By suffix: what gives the names, and what gives the rows.
_READERS = {
    ".csv": (text_files.names, text_files.columns),
    ".tsv": (text_files.names, text_files.columns),
    ".jsonl": (json_files.names, json_files.columns),
    ".json": (json_files.names, json_files.columns),
    ".parquet": (arrow_files.names, arrow_files.columns),
    ".txt": (lambda _: None, _lines),
}
SUFFIXES = tuple(_READERS)
TABLES = tuple(
    suffix for suffix in SUFFIXES if suffix not in (".txt", ".json")
)  # what a folder is looked through for


def rows(path: Path) -> Rows:
    """What a file holds, by its suffix."""
    suffix = path.suffix.lower()
    names, of = _READERS[suffix]
    return Rows(names(path), lambda chosen: of(path, chosen), "line" if suffix == ".txt" else "row")


def saved_rows(folder: Path) -> Rows:
    """What a folder of `save_to_disk` holds."""
    names = arrow_files.saved_names(folder)
    return Rows(names, lambda chosen: arrow_files.saved_columns(folder, chosen))
