"""What the scans return."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .errors import InputError, whole_number
from .grams import QUICK, RESAMPLES, ROOM, Grams
from .manifest import FURTHER
from .part_file import inside
from .runs import MANIFEST, SCORES, RunFolder, read_manifest, read_scores, score_frame
from .statistics import (
    Concentration,
    RankStability,
    above_noise,
    concentration,
    rank_stability,
    wilson_interval,
)

HEAD_COLUMNS = ("layer", "head")
STEP_COLUMNS = ("step", "beam", *HEAD_COLUMNS)
MARKED = "nonfinite"  # what run.json says of marked scores

KL = {"name": "kl", "unit": "nats", "signed": False, "label": "KL(base || head ablated)"}


class HeadScore(NamedTuple):
    layer: int
    head: int
    score: float


def ranked(scores: np.ndarray, k: int, signed: bool = False) -> list[HeadScore]:
    """The k largest of [L, H], by size whatever the sign if `signed`; ties go to the lower (layer, head)."""
    found = [HeadScore(int(i), int(j), float(scores[i, j])) for i, j in np.argwhere(~np.isnan(scores))]
    key = (lambda s: -abs(s.score)) if signed else (lambda s: -s.score)
    return sorted(found, key=lambda s: (key(s), s.layer, s.head))[:k]


def _save(
    folder: str | Path,
    identity: dict,
    record: dict,
    scores: np.ndarray,
    names: tuple[str, ...],
    value: str,
    grams: Grams | None = None,
    marked: np.ndarray | None = None,
) -> Path:
    """A run folder with these scores; what an unfinished one already holds is kept."""
    run = RunFolder(folder, identity, record)
    record = {"status": "complete", **record, "saved": True}
    with contextlib.closing(run):
        if not run.previous:
            run.write_manifest(record | {"status": "running"})
        done = np.zeros(scores.shape, dtype=bool)
        before = read_scores(run.path, scores.shape, names, value, done)
        new = np.where(np.isnan(before), scores, np.nan)
        if run.complete:
            if not (~np.isnan(new)).any():  # all is there
                return run.path
            record["status"] = "complete"
        frames = {SCORES: score_frame(new, names, value, None if marked is None else marked & ~done)}
        if grams is not None and len(frames[SCORES]):
            frames[ROOM] = grams.part(names, [tuple(map(int, at)) for at in np.argwhere(~np.isnan(new))])
        run.write_parts(frames)
        run.write_manifest(record)
    return run.path


class _Ranked:
    """What every result with a [L, H] map of scores offers. Subclasses say what the map is."""

    noise_floor: float
    record: dict
    identity: dict

    @property
    def unit(self) -> str:
        """What was switched off: "head", or "kv_group"; then the last axis counts key/value groups."""
        return self.identity.get("unit", "head")

    def mean(self) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        layers, heads = self.mean().shape
        top = ", ".join(f"{s.layer}-{s.head} {s.score:.4g}" for s in self.top(3))
        return f"{type(self).__name__}({layers} layers x {heads} {self.unit}s, top: {top})"

    @property
    def signed(self) -> bool:
        return False

    @property
    def is_rate(self) -> bool:
        """Are the scores 0 or 1, and their means rates that many heads share?"""
        return False

    def top(self, k: int = 10) -> list[HeadScore]:
        """The k heads with the largest (for signed metrics: largest in size) score; ties go to the lower
        (layer, head)."""
        return ranked(self.mean(), k, self.signed)

    def above_noise(self) -> np.ndarray:
        """bool [L, H]: heads whose score can be told from what rounding and chunking alone produce."""
        return above_noise(self.mean(), self.noise_floor)

    def concentration(self) -> Concentration:
        """How much of the total few heads carry: Gini coefficient, shares of the top heads, effective number.

        Of attack success rates, the total is what exceeds the unablated model's.
        """
        return concentration(np.maximum(self.mean() - self.noise_floor, 0) if self.is_rate else self.mean())


@dataclass(repr=False)
class ShipsResult(_Ranked):
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
        from .plotting import heatmap

        prompts = self.scores.shape[0]
        title = title or f"{title_of(self.metric)}, mean of {prompts} prompt{'s' * (prompts != 1)}"
        return heatmap(self, label_of(self.metric), title, path)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | {"noise_floor": self.noise_floor}
        names = ("prompt", "layer", "head")
        args = (self.scores, names, column(self.metric))
        if self.also:  # complete when all are
            path = _save(folder, self.identity, record | {"status": "running"}, *args, marked=self.marked)
            for number, other in enumerate(self.also.values(), 1):
                other.save(path / also_place(number))
        return _save(folder, self.identity, record, *args, marked=self.marked)

    @staticmethod
    def read(
        folder: Path, shape: tuple[int, ...], metric: dict, done: np.ndarray | None = None
    ) -> np.ndarray:
        return read_scores(folder, shape, ("prompt", "layer", "head"), column(metric), done)

    @classmethod
    def load(cls, folder: str | Path) -> ShipsResult:
        """Read a run folder; scores that a killed scan never reached are NaN."""
        return cls._load(Path(folder), nested=False)

    @classmethod
    def _load(cls, folder: Path, nested: bool) -> ShipsResult:
        manifest = read_manifest(folder, "ships")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        if nested and identity.get("further_metrics"):
            raise InputError(f"{folder} is damaged: a further metric has none of its own; delete the folder")
        done = np.zeros(tuple(identity["shape"]), dtype=bool)
        scores = cls.read(folder, done.shape, manifest.get("metric", KL), done)
        marked = done & ~np.isfinite(scores)  # infinite ones are of earlier versions
        scores[marked] = np.nan
        places = [folder / also_place(n + 1) for n in range(len(identity.get("further_metrics", [])))]
        done = manifest.get("status") == "complete"  # else some may not have been begun
        others = [
            cls._load(inside(folder, place) if place.exists() else place, nested=True)
            for place in places
            if done or (place / MANIFEST).exists()
        ]
        also = {other.metric["name"]: other for other in others}
        floor = manifest.get("noise_floor") or 0.0
        return cls(scores, floor, manifest, identity, also, marked if marked.any() else None)


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


@dataclass(repr=False)
class SubspaceResult(_Ranked):
    """Dataset-level Ships of every head (arXiv 2410.13708, eq. 11).

    angle_deg: float64 [L, H], sum of the r principal angles between the leading left singular subspaces of the
        prompts' hidden states with and without the head, in degrees; NaN for heads not scanned.
    noise_floor: degrees, the same angle between the packed and the plain unablated model.
    """

    angle_deg: np.ndarray
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)
    grams: Grams | None = None

    def mean(self) -> np.ndarray:
        """The angles themselves: they already belong to the whole set of prompts."""
        return self.angle_deg

    def stability(
        self,
        k: int = 10,
        *,
        resamples: int = RESAMPLES,
        confidence: float = 0.95,
        seed: int = 0,
        progress: bool = False,
    ) -> RankStability:
        """Bootstrap over prompts: how often each head is in the top k, and intervals of its angle and rank.

        Every resample, and every prompt left out once, takes the singular subspaces anew: about 10 microseconds a
        head at 8 prompts, 1 ms at 100. Resamples with no more distinct prompts than the rank, in which all angles are
        0, are drawn again. Raises InputError for fewer than rank + 2 distinct prompts, where most resamples have too
        few, and where there are so many prompts that their Gram matrices were not kept.
        """
        return _stability(self, self.angle_deg, self.grams, k, resamples, confidence, seed, progress)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head: layer, head, angle_deg."""
        return score_frame(self.angle_deg, HEAD_COLUMNS, "angle_deg")

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of the angles, layers x heads. Returns the matplotlib Figure; saved if a path is given."""
        from .plotting import heatmap

        prompts = len(self.identity.get("prompts", []))
        title = title or f"Dataset-level Ships, rank {self.identity.get('rank')}, {prompts} prompts"
        return heatmap(self, ANGLE_LABEL, title, path)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | {"noise_floor": self.noise_floor}
        return _save(folder, self.identity, record, self.angle_deg, HEAD_COLUMNS, "angle_deg", self.grams)

    @classmethod
    def load(cls, folder: str | Path) -> SubspaceResult:
        """Read a run folder; angles that a killed scan never reached are NaN."""
        folder = Path(folder)
        manifest = read_manifest(folder, "subspace")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        prompts, *shape = identity["shape"]
        angles = read_scores(folder, tuple(shape), HEAD_COLUMNS, "angle_deg")
        grams = Grams.empty(prompts, tuple(shape))
        if grams is not None:
            grams.read(folder, HEAD_COLUMNS)
        return cls(angles, manifest.get("noise_floor") or 0.0, manifest, identity, grams)


ANGLE_LABEL = "sum of principal angles, degrees"


def _stability(result, angles: np.ndarray, grams: Grams | None, *settings) -> RankStability:
    if grams is None:
        raise InputError(
            f"{len(result.identity.get('prompts', []))} prompts are too many to keep every head's Gram matrix, "
            "which resampling needs: scan fewer of them"
        )
    return grams.stability(angles, result.identity["prompts"], result.identity["rank"], *settings)


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


@dataclass(repr=False)
class SaharaResult:
    """The group of heads that Sahara found (arXiv 2410.13708, algorithm 1).

    heads: (layer, head) in the order chosen; scores: the dataset-level Ships in degrees of the group after each.
    angle_deg: float64 [group_size, L, H], the score of the group so far with each further head; NaN where the head
        was already chosen (or not in `heads=`).
    beams: the groups kept at the end, best first, as (heads, angle in degrees).
    """

    heads: list[tuple[int, int]]
    angle_deg: np.ndarray
    beams: list[tuple[list[tuple[int, int]], float]] = field(default_factory=list)
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)
    grams: Grams | None = None

    def __repr__(self) -> str:
        found = ", ".join(f"{i}-{j}" for i, j in self.heads)
        return f"SaharaResult({found}: {self.scores[-1]:.4g} degrees)"

    @property
    def scores(self) -> list[float]:
        return [float(self.angle_deg[step, layer, head]) for step, (layer, head) in enumerate(self.heads)]

    @property
    def gain_deg(self) -> np.ndarray:
        """float64 [group_size, L, H], degrees: what each further head adds to the score of the group so far."""
        return self.angle_deg - np.reshape([0.0, *self.scores[:-1]], (-1, 1, 1))

    @property
    def unit(self) -> str:
        return self.identity.get("unit", "head")

    def top(self, k: int = 10, step: int = 0) -> list[HeadScore]:
        """The k best candidates of a step (from 0)."""
        return ranked(self.angle_deg[self._step(step)], k)

    def above_noise(self) -> np.ndarray:
        """bool [group_size, L, H]: heads whose gain can be told from what rounding and chunking alone produce."""
        return above_noise(self.gain_deg, self.noise_floor)

    def concentration(self, step: int = 0) -> Concentration:
        """How much of what all further heads would change in a step (from 0), up or down, few of them carry."""
        return concentration(self.gain_deg[self._step(step)])

    def stability(
        self,
        k: int = 1,
        step: int = 0,
        *,
        resamples: int = RESAMPLES,
        confidence: float = 0.95,
        seed: int = 0,
        progress: bool = False,
    ) -> RankStability:
        """Bootstrap over prompts of one step (from 0), the group so far given: see `SubspaceResult.stability`.

        With k = 1, .top_k_frequency says how often each head would have been chosen.
        """
        step = self._step(step)
        grams = None if self.grams is None else self.grams.at(step)
        return _stability(self, self.angle_deg[step], grams, k, resamples, confidence, seed, progress)

    def _step(self, step: int) -> int:
        step = whole_number("step", step, 0)
        if step >= len(self.heads):
            raise InputError(f"step {step} is not one of 0 to {len(self.heads) - 1}")
        return step

    def to_pandas(self) -> pd.DataFrame:
        """One row per step and head: step, layer, head, angle_deg."""
        return score_frame(self.angle_deg, ("step", "layer", "head"), "angle_deg")

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmaps of every step, the chosen head marked. Returns the matplotlib Figure; saved if a path is given."""
        from .plotting import steps

        return steps(self, ANGLE_LABEL, title, path)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        path = self.record.get("path") or [0] * len(self.heads)
        stored = np.full((len(self.heads), self.identity["beam"], *self.angle_deg.shape[1:]), np.nan)
        grams = self.grams and Grams(self.grams.base, np.empty((*stored.shape, *self.grams.base.shape)))
        for step, at in enumerate(path):
            stored[step, at] = self.angle_deg[step]
            if grams is not None:
                grams.heads[step, at] = self.grams.heads[step]
        record = self.record | self.outcome() | {"noise_floor": self.noise_floor}
        return _save(folder, self.identity, record, stored, STEP_COLUMNS, "angle_deg", grams)

    def outcome(self) -> dict:
        """The outcome as run.json has it."""
        return {
            "chosen": [list(h) for h in self.heads],
            "beams": [{"heads": [list(h) for h in group], "angle_deg": angle} for group, angle in self.beams],
        }

    @classmethod
    def load(cls, folder: str | Path) -> SaharaResult:
        """Read the run folder of a finished search."""
        folder = Path(folder)
        manifest = read_manifest(folder, "sahara")
        if manifest.get("status") != "complete":
            raise InputError(f"{folder} holds a search that is not finished: run it again to continue")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        heads = [tuple(h) for h in manifest.pop("chosen")]
        beams = [([tuple(h) for h in b["heads"]], b["angle_deg"]) for b in manifest.pop("beams")]
        shape = (len(heads), identity["beam"], *identity["shape"][1:])
        stored = read_scores(folder, shape, STEP_COLUMNS, "angle_deg")
        path = manifest.get("path") or [0] * len(heads)
        angles = np.stack([stored[step, beam] for step, beam in enumerate(path)])
        grams = Grams.empty(identity["shape"][0], shape)
        if grams is not None:
            kept = grams.read(folder, STEP_COLUMNS).heads
            grams = Grams(grams.base, np.stack([kept[step, beam] for step, beam in enumerate(path)]))
        return cls(heads, angles, beams, manifest.get("noise_floor") or 0.0, manifest, identity, grams)


def load(folder: str | Path):
    """Read any run folder: the ShipsResult, SubspaceResult, SaharaResult or EvalResult of what was run there.

    Raises InputError if it is missing, damaged, or of a search that is not finished.
    """
    kinds = {"ships": ShipsResult, "subspace": SubspaceResult, "sahara": SaharaResult}
    kind = read_manifest(Path(folder))["identity"].get("kind")
    if kind == "evaluate":
        from .evaluation import EvalResult  # it imports this file

        return EvalResult.load(folder)
    if kind not in kinds:
        raise InputError(
            f"{folder} holds a run of kind {kind!r}, expected one of {', '.join([*kinds, 'evaluate'])}"
        )
    return kinds[kind].load(folder)
