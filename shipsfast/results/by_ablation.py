"""What a result of several ablations offers beside what one has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .dose import Dose, doses_of
from .several import TOP, Agreement, Several, names_of
from .sink_mass import SinkMass

if TYPE_CHECKING:
    from .ships import ShipsResult


class ByAblation:
    """A result is the first ablation's; `further` has those of the others, in the order in which they were given."""

    further: tuple[ShipsResult, ...]
    also: dict[str, ShipsResult]
    record: dict
    control: ShipsResult | None

    @property
    def by_ablation(self) -> dict[str, ShipsResult]:
        """Every ablation's result: by its kind, or by kind and eps where a kind was scanned at several."""
        results = [replace(self, further=()), *self.further]
        if self.control is not None:  # of the control prompts there are as many
            controls = [replace(self.control, further=()), *self.control.further]
            results = [
                replace(each, control=control) for each, control in zip_longest(results, controls) if each
            ]
        return dict(zip(names_of(results), results, strict=True))

    def with_further(self, further: Sequence[ShipsResult]) -> ShipsResult:
        """The same with the results of further ablations, each with the same further metrics, which are compared too."""
        also = {
            name: replace(other, further=tuple(each.also[name] for each in further if name in each.also))
            for name, other in self.also.items()
        }
        return replace(self, also=also, further=tuple(further))

    @property
    def sink_mass(self) -> SinkMass | None:
        """How far heads rest on the first token, where the scan measured it: scans of several ablations do."""
        return SinkMass.from_json(self.record["sink_mass"]) if "sink_mass" in self.record else None

    @property
    def several(self) -> Several:
        """The comparison of all ablations: table, ranks, plot."""
        return Several(self.by_ablation, self.sink_mass)

    def agreement(self, k: int = TOP) -> list[Agreement]:
        """How far the rankings agree, for every pair of ablations; none where there is one."""
        return self.several.agreement(k)

    @property
    def doses(self) -> dict[str, Dose]:
        """By kind, of those that were scanned at several eps."""
        return doses_of(self.by_ablation)

    @property
    def dose(self) -> np.ndarray:
        """Mean scores at each eps, float64 [E, L, H], in the order in which they were given. Raises InputError unless one kind was
        scanned at several."""
        return self._one_dose().mean

    @property
    def scales(self) -> np.ndarray:
        """The eps of `dose`, [E]."""
        return self._one_dose().scales

    def plot_dose(self, path: str | Path | None = None, *, k: int = 5, title: str | None = None):
        """Scores and ranks of the top heads against eps; see `Dose.plot`."""
        return self._one_dose().plot(path, k=k, title=title)

    def _one_dose(self) -> Dose:
        found = self.doses
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise InputError(f"{' and '.join(found)} were scanned at several eps: .doses has each")
        raise InputError(
            "no ablation was scanned at several eps: give undifferentiated or scale, and scale=[...] (--scale more than once)"
        )
