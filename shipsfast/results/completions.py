"""Labelled answers, [G groups, P prompts], and the parts of a run folder they lie in."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runs.kinds import COMPLETIONS, LABELS
from ..runs.part_file import ANSWER as COLUMNS
from ..runs.part_file import NLL, cells
from ..runs.tables import damage, read_parts
from .equality import Compared

if TYPE_CHECKING:
    import pandas as pd

    from ..engine.decoder import Decoded

MISSING = -1
LARGEST_NATS = 700.0  # the logarithm of what JSON can hold


class Completions(Compared):
    """What is known of each row.

    label: int8 [G, P], an index into runs.kinds.LABELS, -1 for rows not done; num_tokens: int32 [G, P], new tokens
    without the end token; finished: bool [G, P], ended by the end token; nll_nats: float64 [G, P], mean negative
    log-likelihood per token under the unablated model (answers/likelihood.py), NaN where it is not known; sha256: [G, P],
    of the text in UTF-8; text: [G][P] str, None where it was not kept; the hash tells texts apart.
    likelihoods: the parts have nll_nats, which those of earlier versions lack.
    """

    compared = ("label", "num_tokens", "finished", "nll_nats", "sha256")

    def __init__(
        self, groups: int, prompts: int, *, keep_text: bool = True, likelihoods: bool = True
    ) -> None:
        self.keep_text, self.likelihoods = keep_text, likelihoods
        self.nll_nats = np.full((groups, prompts), np.nan)
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

    def rows(self, which: slice) -> Completions:
        """These rows, which share memory with the others."""
        some = copy.copy(self)
        for name, value in vars(self).items():
            if name not in ("keep_text", "likelihoods"):
                setattr(some, name, value[which])
        return some

    def perplexity(self) -> np.ndarray:
        """float64 [G]: exp of the mean of nll_nats over the prompts whose is known; NaN where none is."""
        known = ~np.isnan(self.nll_nats)
        count = known.sum(1)
        mean = np.where(known, self.nll_nats, 0).sum(1) / np.where(count, count, np.nan)
        return np.exp(np.minimum(mean, LARGEST_NATS))

    def cut(self) -> np.ndarray:
        """float64 [G]: the share that ran to the limit of tokens, of what is done."""
        done = self.label != MISSING
        count = done.sum(1)
        return (done & ~self.finished).sum(1) / np.where(count, count, np.nan)

    def keep(self, row: Decoded, text: str, label: str, nll_nats: float = np.nan) -> None:
        at = (row.group, row.prompt)
        self.label[at] = LABELS.index(label)
        self.num_tokens[at] = len(row.tokens)
        self.finished[at] = row.finished
        self.nll_nats[at] = nll_nats
        self.sha256[at] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.text[row.group][row.prompt] = text

    def frame(self, rows: Sequence[tuple[int, int]] | None = None, *, text: bool = True) -> pd.DataFrame:
        """One row for each that is done: COLUMNS, nll_nats, and the text if asked for."""
        import pandas as pd

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
        if self.likelihoods:
            columns[NLL] = self.nll_nats[g, p]
        if text:
            columns["text"] = pd.Series([self.text[i][j] for i, j in done], dtype=object)
        return pd.DataFrame(columns)

    def read(self, folder: Path, room: str = COMPLETIONS) -> None:
        """What a room of a run folder holds. Raises InputError, naming the part, for a damaged one."""
        names = [*COLUMNS, *[NLL] * self.likelihoods, *["text"] * self.keep_text]
        for part, frame in read_parts(folder, room, names):
            with damage(part):
                at = cells(frame, ("group", "prompt"), self.label.shape)
                self.label[at] = [LABELS.index(name) for name in frame["label"]]
                self.num_tokens[at] = frame["num_tokens"]
                self.finished[at] = frame["finished"]
                self.sha256[at] = frame["text_sha256"]
                if self.likelihoods:
                    if not (frame[NLL] < np.inf).all():
                        raise ValueError(f"column {NLL} has values that are not finite")
                    self.nll_nats[at] = frame[NLL]
                if self.keep_text:
                    for g, p, text in zip(*at, frame["text"], strict=True):
                        self.text[g][p] = text
