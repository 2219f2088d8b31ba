"""Dose and response: the scores of one kind of ablation at several eps. Does the ranking hang on eps?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .several import TOP, Agreement, Several

if TYPE_CHECKING:
    import pandas as pd

    from .ships import ShipsResult

FACTORS = {"undifferentiated": "logit_scale", "scale": "output_scale"}  # which factor is the eps


@dataclass(frozen=True, eq=False)
class Dose:
    """One kind of ablation at E scales. kind: which; scales: [E], as they were given; names, results: of each."""

    kind: str
    scales: np.ndarray
    results: Mapping[str, ShipsResult]

    @property
    def mean(self) -> np.ndarray:
        """Mean scores, float64 [E, L, H]."""
        return np.stack([result.mean() for result in self.results.values()])

    @property
    def ranks(self) -> np.ndarray:
        """float64 [E, L, H]: 1 is the top."""
        return np.stack(list(Several(self.results).ranks.values()))

    @property
    def heads(self) -> int:
        """With a score at every eps; 0 in a run that was not finished."""
        return Several(self.results).heads

    def neighbours(self, k: int = TOP) -> list[Agreement]:
        """How far the rankings of neighbouring eps agree, from the smallest eps to the largest; none without heads."""
        if not self.heads:
            return []
        names = list(self.results)
        order = [names[at] for at in np.argsort(self.scales, kind="stable")]
        return [
            Several({name: self.results[name] for name in pair}).agreement(k)[0] for pair in pairwise(order)
        ]

    def to_pandas(self) -> pd.DataFrame:
        """One row per eps and head: scale, layer, head, score, rank."""
        import pandas as pd

        mean = self.mean
        at, layer, head = np.indices(mean.shape).reshape(3, -1)
        return pd.DataFrame(
            {
                "scale": self.scales[at],
                "layer": layer,
                "head": head,
                "score": mean.ravel(),
                "rank": self.ranks.ravel(),
            }
        )

    def to_json(self, k: int = TOP) -> dict:
        return {
            "kind": self.kind,
            "scales": self.scales.tolist(),
            "neighbours": [each.to_json() for each in self.neighbours(k)],
        }

    def plot(self, path: str | Path | None = None, *, k: int = 5, title: str | None = None):
        """Score and rank of the heads that are in the top k at some eps, against eps. Returns the matplotlib Figure; saved if a
        path is given."""
        from .curves import against_dose

        several, mean, ranks = Several(self.results), self.mean, self.ranks
        heads = several.top(k)
        order = np.argsort(self.scales, kind="stable")
        scores = {at: mean[(order, *at)] for at in heads}
        places = {at: ranks[(order, *at)] for at in heads}
        alike = [each.spearman for each in self.neighbours(k)]
        first = next(iter(self.results.values()))
        title = title or f"{self.kind}, {len(order)} eps, means of {first.scores.shape[0]} prompts"
        return against_dose(
            self.scales[order], scores, places, alike, first.label, several.heads, title, path
        )


def doses_of(by_ablation: Mapping[str, ShipsResult]) -> dict[str, Dose]:
    """By kind, of the kinds that were scanned at several eps; those of heads that are off at the end only apart."""
    found = {}
    for kind, factor in FACTORS.items():
        for at, name in (("all", kind), ("end", f"{kind} at the end")):
            own = {
                key: result
                for key, result in by_ablation.items()
                if (how := result.identity.get("ablation", {})).get("kind") == kind
                and how.get("at", "all") == at
            }
            scales = [result.identity["ablation"][factor] for result in own.values()]
            if len(set(scales)) > 1:
                found[name] = Dose(name, np.array(scales, dtype=np.float64), own)
    return found
