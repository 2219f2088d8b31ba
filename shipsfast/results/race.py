"""Which heads may still belong to the top k while prompts come in: heads that surely do not are dropped.

The prompts are a finite list of P, seen in random order without replacement, and what counts is the mean over all of them; once all
are seen it is known exactly. A head h is out once at least k heads g are surely better, by the differences x_g - x_h on the n prompts
seen: prompts move heads together, so differences vary less than scores do.

If h belongs to the top k, as its j-th best, then at least k - j + 1 of the k heads that seem better are not. Of the N - k heads
outside of the top k, each wrongly seems better with a chance of alpha at most, so that many do with a chance of at most
(N - k) alpha / (k - j + 1) (Rueger 1978), and summed over the top k and R rounds

    alpha = error / (R (N - k) (1 + 1/2 + ... + 1/k))

keeps the chance that one of the top k is lost below `error`. It is the same for all heads: at most k heads can be lost, so a larger
share for the heads that cost most would be taken from all others and gain nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from ..errors import InputError, whole_number

FEWEST_SEEN = 16  # prompts before anything is dropped: skewness and spread of fewer say little
LAST_DROP = 7 / 8  # of all prompts: dropping later saves next to nothing
LEADERS = 2  # times k: heads that others are held against
PRONE = 0.9  # a prompt not seen yet may stand out in a head as far as one does in that quantile of heads


def round_ends(prompts: int) -> list[int]:
    """After how many prompts heads may be dropped: 16, 24, 32, 48, 64, 96, ... and `prompts` at the end."""
    prompts = whole_number("prompts", prompts)
    ends, end = [], FEWEST_SEEN
    while end <= LAST_DROP * prompts:
        ends.append(end)
        end += end // 2 if end & (end - 1) == 0 else end // 3
    return [*ends, prompts]


class Race:
    """Drops heads that do not belong to the k heads with the largest mean over all `prompts`. The chance that the top k does not
    survive whole is at most `error`, over all rounds and heads together, as far as `about` says that it is known.

    prompts  P, how many there are
    cost     float64 [N], what scoring a head costs, for `share`
    cap      the largest value that the metric can have, for bounds that always hold; None for bounds by the spread of what was
             seen, which have no guarantee
    signed   heads are ranked by the size of their mean
    ends     after how many prompts `alive` is asked, the last being P; default `round_ends`

    Raises InputError for settings out of range, and for scores that do not fit them.
    """

    def __init__(
        self,
        prompts: int,
        k: int,
        error: float,
        cost: np.ndarray,
        *,
        cap: float | None = None,
        signed: bool = False,
        ends: Sequence[int] | None = None,
    ) -> None:
        self.prompts, self.k = whole_number("prompts", prompts), whole_number("k", k)
        self.cost, self.error, self.cap, self.signed = np.asarray(cost, np.float64), error, cap, signed
        self.ends = round_ends(prompts) if ends is None else [whole_number("ends", end) for end in ends]
        if not (isinstance(error, (int, float)) and 0 < error < 1):
            raise InputError(f"error must be a number between 0 and 1, got {error!r}")
        if cap is not None and not 0 < cap < math.inf:
            raise InputError(f"cap must be a finite number above 0, got {cap!r}")
        if self.cost.ndim != 1 or not np.isfinite(self.cost).all() or (self.cost < 0).any():
            raise InputError("cost must be finite numbers of at least 0, one for each head")
        if sorted(set(self.ends)) != self.ends or self.ends[-1:] != [self.prompts]:
            raise InputError(f"ends must rise to the number of prompts, {self.prompts}, got {self.ends}")
        self._bound = _Spread() if cap is None else _Capped(float(cap), signed)
        self.bound, self.about = self._bound.name, self._bound.about

    @property
    def alpha(self) -> float:
        """The chance with which one head may wrongly seem better than another, in one round."""
        others, looks = self.cost.size - self.k, len(self.ends) - 1
        if others <= 0 or looks == 0:
            return 1.0
        return self.error / (looks * others * sum(1 / j for j in range(1, self.k + 1)))

    def alive(self, scores: np.ndarray) -> np.ndarray:
        """bool [N]: which heads may still belong to the top k. scores: float64 [n, N] in the order seen, n one of `ends`, NaN from
        where a head was dropped on. With all prompts seen these are the top k, and heads that tie with its last."""
        scores = self._checked(scores)
        alive = ~np.isnan(scores).any(axis=0)
        inside = np.flatnonzero(alive)
        if inside.size <= self.k:
            return alive
        x = scores[:, inside]
        if len(x) == self.prompts:
            size, slack = self._size(x), 4 * len(x) * np.finfo(np.float64).eps * np.abs(x).mean(axis=0)
            alive[inside] = size + slack >= np.sort(size - slack)[-self.k]
        else:
            alive[inside] = ~self._behind(x)
        return alive

    def upper(self, scores: np.ndarray) -> np.ndarray:
        """float64 [N]: an upper bound on each head's mean over all prompts (on its size, where signed); what was measured for a head
        seen on all, inf for one that was not seen up to the end of a round. scores as for `alive`.

        All hold together with a chance of 1 - error, beside that of a top k that did not survive. Where at least k heads are known
        exactly, no bound is above the k-th largest mean: a head that was dropped has a smaller one.
        """
        scores = self._checked(scores)
        seen = (~np.isnan(scores)).sum(axis=0)
        out = np.full(seen.size, np.inf)
        alpha = self.error / (max(1, len(self.ends) - 1) * max(1, seen.size) * (2 if self.signed else 1))
        for n in self.ends[:-1]:
            at = seen == n
            x = scores[:n, at]
            # Lower bounds on the mean of -x, and of x where the mean may be negative.
            out_far = -_standing_out(x, 1)
            signs = [1, -1] if self.signed else [1]
            bounds = [-self._bound.lower(sign * -x, out_far, alpha, self.prompts) for sign in signs]
            out[at] = np.max(bounds, axis=0)
        known = seen == self.prompts
        if known.any():
            out[known] = self._size(scores[:, known])
        if known.sum() >= self.k:
            out[~known] = np.minimum(out[~known], np.sort(out[known])[-self.k])
        return out

    def share(self, scores: np.ndarray) -> float:
        """Which share of the work of scoring every head on every prompt was done, by cost. scores as for `alive`."""
        seen = (~np.isnan(scores)).sum(axis=0)
        return float((seen * self.cost).sum() / (self.cost.sum() * self.prompts)) if self.cost.any() else 1.0

    def _checked(self, scores: np.ndarray) -> np.ndarray:
        scores = np.asarray(scores, np.float64)
        if scores.ndim != 2 or scores.shape[1] != self.cost.size or len(scores) not in self.ends:
            raise InputError(
                f"scores must be [n, {self.cost.size}] with n one of {self.ends}, got shape {list(scores.shape)}"
            )
        if np.isinf(scores).any():
            raise InputError("scores must be finite, or NaN for heads that were dropped")
        if self.cap is not None:
            known = scores[~np.isnan(scores)]
            if (known > self.cap).any() or (known < (-self.cap if self.signed else 0)).any():
                raise InputError(f"scores are beyond the cap of {self.cap}")
        return scores

    def _size(self, x: np.ndarray) -> np.ndarray:
        """What heads are ranked by, the same in any order of prompts."""
        mean = np.sort(x, axis=0).mean(axis=0)
        return np.abs(mean) if self.signed else mean

    def _behind(self, x: np.ndarray) -> np.ndarray:
        """bool [A]: of heads x [n, A], those that k of the leaders are surely better than."""
        mean = x.mean(axis=0)
        size, far = (np.abs(mean) if self.signed else mean), _standing_out(x, PRONE)
        leaders = np.argsort(-size, kind="stable")[: LEADERS * self.k]
        better = np.zeros(x.shape[1], np.int64)
        for done, g in enumerate(leaders):
            open_ = np.flatnonzero((better < self.k) & (better + len(leaders) - done >= self.k))
            lead, others = x[:, [g]], x[:, open_]
            if self.signed:
                # Whatever the sign of the other head's mean; that of the leader's own is taken from what was seen.
                lead, alpha = np.sign(mean[g]) * lead, self.alpha / 2
                against = [lead - others, lead + others]
            else:
                against, alpha = [lead - others], self.alpha
            bounds = [self._bound.lower(d, size[g] - far[open_], alpha, self.prompts) for d in against]
            better[open_] += np.min(bounds, axis=0) > 0
        return better >= self.k


def _standing_out(x: np.ndarray, which: float) -> np.ndarray:
    """float64 [N]: a score as far above each head's mean size as the most outstanding of x [n, N] is in other heads; which: the quantile
    of heads, 1 for the one where it stands out most."""
    size = np.abs(x)
    mean = size.mean(axis=0)
    times = np.divide(size.max(axis=0), mean, out=np.ones_like(mean), where=mean > 0)
    return np.quantile(times, which) * mean if times.size else mean


class _Spread:
    """By the spread of what was seen: Student's t, its skewness corrected, with the finite population's factor."""

    name = "studentised"
    about = (
        "This chance is an estimate (Student's t, corrected for skewness) and no guarantee: it can be wrong where a few prompts that were not "
        "seen yet make most of a head's mean."
    )

    def lower(self, d: np.ndarray, further: np.ndarray, alpha: float, prompts: int) -> np.ndarray:
        """float64 [N]: lower bounds on the means over all prompts of d [n, N], each wrong with a chance of about alpha. further: what
        one more prompt might give.

        With m, s, g the mean, standard deviation and skewness of d, f = n / P and a = g / sqrt(n (1 - f)), Student's
        T = (m - mean) / (s sqrt((1 - f) / n)) is to first order z - a ((2 - f) z^2 + 1 - 2 f) / 6 for a normal z: where few large
        values make the mean, a sample without them has a small mean and a small spread. So z is taken as
        T + c T^2 + c^2 T^3 / 3 + b, c = a (2 - f) / 6, b = a (1 - 2 f) / 6, which rises with T (Hall, JRSS B 54, 1992, with the terms
        of samples without replacement), and held against the quantile of t with n - 1 degrees of freedom.

        One more prompt is added on which d is the least that was seen, or 0, or `further`: equal scores on a few prompts prove
        nothing, and prompts that make a head may be among those not seen yet.
        """
        n, f = len(d), len(d) / prompts
        d = np.vstack([d, np.minimum.reduce([d.min(axis=0), np.zeros(d.shape[1]), further])])
        mean = d.mean(axis=0)
        off = d - mean
        squares = off * off
        variance = squares.mean(axis=0)
        error = np.sqrt(variance / n * (1 - f))  # n + 1 values: variance (n + 1) / n over n + 1
        cubed = variance * np.sqrt(variance)
        skewness = np.divide((squares * off).mean(axis=0), cubed, out=np.zeros_like(mean), where=cubed > 0)
        a = skewness / math.sqrt((n + 1) * (1 - f))
        c, quantile = a * (2 - f) / 6, -stdtrit(n - 1, alpha) - a * (1 - 2 * f) / 6
        straight = np.abs(c) < 1e-6
        bent = np.divide(np.cbrt(1 + 3 * c * quantile) - 1, c, out=np.zeros_like(c), where=~straight)
        return mean - np.where(straight, quantile, bent) * error


class _Capped:
    """By the cap alone: what always holds."""

    name = "Serfling"
    about = (
        "No score is above the cap: Serfling's and the empirical Bernstein-Serfling inequality for sampling without replacement, which "
        "always hold."
    )

    def __init__(self, cap: float, signed: bool) -> None:
        self.width = 4 * cap if signed else 2 * cap  # of the range of a difference of two scores
        self.least = -self.width / 2

    def lower(self, d: np.ndarray, further: np.ndarray, alpha: float, prompts: int) -> np.ndarray:
        """float64 [N]: lower bounds on the means over all prompts of d [n, N], each wrong with a chance of alpha at most: the best of
        what is certain, as no score that was not seen is below the least, and with half of alpha each (Bardenet & Maillard,
        Bernoulli 21, 2015) of Serfling's inequality, m - w sqrt((1 - (n - 1) / P) ln(1 / alpha) / (2 n)), and of their empirical
        Bernstein-Serfling inequality, m - s sqrt(2 r ln(5 / alpha) / n) - (7/3 + 3 / sqrt 2) w ln(5 / alpha) / n. w is the width of the
        range, r = 1 - (n - 1) / P up to n = P / 2 and (1 - n / P)(1 + 1 / n) beyond.
        """
        n, p, width = len(d), prompts, self.width
        mean, spread = d.mean(axis=0), d.std(axis=0)
        certain = (d.sum(axis=0) + (p - n) * self.least) / p
        serfling = mean - width * math.sqrt((1 - (n - 1) / p) * math.log(2 / alpha) / (2 * n))
        r = 1 - (n - 1) / p if n <= p / 2 else (1 - n / p) * (1 + 1 / n)
        logarithm = math.log(10 / alpha)
        bernstein = (
            mean
            - spread * math.sqrt(2 * r * logarithm / n)
            - (7 / 3 + 3 / math.sqrt(2)) * width * logarithm / n
        )
        return np.max([certain, serfling, bernstein], axis=0)


@dataclass(frozen=True)
class Rehearsal:
    """Races over known scores, in many orders of the prompts: see `rehearse`.

    whole   share of the orders in which the top k survived whole
    share   float64 [orders], the share of the work that was done
    """

    whole: float
    share: np.ndarray


def rehearse(
    scores: np.ndarray,
    k: int,
    error: float,
    cost: np.ndarray,
    *,
    cap: float | None = None,
    signed: bool = False,
    orders: int = 100,
    seed: int = 0,
) -> Rehearsal:
    """What a race does with scores float64 [P, N] that are known: how often it keeps the top k, and at what share of the work.

    Where means tie at the k-th place, any of them will do.
    """
    scores = np.asarray(scores, np.float64)
    race = Race(len(scores), k, error, cost, cap=cap, signed=signed)
    size = race._size(scores)
    least = np.sort(size)[-min(k, size.size)]
    sure, enough = size > least, min(k, size.size)
    whole, shares = 0, []
    for order in _orders(len(scores), orders, seed):
        seen = scores[order]
        alive = np.ones(size.size, bool)
        for end in race.ends:
            alive &= race.alive(seen[:end])
            seen[end:, ~alive] = np.nan
        whole += bool(alive[sure].all() and alive[size >= least].sum() >= enough)
        shares.append(race.share(seen))
    return Rehearsal(whole / orders, np.array(shares))


def _orders(prompts: int, orders: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(whole_number("orders", orders)):
        yield rng.permutation(prompts)
