"""Where scores stand in tables, and in arrays of that form: by prompt, or by prompt and token where one prompt has several reads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runs.kinds import HEAD, read_counts


class Cells(NamedTuple):
    """counts: reads of each prompt; empty where each has one, its last, and there is no column of tokens."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    counts: list[int]

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return np.nonzero(np.arange(self.shape[1]) < np.reshape(self.counts, (-1, 1)))

    def flat(self, padded: np.ndarray) -> np.ndarray:
        """[M, L, H], by reads."""
        return padded[self._places()] if self.counts else padded

    def padded(self, flat: np.ndarray, fill) -> np.ndarray:
        """The other way."""
        if not self.counts:
            return flat
        out = np.full(self.shape, fill)
        out[self._places()] = flat
        return out


def cells_of(identity: dict) -> Cells:
    """Of a run of this identity."""
    prompts, *grid = identity["shape"]
    counts = read_counts(identity)
    if not counts:
        return Cells(("prompt", *HEAD), (prompts, *grid), [])
    return Cells(("prompt", "token", *HEAD), (prompts, max(counts), *grid), counts)
