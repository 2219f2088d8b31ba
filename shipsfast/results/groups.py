"""Scores by group of prompts: the map of each, and whether the groups name the same heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from ..errors import InputError, whole_number
from ..text import counted
from .agreement import RankAgreement, rank_agreement
from .equality import Compared
from .head_map import LABELLED, HeadScore, ranked
from .statistics import above_noise

if TYPE_CHECKING:
    import pandas as pd

    from .ships import ShipsResult

MOST_GROUPS, MOST_CHARS = 100, 80
SHUFFLES = 200


def as_labels(labels: Sequence, prompts: int, what: str = "labels") -> list[str]:
    """The group of each prompt, as text. what: where they are from, for messages.

    Raises InputError for labels that are not one for each prompt, and for what is no name of a group.
    """
    labels = [labels] if isinstance(labels, (str, bytes)) else list(labels)
    if len(labels) != prompts:
        raise InputError(
            f"{what}: expected one for each of {counted(prompts, 'prompt')}, got {len(labels):,}"
        )
    for number, label in enumerate(labels):
        if not isinstance(label, (str, int, np.integer)) or not str(label).strip():
            raise InputError(
                f"{what}: prompt {number} is in the group {label!r}: expected a text or a whole number"
            )
        if len(str(label)) > MOST_CHARS:
            raise InputError(
                f"{what}: prompt {number} has a text of {len(str(label)):,} characters, and a group's name has at most "
                f"{MOST_CHARS}: name a column of short names"
            )
    labels = [str(label).strip() for label in labels]
    if len(set(labels)) > MOST_GROUPS:
        raise InputError(
            f"{what}: {counted(prompts, 'prompt')} fall into {len(set(labels)):,} groups, and {MOST_GROUPS} are the most: "
            "group them by something coarser"
        )
    return labels


def recorded(record: dict) -> tuple[str, list[str]] | None:
    """The column that a run's prompts are grouped by, and the group of each; None where they are not."""
    found = (record.get("prompts_from") or {}).get("group_by")
    return None if found is None else (found["column"], found["labels"])


def labels_of(record: dict, prompts: int, labels: Sequence | None) -> tuple[str, list[str]]:
    """What prompts are grouped by, and the group of each: `labels`, or what the record of a run has.

    Raises InputError where there are none, and as `as_labels` does.
    """
    found = recorded(record) if labels is None else ("group", labels)
    if found is None:
        raise InputError(
            "this run has no groups of prompts in its record: give labels, one for each prompt, or run it with --group-by "
            "COLUMN"
        )
    return found[0], as_labels(found[1], prompts)


