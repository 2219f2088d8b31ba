"""The tables of a run folder: parts that its manifest lists, read and checked, and scores as rows of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .kinds import SCORES
from .manifest import MANIFEST, DamagedPartError, Part, find_parts, read_manifest
from .part_file import cells, inside, read_table

if TYPE_CHECKING:
    import pandas as pd


def unlisted(path: Path, room: str, parts: list[Part]) -> list[Path]:
    """What lies in a room like a part, and is none of `parts`."""
    listed = {part.file for part in parts}
    return [p for p in sorted((path / room).glob("part-*.parquet")) if f"{room}/{p.name}" not in listed]


def read_parts(path: Path, room: str, columns: list[str]) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The parts of one room of a run folder, in the order written. Raises DamagedPartError for a damaged one."""
    if not (path / MANIFEST).exists():
        return
    manifest = read_manifest(path)
    parts = [part for part in find_parts(manifest) if part.room == room]
    if (path / room).is_symlink():
        inside(path, path / room)
    if manifest.get("status") == "complete":  # else it may be on its way into the list
        extra = unlisted(path, room, parts)
        if extra:
            raise DamagedPartError(
                f"{extra[0]} is not one of the parts that {path / MANIFEST} lists: take it away, or run the same "
                "command again, which removes it"
            )
    for part in parts:
        data = part.sound(path)
        with damage(path / part.file):
            frame = read_table(io.BytesIO(data), columns)
        yield path / part.file, frame


@contextlib.contextmanager
def damage(part: Path) -> Iterator[None]:
    """What goes wrong inside is the part's fault."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{part} is damaged ({' '.join(str(error).split())}): delete it and run again"
        ) from error


def read_scores(
    path: Path,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    value: str,
    done: np.ndarray | None = None,
    room: str = SCORES,
) -> np.ndarray:
    """The scores a run folder holds, float64 of `shape`, NaN where none has been written yet, and where one was marked.

    names: the columns that index the dimensions; value: the column of the scores; done: bool of `shape`, set where
    there is a row, of a score or of a mark.
    """
    scores = np.full(shape, np.nan)
    for part, frame in read_parts(path, room, [*names, value]):
        with damage(part):
            at = cells(frame, names, shape)
            scores[at] = frame[value]
            if done is not None:
                done[at] = True
    return scores


def score_frame(
    scores: np.ndarray, names: tuple[str, ...], value: str, marked: np.ndarray | None = None
) -> pd.DataFrame:
    """Scores as rows with the columns `names` and `value`, without those that are NaN; with the marked ones, as NaN."""
    import pandas as pd

    index = np.nonzero(~np.isnan(scores) if marked is None else ~np.isnan(scores) | marked)
    columns = {name: at.astype(np.int32) for name, at in zip(names, index, strict=True)}
    return pd.DataFrame(columns | {value: scores[index]})
