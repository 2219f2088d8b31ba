"""Two samples held against each other, column by column: scores of P prompts of one set, and of Q prompts of another.

All take plain arrays, float64 [P, N] and [Q, N], and know nothing of models or heads. Every column is compared by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln
from scipy.stats import rankdata

from ..errors import InputError, whole_number
from .bootstrap import blocks

ALTERNATIVES = ("greater", "less", "two-sided")
STATISTICS = ("auroc", "difference")
PERMUTATIONS = 99_999


class PermutationTest(NamedTuple):
    """p: float64 [N]; exact: were all relabellings looked at, or some drawn; relabellings: how many; least: the smallest
    p-value that so many can give."""

    p: np.ndarray
    exact: bool
    relabellings: int
    least: float


def auroc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """P(x > y) + P(x = y) / 2 of x drawn from a column of a and y from the same of b, [N]: the area under the ROC curve of a
    score that tells a from b. It is U / (P Q), with U of Mann and Whitney (Annals of Mathematical Statistics 18, 1947). Cliff's
    delta is 2 AUROC - 1."""
    first, second = len(a), len(b)
    ranks = rankdata(np.concatenate([a, b]), axis=0)[:first].sum(axis=0)
    return (ranks - first * (first + 1) / 2) / (first * second)


def hedges_g(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The difference of the means in pooled standard deviations s, without the bias of small samples, [N]:

        g = J (mean a - mean b) / s,   J = Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)),   m = P + Q - 2

    (Hedges, Journal of Educational Statistics 6, 1981). NaN where no score varies, which leaves nothing to measure by, and
    for m < 2.
    """
    freedom = len(a) + len(b) - 2
    if freedom < 2:
        return np.full(a.shape[1], np.nan)
    squares = sum(_squares(x) for x in (a, b))
    unbiased = math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        g = unbiased * (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(squares / freedom)
    return np.where(squares > 0, g, np.nan)


def _squares(x: np.ndarray) -> np.ndarray:
    """Squared deviations, exactly 0 where all are equal: the mean of equal numbers may round to another."""
    return np.where((x == x[0]).all(axis=0), 0.0, ((x - x.mean(axis=0)) ** 2).sum(axis=0))


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    statistic: str = "auroc",
    alternative: str = "greater",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> PermutationTest:
    """How often does a relabelling of the P + Q prompts as P of a and Q of b tell the two apart as well as the true labels do?

    statistic     "auroc", of ranks, which one wild prompt cannot move far; or "difference" of the means
    alternative   "greater": a's scores are the larger ones; "less"; or "two-sided", twice the smaller of the two, at most 1
    permutations  relabellings that are drawn; where there are no more than that in all, each is looked at, and p is exact:
                  their share with a statistic at least as large. Else p = (1 + those) / (1 + permutations) (Phipson & Smyth,
                  Statistical Applications in Genetics and Molecular Biology 9, 2010)
    seed          same seed, same result

    Equal statistics count as at least as large, with sums of rounded numbers taken as equal where rounding may tell them
    apart. Raises InputError for settings out of range.
    """
    for name, value, known in (
        ("alternative", alternative, ALTERNATIVES),
        ("statistic", statistic, STATISTICS),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    permutations, seed = whole_number("permutations", permutations), whole_number("seed", seed, 0)
    values, first = np.concatenate([a, b]), len(a)
    number = len(values)
    slack, place = 0.0, slice(None)
    if statistic == "auroc":
        values = rankdata(values, axis=0)  # halves of whole numbers: their sums are exact
    else:
        values = values - values.mean(axis=0)  # the same statistic, with less to round
        slack = 4 * number * np.finfo(np.float64).eps * np.abs(values).sum(axis=0)
    observed = values[:first].sum(axis=0)
    if statistic == "auroc":
        # What relabelling makes of a column depends on which ranks it has, not on where: without ties all have the same.
        values, place = np.unique(np.sort(values, axis=0), axis=1, return_inverse=True)
        place = place.ravel()
    above, below = np.zeros(observed.size), np.zeros(observed.size)
    in_all = math.comb(number, first)
    exact = in_all <= permutations
    labels = _all_labels(number, first) if exact else _drawn_labels(number, first, permutations, seed)
    for chosen in labels:  # both samples have a fixed total, so the sum of one says all
        for part in blocks(len(chosen), observed.size):
            sums = (chosen[part] @ values)[:, place]
            if alternative != "less":
                above += (sums >= observed - slack).sum(axis=0)
            if alternative != "greater":
                below += (sums <= observed + slack).sum(axis=0)
    drawn = in_all if exact else permutations
    greater, less = ((count + (not exact)) / (drawn + (not exact)) for count in (above, below))
    p = {"greater": greater, "less": less, "two-sided": np.minimum(1, 2 * np.minimum(greater, less))}
    least = (1 + (alternative == "two-sided")) / (drawn + (not exact))
    return PermutationTest(p[alternative], exact, drawn, min(1.0, least))


def _all_labels(number: int, first: int) -> Iterator[np.ndarray]:
    """Every choice of `first` of `number`, as rows of 0 and 1."""
    chosen = np.array(list(combinations(range(number), first)))
    labels = np.zeros((len(chosen), number))
    np.put_along_axis(labels, chosen, 1, axis=1)
    yield labels


def _drawn_labels(number: int, first: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Choices drawn at random, the same whatever the number of columns, as rows of 0 and 1."""
    rng, labels = np.random.default_rng(seed), (np.arange(number) < first).astype(np.float64)
    for part in blocks(permutations, number):
        yield rng.permuted(np.tile(labels, (part.stop - part.start, 1)), axis=1)
