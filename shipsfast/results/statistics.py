"""What a careful reader asks of scores: how concentrated are they, what is noise, how sure is a rate.

All take plain arrays and know nothing of models or metrics. Scores of any metric and unit will do: the means over
prompts, float64 [L layers, H heads]. NaN marks a head that was not scanned; it counts nowhere. How firm a ranking is:
bootstrap.py.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, entropy

from ..errors import InputError

TOP_SHARES = (1, 3, 5, 10)


@dataclass(frozen=True)
class Concentration:
    """How few heads hold the scores; see `concentration`. All but `heads` may be NaN: not defined."""

    heads: int
    gini: float
    top_share: dict[int, float]
    effective_heads: float
    participation_ratio: float

    def to_json(self) -> dict:
        """The same for run.json: names of shares as strings, None for NaN."""
        return {
            "heads": self.heads,
            "gini": or_none(self.gini),
            "top_share": {str(k): or_none(share) for k, share in self.top_share.items()},
            "effective_heads": or_none(self.effective_heads),
            "participation_ratio": or_none(self.participation_ratio),
        }


def concentration(mean_scores: np.ndarray) -> Concentration:
    """How few of the n scanned heads hold the scores x_i, the magnitudes of the means [L, H] or [N].

    heads                n, the number of scores that are not NaN
    gini                 sum_i (2 i - n - 1) x_(i) / (n sum x), x_(1) <= ... <= x_(n): half the mean absolute
                         difference over the mean (Gini 1912; Sen, On Economic Inequality, 1973). 0 is all equal,
                         (n - 1) / n one head alone.
    top_share            {k: sum of the k largest / sum x} for k = 1, 3, 5, 10; 1 where k >= n
    effective_heads      exp(-sum p ln p), p = x / sum x: the Hill number of order 1 (Hill, Ecology 54, 1973), from
                         1 (one head alone) to n (all equal)
    participation_ratio  (sum x)^2 / sum x^2: the Hill number of order 2, which gives rare weight to small scores;
                         never above effective_heads (Bell & Dean, Discuss. Faraday Soc. 50, 1970)

    None of them depends on the unit. If all scores are 0, or none was scanned, there is nothing to share out, and
    they are NaN; so they are where a score is infinite. A description that comes after a long scan does not raise.
    Many scores at the noise floor add up: they raise the effective numbers and lower the Gini coefficient. For
    the heads above it alone, set the others to 0.

    Raises InputError for a wrong shape.
    """
    x = np.abs(np.asarray(mean_scores, dtype=np.float64))
    if x.ndim not in (1, 2):
        raise InputError(f"mean scores must be [layers, heads] or [heads], got shape {list(x.shape)}")
    x = np.sort(x[~np.isnan(x)])
    n = x.size
    if n == 0 or x[-1] in (0, np.inf):
        return Concentration(n, np.nan, dict.fromkeys(TOP_SHARES, np.nan), np.nan, np.nan)
    x = x / x[-1]  # sums and squares neither overflow nor underflow, whatever the unit
    total = x.sum()
    differences = ((2 * np.arange(1, n + 1) - n - 1) * x).sum()  # of all pairs, each once
    return Concentration(
        heads=n,
        gini=float(differences / (n * total)),
        # The limits hold in exact arithmetic; rounding can miss them by an ulp.
        top_share={k: min(1.0, float(x[-k:].sum() / total)) for k in TOP_SHARES},
        effective_heads=float(np.clip(np.exp(entropy(x)), 1, n)),
        participation_ratio=float(np.clip(total**2 / (x**2).sum(), 1, n)),
    )


def above_noise(mean_scores: np.ndarray, noise_floor: float) -> np.ndarray:
    """Which mean scores are larger in magnitude than the noise floor, bool of the same shape.

    Strictly: a score at the floor is not above it. NaN gives False. Raises InputError for a noise floor that is
    not a finite number of at least 0.
    """
    if not (isinstance(noise_floor, numbers.Real) and 0 <= noise_floor < np.inf):
        raise InputError(f"noise_floor must be a finite number of at least 0, got {noise_floor!r}")
    return np.abs(np.asarray(mean_scores, dtype=np.float64)) > noise_floor


def or_none(value: float, kind: type = float) -> float | int | None:
    """NaN is not JSON."""
    return None if np.isnan(value) else kind(value)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate; NaN for no trials."""
    if not trials:
        return np.nan, np.nan
    found = binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def paired_difference(
    first: np.ndarray, second: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The rate of `first` less that of `second`, bool [N] of the same N prompts, and its interval; NaN for no prompts.

    The interval is Newcombe's for paired rates (Statistics in Medicine 17, 1998, 2635-2650, method 10): the Wilson limits of
    both, l and u, joined with their correlation phi,

        low  = d - sqrt(x^2 - 2 phi x y + y^2),   x = p1 - l1,   y = u2 - p2
        high = d + sqrt(x^2 - 2 phi x y + y^2),   x = u1 - p1,   y = p2 - l2
    """
    first, second = (np.asarray(each, dtype=bool) for each in (first, second))
    n = first.size
    if not n:
        return np.nan, np.nan, np.nan
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    p1, p2 = first.mean(), second.mean()
    (low1, high1), (low2, high2) = (wilson_interval(x.sum(), n, confidence) for x in (first, second))
    agree = both * neither - only_first * only_second
    if agree > 0:  # his correction for continuity
        agree = max(agree - n / 2, 0)
    spread = float(
        (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    )
    phi = agree / math.sqrt(spread) if spread else 0.0
    difference = float(p1 - p2)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return difference, difference - reach(p1 - low1, high2 - p2), difference + reach(high1 - p1, p2 - low2)
