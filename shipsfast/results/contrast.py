"""Which heads matter more on one set of prompts than on another: two scans of one model, held against each other.

A head that moves the answers to harmful prompts far may move all answers far: it carries speech, not safety. What tells is how
much further it moves them than it moves those to ordinary prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import false_discovery_control

from ..errors import InputError
from ..runs.identity import in_words, wrapping_apart
from ..text import counted
from .bootstrap import checked_scores
from .equality import Compared
from .head_map import LABELLED, HeadScore, ranked
from .load import load
from .ships import ShipsResult
from .statistics import above_noise, or_none
from .two_samples import PERMUTATIONS, PermutationTest, auroc, hedges_g, permutation_test

if TYPE_CHECKING:
    import pandas as pd

Q = 0.05  # of heads called significant, the share that may be so by chance
OF_EACH_PROMPT = {
    "answer_tokens": "answers",
    "read_at": "positions",
}  # only whether they are given must agree
OF_THE_PROMPTS = (
    "prompts",
    "shape",
    "further_metrics",
    "further_ablations",
    "control",
)  # of an identity: what two scans may differ in
ORDERS = ("difference", "auroc", "hedges_g")


@dataclass(repr=False, eq=False)
class ContrastResult(Compared):
    """Two scans of one model, over prompts a and prompts b, head by head. All maps are float64 [L, H], NaN for heads not
    scanned, and for heads with a marked score in one of the two.

    a, b: the two `ShipsResult`s.
    auroc: P(x > y) + P(x = y) / 2 of the head's score x on a prompt of a and y on one of b: 0.5 tells nothing apart.
    hedges_g: the effect size, Hedges' g: the difference of the means in pooled standard deviations, without the bias of small
        samples; NaN where no score varies.
    p: p-values of `permutation_test` (results/two_samples.py), which relabels the prompts; q: the same after Benjamini and
        Hochberg, over all heads that have one.
    alternative, statistic, seed: as they were asked for; exact: were all relabellings looked at; relabellings: how many were;
        least_p: the smallest p-value that so many can give.
    warnings: what to know before it is believed.
    also: the contrasts of further metrics that both scans measured, by their names.
    """

    a: ShipsResult
    b: ShipsResult
    auroc: np.ndarray
    hedges_g: np.ndarray
    p: np.ndarray
    q: np.ndarray
    alternative: str
    statistic: str
    seed: int
    exact: bool
    relabellings: int
    least_p: float
    warnings: list[str] = field(default_factory=list)
    also: dict[str, ContrastResult] = field(default_factory=dict)

    def __repr__(self) -> str:
        top = ", ".join(f"{s.layer}-{s.head} {s.score:.4g}" for s in self.top(LABELLED))
        sizes = " and ".join(counted(len(each.scores), "prompt") for each in (self.a, self.b))
        return f"ContrastResult({sizes}, {len(self.significant())} heads with q <= {Q}, top: {top})"

    @property
    def mean_a(self) -> np.ndarray:
        return self.a.mean()

    @property
    def mean_b(self) -> np.ndarray:
        return self.b.mean()

    @property
    def difference(self) -> np.ndarray:
        """mean_a less mean_b, in the unit of the scores."""
        return self.mean_a - self.mean_b

    @property
    def cliffs_delta(self) -> np.ndarray:
        """P(x > y) - P(x < y), from -1 to 1: 2 AUROC - 1."""
        return 2 * self.auroc - 1

    @property
    def metric(self) -> dict:
        return self.a.metric

    @property
    def unit(self) -> str:
        return self.a.unit

    @property
    def noise_floor(self) -> float:
        """What rounding alone may make of a difference: the noise floors of both. 0 for rates, whose floor is another thing."""
        return 0.0 if self.a.is_rate else self.a.noise_floor + self.b.noise_floor

    def above_noise(self) -> np.ndarray:
        """bool [L, H]: heads whose difference is larger than what rounding alone may make of it."""
        return above_noise(self.difference, self.noise_floor)

    def is_significant(self, q: float = Q) -> np.ndarray:
        """bool [L, H]: q-value at most q, and a difference above the noise floor."""
        if not 0 < q <= 1:
            raise InputError(f"q must be above 0 and at most 1, got {q!r}")
        return (self.q <= q) & self.above_noise()

    def significant(self, q: float = Q) -> list[HeadScore]:
        """The heads that differ beyond chance and rounding, in the order of `top`: of them a share of q is expected to be there
        by chance."""
        chosen = self.is_significant(q)
        return [s for s in self.top(self.p.size) if chosen[s.layer, s.head]]

    def top(self, k: int = 10, by: str = "difference") -> list[HeadScore]:
        """The k heads that matter most more on a than on b (for the alternative "less" on b than on a, for "two-sided" either
        way), by "difference" of the means, "auroc" or "hedges_g". Ties go to the lower (layer, head)."""
        if by not in ORDERS:
            raise InputError(f"by must be one of {', '.join(ORDERS)}, got {by!r}")
        values = getattr(self, by)
        return [
            s._replace(score=float(values[s[:2]])) for s in self._ranked(values - 0.5 * (by == "auroc"))[:k]
        ]

    def _ranked(self, values: np.ndarray) -> list[HeadScore]:
        """values: 0 where there is no difference."""
        toward = -values if self.alternative == "less" else values
        return ranked(toward, values.size, signed=self.alternative == "two-sided")

    @property
    def rank(self) -> np.ndarray:
        """Place of each head by difference, 1 the first, in the order of `top`."""
        return _places(self._ranked(self.difference), self.p.shape)

    @property
    def rank_a(self) -> np.ndarray:
        """Place of each head in the ranking of a alone."""
        return _places(self.a.top(self.p.size), self.p.shape)

    @property
    def marked_heads(self) -> list[tuple[int, int]]:
        """Heads with a marked score in one of the two, which are left out."""
        return sorted({*self.a.marked_heads, *self.b.marked_heads})

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All that is known of each head, [L, H], by name."""
        names = ("mean_a", "mean_b", "difference", "auroc", "hedges_g", "p", "q", "rank", "rank_a")
        return {name: getattr(self, name) for name in names}

    def to_pandas(self) -> pd.DataFrame:
        """One row per head that is compared: layer, head, mean_a, mean_b, difference, auroc, hedges_g, p, q, rank, rank_a and
        significant (at q 0.05)."""
        import pandas as pd

        at = np.nonzero(~np.isnan(self.p))
        frame = pd.DataFrame({"layer": at[0], "head": at[1]} | {k: x[at] for k, x in self.columns.items()})
        whole = {"rank": int, "rank_a": int}
        return frame.astype(whole).assign(significant=self.is_significant()[at])

    def as_json(self, top: int) -> dict:
        """What a program reads of it: the top heads, how they were compared, and of what."""
        record, columns, chosen = self.a.record, self.columns, self.is_significant()
        return {
            "model": record.get("model"),
            "ablation": record.get("ablation"),
            "metric": self.metric,
            "unit": self.unit,
            "prompts": {"a": len(self.a.scores), "b": len(self.b.scores)},
            "prompts_from": {"a": record.get("prompts_from"), "b": self.b.record.get("prompts_from")},
            "heads": int((~np.isnan(self.p)).sum()),
            "marked_heads": [list(head) for head in self.marked_heads],
            "noise_floor": self.noise_floor,
            "test": {
                "name": "permutation of the prompts' labels", "statistic": self.statistic, "alternative": self.alternative,
                "exact": self.exact, "relabellings": self.relabellings, "least_p": self.least_p, "seed": self.seed,
                "q": "Benjamini-Hochberg",
            },
            "effect_size": "Hedges' g",
            "significant": {"q": Q, "heads": [list(s[:2]) for s in self.significant()]},
            "top": [
                {"layer": s.layer, "head": s.head}
                | {k: or_none(x[s[:2]], int if k.startswith("rank") else float) for k, x in columns.items()}
                | {"significant": bool(chosen[s[:2]])}
                for s in self.top(top)
            ],
            "warnings": self.warnings,
            **({"also": {name: each.as_json(top) for name, each in self.also.items()}} if self.also else {}),
        }  # fmt: skip

    def show(self, top: int, console) -> None:
        """Print the top heads, and what tells them from chance; and the same of further metrics."""
        from .tables import show_contrast

        show_contrast(self, top, console)

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Maps of the two means on one scale, and of their difference. Returns the matplotlib Figure; saved if a path is
        given."""
        from .plots import Panel, contrast_maps

        known = ~np.isnan(self.p)
        sizes = [counted(len(each.scores), "prompt") for each in (self.a, self.b)]
        both = [
            each.panel(title=f"{name}: mean of {size}")
            for name, each, size in zip("ab", (self.a, self.b), sizes, strict=True)
        ]
        apart = Panel(
            self.difference, self.unit, f"a less b: {self.a.label}", ~self.is_significant() & known,
            f"dot: q above {Q}, or within noise", self.significant()[:LABELLED], "a less b", signed=True,
        )  # fmt: skip
        name = title or f"Contrast of {sizes[0]} with {sizes[1]}, {self.found()}"
        ablation = self.a.record.get("ablation")
        return contrast_maps(*both, apart, f"{name}\nablation: {ablation}" if ablation else name, path)

    @property
    def statistic_name(self) -> str:
        return {"auroc": "AUROC", "difference": "difference of means"}[self.statistic]

    def found(self) -> str:
        """How many heads are significant, in words."""
        of = counted(int((~np.isnan(self.p)).sum()), self.unit)
        return f"{len(self.significant())} of {of} with q at most {Q}"


def _places(order: list[HeadScore], shape: tuple[int, ...]) -> np.ndarray:
    out = np.full(shape, np.nan)
    for place, score in enumerate(order, 1):
        out[score.layer, score.head] = place
    return out


def contrast(
    a: ShipsResult | str | Path,
    b: ShipsResult | str | Path | None = None,
    *,
    alternative: str | None = None,
    statistic: str = "auroc",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> ContrastResult:
    """Which heads matter more on the prompts of a than on those of b?

    a, b: two `ShipsResult`s of one measurement over two sets of prompts, such as harmful and ordinary ones, or their run
        folders. b may be left out where a was scanned with a control.
    alternative: "greater" asks where scores are larger on a, "less" where on b, "two-sided" where they differ; default two-sided
        for metrics with a sign, of which a large negative score is no small one, and greater for others.
    statistic: what the permutation test goes by: "auroc", which is the test of Mann and Whitney, or "difference" of the means.
    permutations: relabellings of the prompts that are drawn, with seed; all there are, where they are no more.

    Raises InputError, naming what differs, for results that are not of one model, ablation, metric, unit and heads; for a scan
    that is not finished, for fewer than two prompts, and for two times the same prompts.
    """
    first, where_a = _scan(a, "a")
    if b is None and first.control is None:
        raise InputError(
            f"{where_a} has no control: give a second scan, over other prompts, to hold it against"
        )
    second, where_b = (first.control, f"the control of {where_a}") if b is None else _scan(b, "b")
    _check_alike(first, second, where_a, where_b)
    left_out = [each.marked.any(axis=0) for each in (first, second) if each.marked is not None]
    samples = [_sample(each, where, left_out) for each, where in ((first, where_a), (second, where_b))]
    known, other = (~np.isnan(each[0]) for each in samples)
    if (known != other).any():
        layer, head = np.argwhere(known != other)[0]
        raise InputError(
            f"head {layer}-{head} has scores in one of {where_a} and {where_b} only: scan both alike"
        )
    x, y = (each[:, known] for each in samples)  # [P, N], [Q, N]
    asked, alternative = alternative, alternative or ("two-sided" if first.signed else "greater")
    test = permutation_test(x, y, statistic, alternative, permutations, seed)
    maps = [
        _grid(values, known)
        for values in (auroc(x, y), hedges_g(x, y), test.p, false_discovery_control(test.p))
    ]
    settings = {"alternative": alternative, "statistic": statistic, "seed": seed}
    result = ContrastResult(
        first, second, *maps, **settings, exact=test.exact, relabellings=test.relabellings, least_p=test.least,
    )  # fmt: skip
    result.warnings = list(_warnings(first, second, test))
    for name in first.also:
        if name in second.also:
            both = first.also[name], second.also[name]
            result.also[name] = contrast(
                *both, permutations=permutations, **settings | {"alternative": asked}
            )
    return result


def _scan(given: ShipsResult | str | Path, name: str) -> tuple[ShipsResult, str]:
    """The result, and what messages call it."""
    where = str(given) if isinstance(given, (str, Path)) else name
    result = load(given) if isinstance(given, (str, Path)) else given
    if not isinstance(result, ShipsResult):
        raise InputError(
            f"contrast takes two scans with scores for each prompt (ShipsResult, or their run folders): {where} is a "
            f"{type(result).__name__}"
        )
    if result.record.get("status") not in (None, "complete"):
        raise InputError(f"{where} is a scan that is not finished: run it again to continue")
    if len(result.scores) < 2:
        raise InputError(
            f"{where} has one prompt: contrast tells sets of prompts apart, give at least two of each"
        )
    return result, where


def _check_alike(a: ShipsResult, b: ShipsResult, where_a: str, where_b: str) -> None:
    """Raises InputError unless the two are one measurement over two sets of prompts."""
    there, here = map(_measured, (a, b))
    differs = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differs:
        words = in_words(differs, there, here, a.record, b.record)
        raise InputError(
            f"contrast needs one measurement over two sets of prompts, and {where_a} (there) and {where_b} (here) differ in "
            f"{', '.join(differs)}: {words}; scan both sets alike"
        )
    if a.scores.shape[1:] != b.scores.shape[1:]:
        shapes = " and ".join(str(list(each.scores.shape[1:])) for each in (a, b))
        raise InputError(f"{where_a} and {where_b} have maps of different shapes: {shapes}")
    prompts = [sorted(each.identity.get("prompts", [])) for each in (a, b)]
    if prompts[0] and prompts[0] == prompts[1]:
        raise InputError(
            f"{where_a} and {where_b} are scans of the same prompts: there is nothing to hold apart"
        )


def _measured(result: ShipsResult) -> dict:
    """Of its identity what does not belong to the prompts."""
    given = {said: "given" for name, said in OF_EACH_PROMPT.items() if name in result.identity}
    left_out = (*OF_THE_PROMPTS, *OF_EACH_PROMPT)
    kept = {k: x for k, x in result.identity.items() if k not in left_out} | given
    how = kept.get("ablation", {})
    if how.get("kind") == "resample" and len(set(how["prompts"])) == 1:  # one prompt for all, however many
        kept["ablation"] = how | {"prompts": how["prompts"][:1]}
    return kept


def _sample(result: ShipsResult, where: str, left_out: list[np.ndarray]) -> np.ndarray:
    """Scores [P, L, H], NaN for heads that are left out."""
    scores = np.array(result.scores)
    for heads in left_out:
        scores[:, heads] = np.nan
    try:
        return checked_scores(scores)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _grid(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    out = np.full(known.shape, np.nan)
    out[known] = values
    return out


def _warnings(a: ShipsResult, b: ShipsResult, test: PermutationTest):
    """What a reader must know before the numbers are believed."""
    both = set(a.identity.get("prompts", [])) & set(b.identity.get("prompts", []))
    if both:
        yield f"{counted(len(both), 'prompt')} in both sets: these cannot tell them apart"
    apart = wrapping_apart(a.record, b.record) if "template" in a.record else []
    if apart:
        yield f"the prompts of a (there) and b (here) are wrapped differently: {'; '.join(apart)}"
    needed = math.ceil(round(test.least * test.p.size / Q, 9))
    if needed > 1:
        remedy = "take more prompts" if test.exact else "take more permutations"
        only = f"heads reach q {Q} only if at least {needed} of {test.p.size} do"
        if needed > test.p.size:
            only = f"no head can reach q {Q}"
        yield (
            f"with {counted(test.relabellings, 'relabelling')} no p-value is below {test.least:.2g}: {only}: {remedy}"
        )
