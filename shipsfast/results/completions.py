"""Labelled answers, [G groups, P prompts], and the parts of a run folder they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..engine.decoder import Decoded
from ..runs.kinds import COMPLETIONS, LABELS
from ..runs.part_file import ANSWER as COLUMNS
from ..runs.part_file import cells
from ..runs.tables import damage, read_parts
from .equality import Compared

MISSING = -1


class Completions(Compared):
    """What is known of each row.

    label: int8 [G, P], an index into runs.kinds.LABELS, -1 for rows not done; num_tokens: int32 [G, P], new tokens
    without the end token; finished: bool [G, P], ended by the end token; sha256: [G, P], of the text in UTF-8;
    text: [G][P] str, None where it was not kept; the hash tells texts apart.
    """

    compared = ("label", "num_tokens", "finished", "sha256")

    def __init__(self, groups: int, prompts: int, *, keep_text: bool = True) -> None:
        self.keep_text = keep_text
        self.label = np.full((groups, prompts), MISSING, dtype=np.int8)
        self.num_tokens = np.zeros((groups, prompts), dtype=np.int32)
        self.finished = np.zeros((groups, prompts), dtype=bool)
        self.sha256 = np.full((groups, prompts), "", dtype=object)
        self.text: list[list[str | None]] = [[None] * prompts for _ in range(groups)]

    def missing(self) -> list[tuple[int, int]]:
        return [(int(g), int(p)) for g, p in np.argwhere(self.label == MISSING)]

    def share(self, label: str) -> np.ndarray:
        """float64 [G]: the share of the prompts that are done; NaN where none is."""
        done = (self.label != MISSING).sum(1)
        with np.errstate(invalid="ignore"):
            return (self.label == LABELS.index(label)).sum(1) / np.where(done, done, np.nan)

    def keep(self, row: Decoded, text: str, label: str) -> None:
        at = (row.group, row.prompt)
        self.label[at] = LABELS.index(label)
        self.num_tokens[at] = len(row.tokens)
        self.finished[at] = row.finished
        self.sha256[at] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.text[row.group][row.prompt] = text

    def frame(self, rows: Sequence[tuple[int, int]] | None = None, *, text: bool = True) -> pd.DataFrame:
        """One row for each that is done: COLUMNS, and the text if asked for."""
        done = [tuple(at) for at in np.argwhere(self.label != MISSING)] if rows is None else list(rows)
        g, p = (np.array([at[i] for at in done], dtype=np.int32) for i in (0, 1))
        columns = {
            "group": g,
            "prompt": p,
            "label": [LABELS[i] for i in self.label[g, p]],
            "num_tokens": self.num_tokens[g, p],
            "finished": self.finished[g, p],
            "text_sha256": self.sha256[g, p],
        }
        if text:
            columns["text"] = pd.Series([self.text[i][j] for i, j in done], dtype=object)
        return pd.DataFrame(columns)

    def read(self, folder: Path, room: str = COMPLETIONS) -> None:
        """What a room of a run folder holds. Raises InputError, naming the part, for a damaged one."""
        names = [*COLUMNS, "text"] if self.keep_text else list(COLUMNS)
        for part, frame in read_parts(folder, room, names):
            with damage(part):
                at = cells(frame, ("group", "prompt"), self.label.shape)
                self.label[at] = [LABELS.index(name) for name in frame["label"]]
                self.num_tokens[at] = frame["num_tokens"]
                self.finished[at] = frame["finished"]
                self.sha256[at] = frame["text_sha256"]
                if self.keep_text:
                    for g, p, text in zip(*at, frame["text"], strict=True):
                        self.text[g][p] = text
