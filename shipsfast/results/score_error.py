"""How far scores are off: a seeded sample of them, computed again by plain forward passes in a wider dtype.

Error of a score s with rescored value t: |s - t|, and |s - t| / |t|. Some rescored heads are those that the ranking names
first; the others are drawn, every score with the same chance, and quantiles are of these.

Noise floor: the larger of
    what packing alone does: the score between the packed and the plain unablated model, which would be 0
    the largest error of the m smaller ones of the drawn scores, m half of them, rounded up.
Errors grow with the score: KL is quadratic near 0, so that rounding e of the logits moves a score s by about
e^2 + 2 e sqrt(s). Errors of large scores say nothing of how far a head that does nothing is from 0; those of the smaller half
are at least as large as its error. The error of one more such score exceeds the largest of m with probability 1 / (m + 1).
A head's mean is off by no more than its scores are on average, so a head above the floor does something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .statistics import or_none

QUANTILES = {"median": 0.5, "p90": 0.9, "max": 1.0}
LEAST_FOR_P90 = 9  # draws; of fewer, nine tenths are expected within none


class Rescored(NamedTuple):
    """A score and what it is in the wider dtype. drawn: at random; else one of a head that the ranking names first, which
    is in the largest error only. prompt and step: where there are any."""

    layer: int
    head: int
    score: float
    expected: float
    drawn: bool
    prompt: int | None = None
    step: int | None = None

    @property
    def error(self) -> float:
        return abs(self.score - self.expected)


@dataclass(frozen=True)
class ScoreError:
    """The error of scores, as far as it was measured.

    rescored: the sample; against: the dtype that it was computed again in; reason: why that is no wider one, "" where it is;
    packing: the score between the packed and the plain unablated model; plain_max_abs: how far the two scores that every
    scan computes again by plain passes in its own dtype are off, None where nobody knows; own: that dtype.
    """

    rescored: tuple[Rescored, ...] = ()
    against: str = ""
    reason: str = ""
    packing: float = 0.0
    plain_max_abs: float | None = None
    own: str = ""

    @property
    def measured(self) -> bool:
        """Whether against a wider dtype."""
        return bool(self.rescored) and not self.reason

    def settles(self, asked: int) -> bool:
        """Whether a run that goes on, and is asked to rescore so many, has nothing to measure again."""
        return not asked or self.against not in ("", self.own)

    @property
    def absolute(self) -> dict[str, float]:
        """median, p90 and max of the errors, in the unit of the scores; NaN where too few were drawn."""
        return self._quantiles(lambda x: x.error)

    @property
    def relative(self) -> dict[str, float]:
        """The same of errors as parts of the rescored value."""
        return self._quantiles(lambda x: x.error / abs(x.expected) if x.expected else np.nan)

    def _quantiles(self, value) -> dict[str, float]:
        """Of those drawn, and the largest of all. Another score is within the k-th of n draws with probability k / (n + 1)
        (Weibull's plotting positions); linear interpolation would promise more than small samples hold."""
        found = {}
        for name, at in QUANTILES.items():
            values = np.array([value(x) for x in self.rescored if x.drawn or at == 1])
            values = values[~np.isnan(values)]
            enough = values.size >= (LEAST_FOR_P90 if name == "p90" else 1)
            found[name] = float(np.quantile(values, at, method="weibull")) if enough else np.nan
        return found

    @property
    def smaller(self) -> list[Rescored]:
        """The smaller half of those drawn."""
        drawn = sorted((x for x in self.rescored if x.drawn), key=lambda x: abs(x.score))
        return drawn[: -(-len(drawn) // 2)]

    @property
    def floor(self) -> float:
        """The noise floor: see above."""
        return max([self.packing, *(x.error for x in self.smaller)])

    def lines(self, unit: str, score: str = "a score") -> list[str]:
        """It in words. unit: of the scores, "" for none; score: what they are."""
        unit, out = f" {unit}" if unit else "", []
        if not self.measured:
            out.append(
                f"the error against higher precision was not measured: {self.reason}; the noise floor has what packing and "
                f"batching round, and not what {self.own or 'the dtype'} does"
            )
        if self.rescored:
            said = ", ".join(
                f"{word} {absolute:.2g}{unit}{percent(relative)}"
                for word, absolute, relative in zip(
                    ("median", "90 % within", "largest"),
                    self.absolute.values(),
                    self.relative.values(),
                    strict=True,
                )
                if not np.isnan(absolute)
            )
            what = f"error of {score}, against" if self.measured else f"{score} differs from plain passes in"
            out.append(f"{what} {self.against}: {said}; {len(self.rescored)} rescored")
        plain = f"packing moves the unablated model by {self.packing:.2g}{unit}"
        if self.plain_max_abs is not None:
            plain += f"; scores and plain passes in {self.own} differ by {self.plain_max_abs:.2g}{unit} or less where checked"
        return [*out, plain]

    def __str__(self) -> str:
        return "; ".join(self.lines(""))

    def note(self) -> str:
        """In a few words, for plots."""
        if not self.measured:
            return f"error of scores not measured: {self.reason}" if self.reason else ""
        middle, most = self.relative["median"], self.relative["max"]
        if np.isnan(middle):
            return ""
        return f"error of a score against {self.against}: median {share(middle)}, largest {share(most)}"

    def to_json(self) -> dict:
        """For run.json, and for a program to read."""
        return {
            "against": self.against,
            "reason": self.reason,
            "own": self.own,
            "packing": self.packing,
            "plain_max_abs": self.plain_max_abs,
            "absolute": {name: or_none(x) for name, x in self.absolute.items()},
            "relative": {name: or_none(x) for name, x in self.relative.items()},
            "smaller": len(self.smaller),
            "floor": self.floor,
            "rescored": [
                {name: x for name, x in each._asdict().items() if x is not None} for each in self.rescored
            ],
        }

    @classmethod
    def from_json(cls, body: dict) -> ScoreError:
        own = {name: body[name] for name in ("against", "reason", "packing", "plain_max_abs", "own")}
        return cls(tuple(Rescored(**each) for each in body["rescored"]), **own)


def percent(part: float) -> str:
    """ " (1.3 %)", " (8e-05 of it)"; nothing where it is not known."""
    return "" if np.isnan(part) else f" ({share(part)})"


def share(part: float) -> str:
    """A share of a score: "1.3 %", "240 %", "8e-05 of it"."""
    if part < 1e-3 and part != 0:
        return f"{part:.1g} of it"
    return f"{100 * part:,.0f} %" if part >= 1 else f"{100 * part:.2g} %"
