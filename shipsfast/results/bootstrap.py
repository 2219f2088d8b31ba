"""How firm a ranking of heads is: the bootstrap over prompts, of means and of any other statistic of them.

It takes plain arrays and knows nothing of models or metrics. NaN marks a head that was not scanned; it stays NaN and
counts nowhere.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import quantile, rankdata

from ..errors import InputError, whole_number
from .statistics import or_none

BLOCK_ELEMENTS = 2**19  # of a temporary array: 4 MiB in float64


def quick_stability(take: Callable[[], RankStability]) -> tuple[RankStability | None, str]:
    """What `take` gives; None and the reason where it cannot be: too few prompts, a head scanned in part, an infinite
    score."""
    try:
        return take(), ""
    except InputError as problem:
        return None, f"no intervals: {problem}"


def as_known(stability: RankStability | None, problem: str) -> dict:
    """The same for run.json, and for a program to read."""
    return {"not_known": problem} if stability is None else stability.to_json()


@dataclass(frozen=True, eq=False)
class RankStability:
    """Bootstrap over prompts of the mean scores and their ranks; see `rank_stability`.

    mean             float64 [L, H], mean over the prompts, as observed
    rank             float64 [L, H], its rank as observed: 1 is the top, by magnitude where signed
    top_k_frequency  float64 [L, H], fraction of resamples with the head among the top k
    low, high        float64 [L, H], BCa interval of the mean score, in the unit of the scores
    rank_low, rank_high  float64 [L, H], percentile interval of the rank, whole numbers

    Heads not scanned are NaN in all of them. With one prompt only mean and rank are known; the rest is NaN.
    """

    mean: np.ndarray
    rank: np.ndarray
    top_k_frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rank_low: np.ndarray
    rank_high: np.ndarray
    k: int
    prompts: int
    resamples: int
    confidence: float
    seed: int
    signed: bool = False

    @property
    def top_k_overlap(self) -> float:
        """Expected share of the observed top k that a resample's top k holds too: 1 is a firm top k."""
        return float(self.top_k_frequency[self.rank <= self.k].mean())

    def to_json(self) -> dict:
        """The settings and the observed top k heads in order, for run.json; what is not known is None."""
        layers, heads = np.nonzero(self.rank <= self.k)
        order = np.argsort(self.rank[layers, heads])
        settings = ("k", "prompts", "resamples", "confidence", "seed", "signed")
        return {
            **{name: getattr(self, name) for name in settings},
            "interval": "BCa",
            "top_k_overlap": or_none(self.top_k_overlap),
            "top": [
                {
                    "rank": int(self.rank[at]),
                    "layer": int(at[0]),
                    "head": int(at[1]),
                    **{name: or_none(getattr(self, name)[at]) for name in ("mean", "low", "high")},
                    **{name: or_none(getattr(self, name)[at], int) for name in ("rank_low", "rank_high")},
                    "top_k_frequency": or_none(self.top_k_frequency[at]),
                }
                for at in zip(layers[order], heads[order], strict=True)
            ],
        }


def rank_stability(
    scores: np.ndarray,
    k: int = 10,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    signed: bool = False,
) -> RankStability:
    """How far the ranking of heads depends on which prompts were scanned: a bootstrap over prompts.

    scores      float64 [P, L, H]; a head is scanned for all prompts or for none (all NaN)
    k           size of the top; more than the heads scanned means all of them, and RankStability.k says so
    resamples   draws of P prompts out of P with replacement; 1,000 or more for 95 % intervals
    confidence  of both intervals, in (0, 1)
    seed        same seed, same result
    signed      rank by the magnitude of the mean; the interval is of the mean itself

    A resample draws whole prompts, the same for every head, so that heads which rise and fall together keep
    doing so (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6 and section 7.2). Within
    each, heads are ranked by mean score, ties to the lower (layer, head) as in `ShipsResult.top`.

    The interval of the mean is BCa (Efron, JASA 82, 1987; Efron & Tibshirani, eqs. 14.9 to 14.15), not the
    percentile interval: scores such as KL are skewed to the right over prompts, where the percentile interval of
    a mean sits too low, and BCa corrects this to second order. It costs nothing here, as the jackknife
    acceleration of a mean is closed: a = skewness / (6 sqrt(P)). A head with the same score for every prompt has
    an interval of width 0. With a handful of prompts no bootstrap interval reaches its nominal coverage.

    The interval of the rank is the percentile interval of the resampled ranks, taken outward to whole ranks, as
    in league tables (Goldstein & Spiegelhalter, JRSS A 159, 1996). Among heads whose true means are equal or
    nearly so the bootstrap of ranks is not consistent (Hall & Miller, Annals of Statistics 37, 2009): read a
    wide one as "not told apart", not as a probability statement.

    With P = 1 all resamples are that prompt: frequencies and intervals are NaN, where 1 and width 0 would only
    seem firm.

    Raises InputError for a wrong shape, a head scanned for some prompts only, scores that are not finite, no
    head scanned, and settings out of range.
    """
    scores = checked_scores(scores)
    check_settings(k, resamples, confidence, seed)
    mean = scores.mean(axis=0)
    scanned = ~np.isnan(mean)
    columns = scores[:, scanned]  # [P, N], heads in order of (layer, head)
    means = None
    if len(scores) > 1:
        means = resampled_means(columns, resamples, np.random.default_rng(seed))
    return stability_of(
        mean,
        means,
        columns - mean[scanned],
        k,
        prompts=len(scores),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        signed=signed,
    )


