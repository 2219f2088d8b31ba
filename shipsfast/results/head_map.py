"""What results with a map of scores over layers and heads share: the ranking, and writing them as a run folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runs.folder import RunFolder
from ..runs.tables import SCORES, read_scores, score_frame
from .gram_bootstrap import ROOM, Grams
from .statistics import Concentration, above_noise, concentration


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
) -> Path:
    """A run folder with these scores; what an unfinished one already holds is kept."""
    run = RunFolder(folder, identity, record)
    record = {"status": "complete", **record, "saved": True}
    with contextlib.closing(run):
        if not run.previous:
            run.write_manifest(record | {"status": "running"})
        done = np.zeros(scores.shape, dtype=bool)

        def read(path: Path) -> np.ndarray:
            done[:] = False
            return read_scores(path, scores.shape, names, value, done)

        before = run.finished(read)
        if before is None:
            before = read(run.path)
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


class Ranked:
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
