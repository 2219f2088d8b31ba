"""How far several maps of scores name the same heads: rank correlation, and how much their tops share.

It takes plain arrays and knows nothing of models, metrics or what the maps are of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..errors import InputError, whole_number
from .statistics import or_none

MIDDLE = (0.05, 0.95)  # quantiles of what shuffles give


@dataclass(frozen=True, eq=False)
class RankAgreement:
    """Agreement of M maps, two by two; see `rank_agreement`.

    spearman  float64 [M, M], Spearman's correlation of the scores over heads, of sizes and signs where scores are signed
    overlap   float64 [M, M], share of a map's top k that is in the other's top k too
    chance    the overlap of two tops that have nothing to do with each other, k / heads
    k, heads  of the tops, and of what is compared: heads with a score in every map
    spearman_shuffled, overlap_shuffled  float64 [M, M, 2], the middle 90 % of what shuffles give; None without any

    NaN on the diagonal, and where a map is one number for all heads (spearman).
    """

    spearman: np.ndarray
    overlap: np.ndarray
    chance: float
    k: int
    heads: int
    spearman_shuffled: np.ndarray | None = None
    overlap_shuffled: np.ndarray | None = None

    def pairs(self) -> list[tuple[int, int]]:
        """Every two maps, the least alike first."""
        both = zip(*np.triu_indices(len(self.spearman), 1), strict=True)
        found = [(int(i), int(j)) for i, j in both]
        return sorted(found, key=lambda at: np.nan_to_num(self.spearman[at], nan=-2.0))

    def to_json(self, names: list[str]) -> dict:
        """names: of the maps."""
        rows = []
        for at in self.pairs():
            row = {"between": [names[i] for i in at]}
            for name in ("spearman", "overlap"):
                row[name] = or_none(getattr(self, name)[at])
                shuffled = getattr(self, f"{name}_shuffled")
                if shuffled is not None:
                    row[f"{name}_shuffled"] = [or_none(x) for x in shuffled[at]]
            rows.append(row)
        return {"k": self.k, "heads": self.heads, "chance": or_none(self.chance), "pairs": rows}


def rank_agreement(
    maps: np.ndarray, k: int = 10, *, signed: bool = False, shuffles: Iterable[np.ndarray] = ()
) -> RankAgreement:
    """Agreement of maps [M, ...], NaN where a head has no score. Heads with a score in every map count.

    k        size of the tops, by size of the scores; more than there are heads means all of them
    signed   scores have a sign: tops go by their size
    shuffles  maps like these, were it for chance alone, for the interval beside each number

    Heads that tie for the last places of a top are in it by an equal share each, so that maps with nothing but ties agree
    as chance has it. Raises InputError for less than two maps.
    """
    flat = np.asarray(maps, dtype=np.float64).reshape(len(maps), -1)
    if len(flat) < 2:
        raise InputError(f"agreement is of two maps or more, got {len(flat)}")
    known = np.isfinite(flat).all(0)
    heads = int(known.sum())
    k = min(whole_number("k", k), heads)
    found = _agreement(flat[:, known], k, signed)
    others = [_agreement(np.asarray(each).reshape(len(flat), -1)[:, known], k, signed) for each in shuffles]
    middle = [None, None]
    if others:
        middle = [
            np.moveaxis(np.quantile(np.stack(x), MIDDLE, axis=0), 0, -1) for x in zip(*others, strict=True)
        ]
    return RankAgreement(*found, k / heads if heads else np.nan, k, heads, *middle)


def _agreement(maps: np.ndarray, k: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's correlations and overlaps [M, M] of [M, N]."""
    with np.errstate(invalid="ignore", divide="ignore"):  # of a map that is one number
        spearman = (
            np.corrcoef(rankdata(maps, axis=1)) if maps.shape[1] > 1 else np.full((len(maps),) * 2, np.nan)
        )
    tops = np.stack([_top(np.abs(row) if signed else row, k) for row in maps])
    overlap = tops @ tops.T / k if k else np.full((len(maps),) * 2, np.nan)
    for each in (spearman, overlap):
        np.fill_diagonal(each, np.nan)
    return spearman, overlap


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """How much of each head is in the top k, float64 [N]: 1, 0, or a share of the places that heads tie for."""
    last = np.sort(scores)[-k] if k else np.inf
    above, tied = scores > last, scores == last
    return above + tied * ((k - above.sum()) / max(1, tied.sum()))