def stability_of(
    observed: np.ndarray,
    resampled: np.ndarray | None,
    influence: np.ndarray,
    k: int,
    *,
    prompts: int,
    resamples: int,
    confidence: float = 0.95,
    seed: int = 0,
    signed: bool = False,
) -> RankStability:
    """RankStability of any statistic of the prompts, once its resampled values are known.

    observed   float64 [L, H], the statistic of all prompts; NaN for heads not scanned
    resampled  float64 [R, N], the same of R resamples, for the N scanned heads in order of (layer, head); None
               if there is nothing to resample: then only observed and rank are known
    influence  float64 [P, N], what each prompt adds to it: for a mean its deviation, for others (P - 1) times the
               statistic of all prompts less that without the prompt, centred; the acceleration of BCa needs its
               skewness only (Efron & Tibshirani 1993, eq. 14.15)
    The settings are those of `rank_stability`, recorded as they are.
    """
    scanned = ~np.isnan(observed)
    values = observed[scanned]
    k = min(k, values.size)

    def grid(values):
        out = np.full(scanned.shape, np.nan)
        out[scanned] = values
        return out

    if resampled is None:
        frequency = low = high = rank_low = rank_high = np.nan
    else:
        ranks = np.empty(resampled.shape, np.int32)
        for part in blocks(*resampled.shape):
            ranks[part] = _ranks(resampled[part], signed)
        frequency = (ranks <= k).mean(axis=0)
        low, high = _bca_interval(resampled, values, influence, confidence)
        rank_low, rank_high = _rank_interval(ranks, confidence)
    return RankStability(
        mean=observed,
        rank=grid(_ranks(values, signed)),
        top_k_frequency=grid(frequency),
        low=grid(low),
        high=grid(high),
        rank_low=grid(rank_low),
        rank_high=grid(rank_high),
        k=k,
        prompts=prompts,
        resamples=resamples,
        confidence=float(confidence),
        seed=seed,
        signed=bool(signed),
    )


def resample_counts(
    prompts: Sequence[Hashable], resamples: int, least_distinct: int, rng: np.random.Generator
) -> np.ndarray:
    """How often each resample holds each prompt, float64 [R, P]; draws of fewer distinct prompts are drawn again.

    prompts: equal ones are the same prompt. Raises InputError if most draws have too few distinct ones.
    """
    number = len(prompts)
    _, content = np.unique(np.asarray(prompts), return_inverse=True)
    belongs = np.eye(content.max() + 1)[content]  # [P, distinct prompts]
    counts = np.empty((resamples, number))
    left = np.arange(resamples)
    while left.size:
        counts[left] = rng.multinomial(number, np.full(number, 1 / number), left.size)
        again = (counts[left] @ belongs > 0).sum(axis=1) < least_distinct
        if left.size == resamples and again.mean() > 0.5:
            raise InputError(
                f"most resamples of {number} prompts have fewer than {least_distinct} distinct ones, which the rank "
                "asks for: lower it, or take more prompts"
            )
        left = left[again]
    return counts


