"""What the searches over whole sets of prompts return: dataset-level Ships, and Sahara."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runs.kinds import KINDS
from ..runs.manifest import read_manifest
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .bootstrap import RankStability, quick_stability
from .gram_bootstrap import QUICK, RESAMPLES, Grams
from .head_map import Ranked, save_scores

if TYPE_CHECKING:
    import pandas as pd

HEAD_COLUMNS = KINDS["subspace"].index


@dataclass(repr=False, eq=False)
class SubspaceResult(Ranked):
    """Dataset-level Ships of every head (arXiv 2410.13708, eq. 11).

    angle_deg: float64 [L, H], sum of the r principal angles between the leading left singular subspaces of the
        prompts' hidden states with and without the head, in degrees; NaN for heads not scanned.
    noise_floor: degrees, what packing, chunking and rounding alone make of an angle; error: a `ScoreError`. See
        results/score_error.py.
    """

    score_name = "angle_deg"

    angle_deg: np.ndarray
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)
    grams: Grams | None = field(default=None, compare=False)

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

    def quick_stability(self, k: int) -> tuple[RankStability | None, str]:
        return quick_angles(self.grams, self.angle_deg, lambda: self.stability(k))

    def show(self, top: int, console) -> None:
        """Print the top heads, how firm they are, and the noise floor."""
        from .tables import show_subspace

        show_subspace(self, top, console)

    def to_pandas(self) -> pd.DataFrame:
        """One row per head: layer, head, angle_deg."""
        return score_frame(self.angle_deg, HEAD_COLUMNS, "angle_deg")

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmap of the angles, layers x heads. Returns the matplotlib Figure; saved if a path is given."""
        prompts = counted(len(self.identity.get("prompts", [])), "prompt")
        title = title or f"Dataset-level Ships, rank {self.identity.get('rank')}, {prompts}"
        return self.heatmap(ANGLE_LABEL, title, path)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        record = self.record | {"noise_floor": self.noise_floor}
        return save_scores(
            folder, self.identity, record, self.angle_deg, HEAD_COLUMNS, "angle_deg", self.grams
        )

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
    """settings: as in `Grams.stability`."""
    if grams is None:
        raise InputError(
            f"{len(result.identity.get('prompts', []))} prompts are too many to keep every head's Gram matrix, "
            "which resampling needs: scan fewer of them"
        )
    return grams.stability(angles, result.identity["prompts"], result.identity["rank"], *settings)


def quick_angles(grams: Grams | None, angles: np.ndarray, take) -> tuple[RankStability | None, str]:
    """`quick_stability` of angles whose resampling does not take minutes."""
    if grams is not None and Grams.work(angles, len(grams.base)) > QUICK:
        return (
            None,
            "no intervals: so many prompts and heads take minutes; result.stability(progress=True) does it",
        )
    return quick_stability(take)
