"""Which heads may still belong to the top k while prompts come in: heads that surely do not are dropped.

The prompts are a finite list, seen in random order without replacement, and what counts is the mean over all of them; once all are
seen it is known exactly. Plain arrays: it knows nothing of models or metrics.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError, whole_number


def round_ends(prompts: int) -> list[int]:
    """After how many prompts heads may be dropped, ending with `prompts`."""
    return [prompts]


class Race:
    """Drops heads that cannot belong to the k heads with the largest mean over all `prompts`, with a chance of at most `error`
    that one which does is dropped, over all rounds and heads together.

    cost    float64 [N], what scoring a head costs: dear heads are dropped first
    cap     the largest value that the metric can have, None for none
    signed  heads are ranked by the size of their mean
    """

    bound: str
    about: str

    def __init__(
        self, prompts: int, k: int, error: float, cost: np.ndarray, *, cap: float | None = None, signed: bool = False
    ) -> None:
        self.prompts, self.k = whole_number("prompts", prompts), whole_number("k", k)
        self.error, self.cost, self.cap, self.signed = error, np.asarray(cost, np.float64), cap, signed
        self.bound, self.about = "none yet", "Every head is kept until all prompts are seen."

    def alive(self, scores: np.ndarray) -> np.ndarray:
        """bool [N]: which heads may still belong to the top k. scores: float64 [n, N] in the order seen, NaN from where a head was
        dropped on."""
        return ~np.isnan(scores).any(axis=0)

    def upper(self, scores: np.ndarray) -> np.ndarray:
        """float64 [N]: an upper bound on each head's mean over all prompts; the mean itself where all were seen."""
        seen = (~np.isnan(scores)).sum(axis=0)
        return np.where(seen == self.prompts, np.nansum(scores, axis=0) / self.prompts, np.inf)
