"""What the scans return: the results of scans of the next token here, those of searches from subspace.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..runs.manifest import FURTHER, MANIFEST, read_manifest
from ..runs.part_file import inside
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .bootstrap import RankStability, rank_stability
from .gram_bootstrap import QUICK, Grams
from .head_map import Ranked, save_scores
from .statistics import wilson_interval

MARKED = "nonfinite"  # what run.json says of marked scores
KL = {"name": "kl", "unit": "nats", "signed": False, "label": "KL(base || head ablated)"}


@dataclass(repr=False)
class ShipsResult(Ranked):
    """Ships of every head and prompt (arXiv 2410.13708, eq. 9), or another metric in its place.

    scores: float64 [P, L, H]; NaN for heads not scanned. For the metric "kl" they are KL(p(base) || p(head
        ablated)) of the next token in nats, and `.kl` is another name for them.
    noise_floor: the score between two computations of the same unablated model that differ in packing,
        chunking and rounding only; scores at or under it cannot be told from zero.
    record: what really ran: model, ablation, precision, backend, versions, device, plan, timings.
    also: the results of further metrics of the same scan, by their names.
    marked: bool [P, L, H], scores that are NaN because they were not finite (`scan(nonfinite="mark")`), or None where
        there are none. A head with one of them has no mean, and is in no ranking.
    """

    scores: np.ndarray
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)
    also: dict[str, ShipsResult] = field(default_factory=dict)
    marked: np.ndarray | None = None

    @property
    def marked_heads(self) -> list[tuple[int, int]]:
        """Heads with a marked score, which are in no ranking."""
        return [] if self.marked is None else [tuple(map(int, at)) for at in np.argwhere(self.marked.any(0))]

    def marks(self) -> dict:
        """count, heads and the first mark with its reason, for JSON; empty where no score is marked."""
        if self.marked is None:
            return {}
        found = {"count": int(self.marked.sum()), "heads": [list(head) for head in self.marked_heads]}
        return found | self.record.get(MARKED, {})

    @property
    def metric(self) -> dict:
        """name, unit, signed and label of what was measured."""
        return self.record.get("metric", KL)

    @property
    def kl(self) -> np.ndarray:
        if self.metric["name"] != "kl":
            raise InputError(f"this scan measured {self.metric['name']}: its numbers are in .scores")
        return self.scores

    @property
    def signed(self) -> bool:
        return self.metric["signed"]

    @property
    def is_rate(self) -> bool:
        return self.metric["name"] == "asr"

    def rate_interval(self, layer: int, head: int, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval of a head's rate, for metrics of 0 and 1."""
        scores = self.scores[:, layer, head]
        return wilson_interval(np.nansum(scores), np.isfinite(scores).sum(), confidence)

    def mean(self) -> np.ndarray:
        """Mean over prompts, float64 [L, H]."""
        return self.scores.mean(axis=0)

    def stability(
        self, k: int = 10, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> RankStability:
        """Bootstrap over prompts: how often each head is in the top k, and intervals of its mean and rank."""
        scores = self.scores if self.marked is None else np.where(self.marked.any(0), np.nan, self.scores)
        return rank_stability(
            scores, k, resamples=resamples, confidence=confidence, seed=seed, signed=self.signed
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per prompt and head: prompt, layer, head, and kl_nats or the metric's name."""
        return score_frame(self.scores, ("prompt", "layer", "head"), column(self.metric), self.marked)

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of the mean scores, layers x heads. Returns the matplotlib Figure; saved if a path is given."""
        from .plots import heatmap

        title = title or f"{title_of(self.metric)}, mean of {counted(self.scores.shape[0], 'prompt')}"
        return heatmap(self, label_of(self.metric), title, path)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | {"noise_floor": self.noise_floor}
        names = ("prompt", "layer", "head")
        args = (self.scores, names, column(self.metric))
        if self.also:  # complete when all are
            path = save_scores(
                folder, self.identity, record | {"status": "running"}, *args, marked=self.marked
            )
            for number, other in enumerate(self.also.values(), 1):
                other.save(path / also_place(number))
        return save_scores(folder, self.identity, record, *args, marked=self.marked)

    @staticmethod
    def read(
        folder: Path, shape: tuple[int, ...], metric: dict, done: np.ndarray | None = None
    ) -> np.ndarray:
        return read_scores(folder, shape, ("prompt", "layer", "head"), column(metric), done)

    @classmethod
    def load(cls, folder: str | Path) -> ShipsResult:
        """Read a run folder; scores that a killed scan never reached are NaN."""
        folder = Path(folder)
        result = cls.load_one(folder)
        complete = result.record.get("status") == "complete"  # else some may not have been begun
        for number in range(1, 1 + len(result.identity.get("further_metrics", []))):
            place = folder / also_place(number)
            if not complete and not (place / MANIFEST).exists():
                continue
            other = cls.load_one(inside(folder, place) if place.exists() else place)
            if other.identity.get("further_metrics"):
                raise InputError(
                    f"{place} is damaged: a further metric has none of its own; delete the folder"
                )
            result.also[other.metric["name"]] = other
        return result

    @classmethod
    def load_one(cls, folder: Path) -> ShipsResult:
        """The same without further metrics."""
        manifest = read_manifest(folder, "ships")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        done = np.zeros(tuple(identity["shape"]), dtype=bool)
        scores = cls.read(folder, done.shape, manifest.get("metric", KL), done)
        marked = done & ~np.isfinite(scores)  # infinite ones are of earlier versions
        scores[marked] = np.nan
        floor = manifest.get("noise_floor") or 0.0
        return cls(scores, floor, manifest, identity, marked=marked if marked.any() else None)


def also_place(number: int) -> str:
    """Where in a run folder the run folder of a scan's further metrics lies, counted from 1."""
    return f"{FURTHER}/{number}"


def column(metric: dict) -> str:
    """The column of a metric's scores in tables on disk."""
    return "kl_nats" if metric["name"] == "kl" else "score"


def floor_name(result) -> str:
    """What scores are compared with before they count as anything."""
    return (
        result.metric.get("floor", "the noise floor")
        if isinstance(result, ShipsResult)
        else "the noise floor"
    )


def title_of(metric: dict) -> str:
    return "Ships" if metric["name"] == "kl" else metric.get("title", metric["name"])


def label_of(metric: dict) -> str:
    return metric["label"] + (f", {metric['unit']}" if metric["unit"] else "")


def quick_stability(result, k: int, *step: int) -> tuple[RankStability | None, str]:
    """`stability` for tables, plots and run folders; None and the reason where it cannot be, or takes minutes."""
    if isinstance(result, ShipsResult):
        if result.is_rate:
            return None, "heads of one rate share a rank; intervals are Wilson's, of the rate"
        if result.scores.shape[0] == 1:
            return None, "one prompt: no intervals"
    elif result.grams is not None:
        angles = result.angle_deg[step[0]] if step else result.angle_deg
        if Grams.work(angles, len(result.grams.base)) > QUICK:
            return (
                None,
                "no intervals: so many prompts and heads take minutes; result.stability(progress=True) does it",
            )
    try:
        return result.stability(k, *step), ""
    except InputError as problem:  # too few prompts, a head scanned in part, or an infinite score
        return None, f"no intervals: {problem}"


def stability_json(result, k: int, *step: int) -> dict:
    """The same for run.json, and for a program to read."""
    stability, problem = quick_stability(result, k, *step)
    return {"not_known": problem} if stability is None else stability.to_json()
