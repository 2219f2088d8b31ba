"""What a screen in low precision says of scores that only it has seen: the chance that one of them belongs to the top k.

    e = g(exact score) - g(screened score)      of every head scored in both, on the prompts that both have seen
    g(s) = sqrt(s)     for kl, reverse_kl and js: each is about the square of a norm of the change of the distribution, to which
                       rounding adds about the same whatever the head (the error of KL itself grows with its root)
    g(s) = s           for total variation, and for metrics with a sign

The error of one more head is drawn from the same distribution as the n that are known: (e - mean) / (sd sqrt(1 + 1/n)) follows
Student's t with n - 1 degrees of freedom (the prediction interval of a normal sample). So a head whose screened score is at most s
reaches the k-th exact score t with the chance P(e > g(t) - g(s)). The chance that any does is at most the sum of these.

Two samples are known: all heads scored in both, and those of them that were drawn at random. The first heads of a screened ranking are
there in part because their errors were large, so of the two chances the larger one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ROOTS = ("kl", "reverse_kl", "js")


def by_root(metric: str) -> bool:
    """Whether errors of this metric are taken on the root of its scores."""
    return metric in ROOTS


def scaled(scores: np.ndarray, root: bool) -> np.ndarray:
    """g: rounding may put a score that is 0 below it."""
    return np.sqrt(np.maximum(scores, 0)) if root else np.asarray(scores, np.float64)


def unscaled(values: np.ndarray, root: bool) -> np.ndarray:
    return np.maximum(values, 0) ** 2 if root else np.asarray(values, np.float64)


@dataclass(frozen=True)
class ScreenError:
    """Errors e of the heads scored in both, [n]. drawn: those of the heads that were drawn at random; root: whether g is the root;
    signed: heads are ranked by the size of their score, so that an error either way counts."""

    errors: np.ndarray
    drawn: np.ndarray
    root: bool
    signed: bool = False

    @property
    def samples(self) -> list[np.ndarray]:
        return [np.asarray(self.errors, np.float64), np.asarray(self.drawn, np.float64)]

    def chances(self, kth: float, upper: np.ndarray) -> np.ndarray:
        """float64 [U]: the chance that a head whose screened score is at most `upper` [U] reaches the k-th exact score. 1 where nothing
        is known: fewer than two errors, or one that is not finite."""
        upper = np.asarray(upper, np.float64)
        if not np.isfinite(kth):
            return np.ones(upper.shape)
        with np.errstate(invalid="ignore"):
            gap = scaled(kth, self.root) - scaled(upper, self.root)
        gap = np.where(np.isnan(upper), -np.inf, gap)
        return np.max([self._beyond(sample, gap) for sample in self.samples], axis=0)

    def bounds(self, upper: np.ndarray, chance: float) -> np.ndarray:
        """float64 [U]: what the exact score of each such head exceeds with at most this chance; inf where nothing is known."""
        upper = scaled(upper, self.root)
        found = []
        for sample in self.samples:
            if not _known(sample):
                return np.full(np.shape(upper), np.inf)
            mean, spread, freedom = _prediction(sample)
            quantile = stats.t.isf(chance / (1 + self.signed), freedom)
            found.append((abs(mean) if self.signed else mean) + quantile * spread)
        return unscaled(upper + max(0.0, *found), self.root)

    def _beyond(self, sample: np.ndarray, gap: np.ndarray) -> np.ndarray:
        if not _known(sample):
            return np.ones(gap.shape)
        mean, spread, freedom = _prediction(sample)
        sides = (mean, -mean) if self.signed else (mean,)
        if spread == 0:  # all errors are one and the same
            return np.max([gap <= side for side in sides], axis=0).astype(np.float64)
        return np.minimum(sum(stats.t.sf((gap - side) / spread, freedom) for side in sides), 1.0)


def _known(sample: np.ndarray) -> bool:
    return len(sample) > 1 and bool(np.isfinite(sample).all())


def _prediction(sample: Sequence[float]) -> tuple[float, float, int]:
    """Centre and scale of the error of one more head, and the degrees of freedom."""
    count = len(sample)
    return float(np.mean(sample)), float(np.std(sample, ddof=1) * np.sqrt(1 + 1 / count)), count - 1
