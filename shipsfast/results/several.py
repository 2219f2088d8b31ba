"""Several ablations of the same heads on the same prompts: do they name the same heads?

Each kind of ablation asks another question of a head (docs/ablations.md), so rankings may differ widely. How widely say, for
every pair, Spearman's correlation over all heads and the overlap of the top k, beside what chance would give. A head that one
kind alone finds is marked: what it is named for may be the ablation's doing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import rankdata

from ..errors import InputError, whole_number
from .agreement import rank_agreement
from .sink_mass import SinkMass
from .statistics import or_none

if TYPE_CHECKING:
    import pandas as pd

    from .ships import ShipsResult

TOP = 10


@dataclass(frozen=True)
class Agreement:
    """Of two ablations, as agreement.py has it for all. spearman: of the scores of all heads, NaN where all of one are equal;
    overlap: the share of the top k of one that is in the top k of the other; chance: what rankings that know nothing of each
    other would share, k / heads."""

    first: str
    second: str
    heads: int
    spearman: float
    k: int
    overlap: float
    chance: float

    def to_json(self) -> dict:
        return asdict(self) | {"spearman": or_none(self.spearman)}


class OnlyOne(NamedTuple):
    """A head that one ablation alone finds. rank: there; others: its ranks by the other ablations."""

    layer: int
    head: int
    found_by: str
    rank: int
    others: dict[str, int]


def names_of(results: Sequence[ShipsResult]) -> list[str]:
    """What each is called: its kind, with eps where that occurs several times, and with a number where all is equal."""
    kinds = [result.identity.get("ablation", {}).get("kind", "ablation") for result in results]
    whole = [result.record.get("ablation", kind) for result, kind in zip(results, kinds, strict=True)]
    names = [kind if kinds.count(kind) == 1 else text for kind, text in zip(kinds, whole, strict=True)]
    seen: Counter[str] = Counter()
    for at, name in enumerate(names):
        seen[name] += 1
        names[at] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


class Several:
    """The comparison of results of several ablations, by their names. sinks: of the unablated model, where it was measured.

    Heads without a mean in some result (not scanned, or marked) are in no ranking here.
    """

    def __init__(self, by_ablation: Mapping[str, ShipsResult], sinks: SinkMass | None = None) -> None:
        self.by_ablation, self.sinks = dict(by_ablation), sinks
        shapes = {result.mean().shape for result in self.by_ablation.values()}
        if len(shapes) != 1:
            raise InputError(f"results of one model are compared, and these have maps of {sorted(shapes)}")
        self.names = list(self.by_ablation)
        self.means = {name: result.mean() for name, result in self.by_ablation.items()}
        self.known = np.all([~np.isnan(mean) for mean in self.means.values()], axis=0)
        self.unit = next(iter(self.by_ablation.values())).unit
        self.short = _short(self.names)

    @property
    def heads(self) -> int:
        """How many are compared."""
        return int(self.known.sum())

    @property
    def ranks(self) -> dict[str, np.ndarray]:
        """By ablation float64 [L, H]: 1 is the top, by size where signed; ties go to the lower (layer, head)."""
        return {name: self._ranks(name) for name in self.names}

    def _ranks(self, name: str) -> np.ndarray:
        out, scores = np.full(self.known.shape, np.nan), self.means[name][self.known]
        sizes = np.abs(scores) if self.by_ablation[name].signed else scores
        out[self.known] = rankdata(-sizes, method="ordinal")
        return out

    def agreement(self, k: int = TOP) -> list[Agreement]:
        """Of every pair of ablations."""
        self._k(k)
        if len(self.names) < 2:
            return []
        signed = next(iter(self.by_ablation.values())).signed
        found = rank_agreement(np.stack(list(self.means.values())), k, signed=signed)
        return [
            Agreement(
                self.names[i], self.names[j], found.heads, float(found.spearman[i, j]), found.k,
                float(found.overlap[i, j]), found.chance,
            )
            for i, j in combinations(range(len(self.names)), 2)
        ]  # fmt: skip

    def only_one(self, k: int = TOP) -> list[OnlyOne]:
        """Heads in the top k of one ablation and of no other, above its noise floor there, and in the lower half of all heads
        by at least one other: one kind finds them, and another sees nothing in them."""
        k, ranks = self._k(k), self.ranks
        found = []
        for layer, head in np.argwhere(self.known):
            here = {name: int(ranks[name][layer, head]) for name in self.names}
            finders = [name for name, rank in here.items() if rank <= k]
            if len(finders) != 1 or max(here.values()) <= self.heads / 2:
                continue
            (name,) = finders
            if self.by_ablation[name].above_noise()[layer, head]:
                rank = here.pop(name)
                found.append(OnlyOne(int(layer), int(head), name, rank, here))
        return sorted(found, key=lambda each: (self.names.index(each.found_by), each.rank))

    def top(self, k: int = TOP) -> list[tuple[int, int]]:
        """Heads in the top k of any ablation, by the best rank that they have."""
        k = self._k(k)
        best = np.min([ranks for ranks in self.ranks.values()], axis=0)
        heads = [tuple(map(int, at)) for at in np.argwhere(best <= k)]
        return sorted(heads, key=lambda at: (best[at], at))

    def _k(self, k: int) -> int:
        if not self.heads:
            raise InputError("no head has a score by every ablation: there is nothing to compare")
        return min(whole_number("k", k), self.heads)

    def to_pandas(self, k: int = TOP) -> pd.DataFrame:
        """One row per head that is compared: layer, head, score and rank by each ablation, found_by (of a head that one alone
        finds in its top k, else ""), and the columns of the sink mass."""
        import pandas as pd

        layer, head = np.nonzero(self.known)
        ranks, marks = self.ranks, {(x.layer, x.head): x.found_by for x in self.only_one(k)}
        columns = {"layer": layer, "head": head}
        for name in self.names:
            columns[f"score {name}"] = self.means[name][self.known]
            columns[f"rank {name}"] = ranks[name][self.known].astype(int)
        columns["found_by"] = [marks.get(at, "") for at in zip(layer.tolist(), head.tolist(), strict=True)]
        if self.sinks is not None:
            columns |= {
                name: getattr(self.sinks, name)[self.known] for name in (*self.sinks.numbers(), "varies")
            }
        return pd.DataFrame(columns)

    def to_json(self, k: int = TOP) -> dict:
        """The comparison, without the results themselves."""
        if not self.heads:
            return {"heads": 0, "agreement": [], "only_one": [], "top": []}
        ranks = self.ranks
        heads = [
            {"layer": at[0], "head": at[1], "ranks": {name: int(ranks[name][at]) for name in self.names}}
            | ({} if self.sinks is None else {"sink": self.sinks.of(*at)})
            for at in self.top(k)
        ]
        return {
            "heads": self.heads,
            "agreement": [each.to_json() for each in self.agreement(k)],
            "only_one": [each._asdict() for each in self.only_one(k)],
            "top": heads,
        }

    def lines(self, k: int = TOP) -> Iterator[str]:
        """The heads that one alone finds, in words."""
        for each in self.only_one(k):
            others = ", ".join(
                f"{rank} of {self.heads:,} by {self.short[name]}" for name, rank in each.others.items()
            )
            yield (
                f"* only {self.short[each.found_by]} finds {self.unit} {each.layer}-{each.head}: rank {each.rank}, and {others}"
                f"{self._rests(each.layer, each.head)}"
            )

    def _rests(self, layer: int, head: int) -> str:
        if self.sinks is None or not self.sinks.at_rest[layer, head]:
            return ""
        weight, varies = self.sinks.first_token[layer, head], self.sinks.varies[layer, head]
        return f"; it rests on the first token (attention weight {weight:.3g}), and what it gives varies by {varies:.1g} of its size"

    def panels(self) -> list:
        """The maps side by side, and the attention on the first token where it is known."""
        from .plots import Panel

        found = [result.panel(title=self.short[name]) for name, result in self.by_ablation.items()]
        if self.sinks is not None:
            weak = np.zeros(self.known.shape, dtype=bool)
            marks = [(x.layer, x.head, self.sinks.first_token[x.layer, x.head]) for x in self._marked()]
            label = "attention weight on the first token"
            found.append(Panel(self.sinks.first_token, self.unit, label, weak, "", marks, "unablated"))
        return found

    def _marked(self) -> list[OnlyOne]:
        return self.only_one() if self.heads else []

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """The maps of all ablations side by side, each on a scale of its own; beside them the attention on the first token, with
        the heads named that one ablation alone finds. Returns the matplotlib Figure; saved if a path is given."""
        from .plots import side_by_side

        return side_by_side(self.panels(), path, title=title or "")


def _short(names: Sequence[str]) -> dict[str, str]:
    """By name: without the kind, where that is the same for all."""
    kinds = {name.split(" (")[0] for name in names}
    if len(kinds) > 1 or len(names) < 2:
        return {name: name for name in names}
    (kind,) = kinds
    return {name: name.removeprefix(kind).strip(" ()") or kind for name in names}
