"""What results with a map of scores over layers and heads share: the ranking, and writing them as a run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from ..runs.folder import RunFolder
from ..runs.kinds import GRAMS, SCORES
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .bootstrap import RankStability, as_known, quick_stability
from .equality import Compared
from .gram_bootstrap import Grams
from .score_error import ScoreError
from .statistics import Concentration, above_noise, concentration

if TYPE_CHECKING:
    import pandas as pd

LABELLED = 3  # heads named in a map
BARS = 10  # heads beside it


class HeadScore(NamedTuple):
    layer: int
    head: int
    score: float


def ranked(scores: np.ndarray, k: int, signed: bool = False) -> list[HeadScore]:
    """The k largest of [L, H], by size whatever the sign if `signed`; ties go to the lower (layer, head)."""
    found = [HeadScore(int(i), int(j), float(scores[i, j])) for i, j in np.argwhere(~np.isnan(scores))]
    key = (lambda s: -abs(s.score)) if signed else (lambda s: -s.score)
    return sorted(found, key=lambda s: (key(s), s.layer, s.head))[:k]


def save_scores(
    folder: str | Path,
    identity: dict,
    record: dict,
    scores: np.ndarray,
    names: tuple[str, ...],
    value: str,
    grams: Grams | None = None,
    marked: np.ndarray | None = None,
    beside: Callable[[np.ndarray], dict[str, pd.DataFrame]] = lambda new: {},
) -> Path:
    """A run folder with these scores; what an unfinished one already holds is kept. beside(new): further parts of the scores
    that are not NaN in `new`, by room."""
    run = RunFolder(folder, identity, record)
    record = {"status": "complete", **record, "saved": True}
    with contextlib.closing(run):
        if not run.previous:
            run.write_manifest(record | {"status": "running"})
        done = np.zeros(scores.shape, dtype=bool)

        def read(path: Path) -> np.ndarray:
            done[:] = False
            return read_scores(path, scores.shape, names, value, done)

        before = run.finished(read, (SCORES,))
        if before is None:
            before = read(run.path)
        new = np.where(np.isnan(before), scores, np.nan)
        if run.complete:
            if not (~np.isnan(new)).any():  # all is there
                return run.path
            record["status"] = "complete"
        frames = {SCORES: score_frame(new, names, value, None if marked is None else marked & ~done)}
        if grams is not None and len(frames[SCORES]):
            frames[GRAMS] = grams.part(names, [tuple(map(int, at)) for at in np.argwhere(~np.isnan(new))])
        run.write_parts(frames | beside(new))
        run.write_manifest(record)
    return run.path


class Ranked(Compared):
    """What every result with a [L, H] map of scores offers. Subclasses say what the map is."""

    noise_floor: float
    record: dict
    identity: dict
    score_name: str  # of a score, in JSON
    signed: ClassVar[bool] = False
    is_rate: ClassVar[bool] = False  # are the scores 0 or 1, and their means rates that many heads share?
    # What scores are compared with before they count as anything.
    floor_name: ClassVar[str] = "the noise floor"

    @property
    def unit(self) -> str:
        """What was switched off: "head", or "kv_group"; then the last axis counts key/value groups."""
        return self.identity.get("unit", "head")

    @property
    def error(self) -> ScoreError | None:
        """How far scores are off, as the scan measured it; None for rates, and for runs of earlier versions."""
        return ScoreError.from_json(self.record["error"]) if "error" in self.record else None

    def mean(self) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        layers, heads = self.mean().shape
        top = ", ".join(f"{s.layer}-{s.head} {s.score:.4g}" for s in self.top(3))
        return f"{type(self).__name__}({layers} layers x {heads} {self.unit}s, top: {top})"

    def top(self, k: int = 10) -> list[HeadScore]:
        """The k heads with the largest (for signed metrics: largest in size) score; ties go to the lower
        (layer, head)."""
        return ranked(self.mean(), k, self.signed)

    def quick_stability(self, k: int) -> tuple[RankStability | None, str]:
        """`stability` for tables, plots and run folders; None and the reason where it cannot be, or takes minutes."""
        return quick_stability(lambda: self.stability(k))

    def stability_json(self, k: int) -> dict:
        """The same for run.json, and for a program to read."""
        return as_known(*self.quick_stability(k))

    def above_noise(self) -> np.ndarray:
        """bool [L, H]: heads whose score can be told from what rounding and chunking alone produce."""
        return above_noise(self.mean(), self.noise_floor)

    def concentration(self) -> Concentration:
        """How much of the total few heads carry: Gini coefficient, shares of the top heads, effective number.

        Of attack success rates, the total is what exceeds the unablated model's.
        """
        return concentration(np.maximum(self.mean() - self.noise_floor, 0) if self.is_rate else self.mean())

    def panel(self, label: str, title: str = ""):
        """The map of the means, as plots draw it."""
        from .plots import Panel

        mean = self.mean()
        return Panel(
            mean, self.unit, label, title=title, signed=self.signed, weak=~self.above_noise() & ~np.isnan(mean),
            weak_note=f"dot: not above {self.floor_name}", named=self.top(LABELLED),
        )  # fmt: skip

    def bars(self, label: str):
        """The top heads with bootstrap intervals, where they are known, and how much of the total they carry."""
        from .plots import Bars

        top, (stability, _) = self.top(BARS), self.quick_stability(BARS)
        bars = Bars(top, label, share_of(self.concentration()))
        if stability is None:
            return bars
        at = tuple(zip(*((s.layer, s.head) for s in top), strict=True))
        said = f"{stability.confidence:.0%} intervals, {counted(stability.prompts, 'prompt')} resampled"
        return replace(bars, low=stability.low[at], high=stability.high[at], title=f"{bars.title}\n{said}")

    def heatmap(self, label: str, title: str, path: str | Path | None):
        """The map and the bars. Returns the matplotlib Figure; saved if a path is given."""
        from .plots import heatmap

        ablation = self.record.get("ablation")
        title = f"{title}\nablation: {ablation}" if ablation else title
        note = self.error.note() if self.error else ""
        title = f"{title}\n{note}" if note else title
        return heatmap(self.panel(label), self.bars(label), title, path)

    def as_json(self, top: int) -> dict:
        """What a program reads of it: the top heads, how firm they are, and what ran."""
        return {
            "noise_floor": self.noise_floor,
            "error": error_json(self.error),
            "record": self.record,
            "top": [{"layer": s.layer, "head": s.head, self.score_name: s.score} for s in self.top(top)],
            "concentration": self.concentration().to_json(),
            "stability": self.stability_json(top),
        }


def error_json(error: ScoreError | None) -> dict | None:
    return None if error is None else error.to_json()


def share_of(found: Concentration) -> str:
    """How much the first heads carry, in words; "" where nobody knows, or they are all."""
    share = found.top_share[LABELLED]
    return "" if np.isnan(share) or found.heads <= LABELLED else f"top {LABELLED} carry {share:.0%}"