@dataclass(repr=False, eq=False)
class GroupedScores(Compared):
    """A scan's scores by group of prompts. Groups are in the order of their names; P prompts, G groups.

    result: the scan; labels: the group of each prompt; column: what they are groups of.
    """

    result: ShipsResult
    labels: list[str]
    column: str = "group"

    @property
    def names(self) -> list[str]:
        """[G]"""
        return sorted(set(self.labels))

    @property
    def prompts(self) -> list[int]:
        """[G], how many are in each."""
        found = Counter(self.labels)
        return [found[name] for name in self.names]

    def mean(self) -> np.ndarray:
        """Mean over each group's prompts, float64 [G, L, H]; NaN for heads without a mean."""
        return _means(self.result.scores, self._places(), len(self.names))

    def _places(self) -> np.ndarray:
        """Of each prompt's group in `names`, [P]."""
        return np.unique(self.labels, return_inverse=True)[1]

    def rank(self) -> np.ndarray:
        """Of each head in each group, float64 [G, L, H]: 1 is the top, by size where scores are signed; ties share the mean
        of their ranks."""
        mean = self.mean()
        keys = -np.abs(mean) if self.result.signed else -mean
        flat = rankdata(keys.reshape(len(mean), -1), axis=1, nan_policy="omit").reshape(mean.shape)
        return np.where(np.isnan(mean), np.nan, flat)

    def top(self, k: int = 10) -> dict[str, list[HeadScore]]:
        """The k first heads of each group."""
        means = zip(self.names, self.mean(), strict=True)
        return {name: ranked(mean, k, self.result.signed) for name, mean in means}

    def agreement(self, k: int = 10, *, shuffles: int = SHUFFLES, seed: int = 0) -> RankAgreement:
        """How far the groups name the same heads: Spearman's correlation over heads, and what the tops of k heads share.

        Few prompts make noisy maps, which differ also where groups do not. So beside each number stands what it is with the
        labels shuffled among the prompts, `shuffles` times: the middle 90 %. Below it, the groups differ.
        Raises InputError where there is one group only.
        """
        rng, places = np.random.default_rng(whole_number("seed", seed, 0)), self._places()
        groups = len(self.names)

        def shuffled() -> Iterator[np.ndarray]:
            for _ in range(whole_number("shuffles", shuffles, 0)):
                yield _means(self.result.scores, rng.permutation(places), groups)

        return rank_agreement(self.mean(), k, signed=self.result.signed, shuffles=shuffled())

    def __repr__(self) -> str:
        heads = ", ".join(
            f"{name} ({number}) {' '.join(f'{s.layer}-{s.head}' for s in top)}"
            for (name, top), number in zip(self.top(LABELLED).items(), self.prompts, strict=True)
        )
        return f"{type(self).__name__}({counted(len(self.names), 'group')} by {self.column}; top: {heads})"

    def to_pandas(self) -> pd.DataFrame:
        """One row per group and head: group, its prompts, layer, head, the mean score, rank."""
        import pandas as pd

        mean, rank = self.mean(), self.rank()
        group, layer, head = np.nonzero(~np.isnan(mean))
        at = (group, layer, head)
        columns = {
            "group": np.array(self.names, dtype=object)[group], "prompts": np.array(self.prompts)[group],
            "layer": layer.astype(np.int32), "head": head.astype(np.int32),
            self.result.score_name: mean[at], "rank": rank[at],
        }  # fmt: skip
        return pd.DataFrame(columns)

    def as_json(self, top: int) -> dict:
        """What a program reads of it."""
        name = self.result.score_name
        groups = [
            {
                "group": group, "prompts": number,
                "top": [{"layer": s.layer, "head": s.head, name: s.score} for s in best],
            }
            for (group, best), number in zip(self.top(top).items(), self.prompts, strict=True)
        ]  # fmt: skip
        agreement = None if len(groups) < 2 else self.agreement(top).to_json(self.names)
        return {"column": self.column, "groups": groups, "agreement": agreement}

    def show(self, top: int = 10, console=None) -> None:
        """Print each group's first heads, and how far the groups agree."""
        from .tables import show_groups

        show_groups(self, top, console)

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """A map for each group, all on one scale. Returns the matplotlib Figure; saved if a path is given."""
        from .plots import Panel, small_multiples

        result = self.result
        panels = [
            Panel(
                mean, result.unit, result.label, title=f"{name}, {counted(number, 'prompt')}", signed=result.signed,
                weak=~above_noise(mean, result.noise_floor) & ~np.isnan(mean),
                weak_note=f"dot: not above {result.floor_name}", named=top,
            )
            for mean, number, (name, top) in zip(self.mean(), self.prompts, self.top(LABELLED).items(), strict=True)
        ]  # fmt: skip
        return small_multiples(panels, title or f"{result.title}, by {self.column}", path)


def rates_json(rates: pd.DataFrame) -> list[dict]:
    """The rows of `EvalResult.by_group`, None where a group has no answers yet."""
    return rates.astype(object).where(rates.notna(), None).to_dict("records")


def _means(scores: np.ndarray, places: np.ndarray, groups: int) -> np.ndarray:
    """Mean over the prompts of each group, [G, L, H] of [P, L, H]."""
    return np.stack([scores[places == group].mean(0) for group in range(groups)])
