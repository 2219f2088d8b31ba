"""What a scan returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .runs import RunFolder, read_manifest, read_scores


class HeadScore(NamedTuple):
    layer: int
    head: int
    score: float


@dataclass
class ShipsResult:
    """Ships of every head and prompt (arXiv 2410.13708, eq. 9).

    kl: float64 [P, L, H], KL(p(base) || p(head ablated)) of the next token in nats; NaN for heads not scanned.
    noise_floor: nats, the KL between two computations of the same unablated model that differ in packing,
        chunking and rounding only; scores at or under it cannot be told from zero.
    record: what really ran: model, ablation, precision, backend, versions, device, plan, timings.
    """

    kl: np.ndarray
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)

    def mean(self) -> np.ndarray:
        """Mean over prompts, float64 [L, H], nats."""
        return self.kl.mean(axis=0)

    def top(self, k: int = 10) -> list[HeadScore]:
        """The k heads with the largest mean score; ties go to the lower (layer, head)."""
        mean = self.mean()
        scored = [HeadScore(int(i), int(j), float(mean[i, j])) for i, j in np.argwhere(~np.isnan(mean))]
        return sorted(scored, key=lambda s: (-s.score, s.layer, s.head))[:k]

    def to_pandas(self) -> pd.DataFrame:
        """One row per prompt and head: prompt, layer, head, kl_nats."""
        return frame(self.kl)

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of the mean scores, layers x heads. Returns the matplotlib Figure; saved if a path is given."""
        from .plotting import heatmap

        return heatmap(self, path, title=title)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        run = RunFolder(folder, self.identity)
        record = {"status": "complete", **self.record, "noise_floor_nats": self.noise_floor}
        if not run.previous:
            run.write_manifest(record | {"status": "running"})
        if np.isnan(read_scores(run.path, self.kl.shape)[~np.isnan(self.kl)]).any():
            run.write_part(self.to_pandas())
        run.write_manifest(record)
        return run.path

    @classmethod
    def load(cls, folder: str | Path) -> ShipsResult:
        """Read a run folder; scores that a killed scan never reached are NaN."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        identity = manifest.pop("identity")
        kl = read_scores(folder, tuple(identity["shape"]))
        return cls(kl, manifest.get("noise_floor_nats") or 0.0, manifest, identity)


def frame(kl: np.ndarray) -> pd.DataFrame:
    """Scores [P, L, H] as rows, without those that are NaN."""
    prompt, layer, head = np.nonzero(~np.isnan(kl))
    return pd.DataFrame(
        {
            "prompt": prompt.astype(np.int32),
            "layer": layer.astype(np.int16),
            "head": head.astype(np.int16),
            "kl_nats": kl[prompt, layer, head],
        }
    )