def resampled_means(scores: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Mean of every head in every resample, [R, N]: counts [R, P] times scores [P, N], over P.

    Equal scores must give equal means, or rounding would decide ties. A matrix product does not promise that: it
    may add up two equal columns in different orders. So each distinct column enters once, and a constant
    column is its constant.
    """
    prompts = len(scores)
    columns, place = np.unique(scores, axis=1, return_inverse=True)
    constant = (columns == columns[0]).all(axis=0)
    means = np.empty((resamples, scores.shape[1]))
    for part in blocks(resamples, max(scores.shape)):
        rows = part.stop - part.start
        drawn = rng.integers(0, prompts, (rows, prompts)) + prompts * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        product = counts.astype(np.float64) @ columns / prompts
        product[:, constant] = columns[0, constant]
        means[part] = product[:, place.ravel()]
    return means


def _ranks(means: np.ndarray, signed: bool) -> np.ndarray:
    """Ranks along the last axis, 1 for the largest (in magnitude where signed); ties to the earlier."""
    return rankdata(-np.abs(means) if signed else -means, method="ordinal", axis=-1)


def _bca_interval(means, observed, influence, confidence) -> np.ndarray:
    """BCa intervals, [2, N], from resampled values [R, N] (Efron & Tibshirani 1993, section 14.3)."""
    resamples = len(means)
    below = ((means < observed).sum(axis=0) + (means <= observed).sum(axis=0)) / (2 * resamples)
    z0 = ndtri(below.clip(0.5 / resamples, 1 - 0.5 / resamples))  # finite even if all lie on one side
    largest = np.abs(influence).max(axis=0)
    # The largest is 1, so that no power of it underflows.
    deviation = influence / np.where(largest > 0, largest, 1)
    squares = np.maximum((deviation**2).sum(axis=0), 1)  # under 1 only where all are 0, and so the cubes
    acceleration = (deviation**3).sum(axis=0) / (6 * squares**1.5)
    z = z0 + ndtri([[(1 - confidence) / 2], [(1 + confidence) / 2]])  # [2, N]
    # Beyond its pole the formula would fold back; the limit there is the end of the distribution.
    level = ndtr(z0 + z / np.maximum(1 - acceleration * z, np.finfo(np.float64).eps))
    out = np.empty_like(level)
    for part in blocks(len(observed), resamples):
        out[:, part] = quantile(means[:, part], level[:, part])
    # Between two equal values quantile interpolates, and may round to a third.
    return np.where(means.min(axis=0) == means.max(axis=0), means[0], out)


def _rank_interval(ranks: np.ndarray, confidence: float) -> np.ndarray:
    """Percentile intervals of the ranks, [2, N], from resampled ranks [R, N]; ends that occurred, so whole."""
    tail = round((1 - confidence) / 2, 12)  # the 50th of 2,000 for 0.95, which rounding would make the 51st
    out = np.empty((2, ranks.shape[1]))
    for part in blocks(*ranks.T.shape):
        out[:, part] = quantile(ranks[:, part], np.array([[tail], [1 - tail]]), method="inverted_cdf")
    return out


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of a length in which each item brings `width` elements: temporaries stay small."""
    step = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """Checked scores, float64 [P, L, H]."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or 0 in scores.shape:
        raise InputError(
            f"scores must be [prompts, layers, heads], none of them 0, got shape {list(scores.shape)}"
        )
    known = (~np.isnan(scores)).sum(axis=0)  # [L, H]
    if not known.any():
        raise InputError("no head was scanned: there are no scores to rank")
    partly = np.argwhere((known > 0) & (known < len(scores)))
    if len(partly):
        layer, head = partly[0]
        raise InputError(
            f"head {layer}-{head} has scores for {known[layer, head]} of {len(scores)} prompts: "
            "finish the scan, or take the prompts that all heads have"
        )
    infinite = np.argwhere(np.isinf(scores))
    if len(infinite):
        prompt, layer, head = infinite[0]
        raise InputError(
            f"the score of head {layer}-{head} for prompt {prompt} is infinite: its mean cannot be ranked"
        )
    return scores


def check_settings(k: int, resamples: int, confidence: float, seed: int) -> None:
    """Raises InputError for settings of a bootstrap that cannot be."""
    for name, value, least in (("k", k, 1), ("resamples", resamples, 1), ("seed", seed, 0)):
        whole_number(name, value, least)
    if not (isinstance(confidence, numbers.Real) and 0 < confidence < 1):
        raise InputError(f"confidence must lie between 0 and 1, got {confidence!r}")
