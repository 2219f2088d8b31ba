"""Gram matrices of the prompts' hidden states: all that resampling the prompts needs of a dataset-level scan.

The score of a set of prompts is not a mean over them, so its bootstrap wants the hidden states of every head again, with
other weights. Their Gram matrices X X^T [P, P] are enough, and small where there are not many prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..runs.kinds import GRAMS
from ..runs.part_file import cells
from ..runs.tables import damage, read_parts
from ..text import counted
from .bootstrap import RankStability, check_settings, resample_counts, resampled_means, stability_of

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 256 << 20  # of one run; where more would be needed, none are kept
RESAMPLES = 200
QUICK = 10**10  # work that tables and plots take on by themselves: some ten seconds


@dataclass(eq=False)
class Grams:
    """base: float64 [P, P], of the unablated model; heads: float64 [..., L, H, P, P], NaN where not scanned."""

    base: np.ndarray
    heads: np.ndarray
    _steps: dict[int, Grams] = field(default_factory=dict, repr=False)
    _resampled: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    def at(self, step: int) -> Grams:
        """Those of one step of a search."""
        return self._steps.setdefault(step, Grams(self.base, self.heads[step]))

    @classmethod
    def empty(cls, prompts: int, shape: tuple[int, ...]) -> Grams | None:
        """Room for a run, or None if it would take more than MOST_BYTES."""
        if 8 * prompts**2 * int(np.prod(shape)) > MOST_BYTES:
            return None
        return cls(np.full((prompts, prompts), np.nan), np.full((*shape, prompts, prompts), np.nan))

    def stability(
        self,
        angles: np.ndarray,
        names: Sequence[str],
        rank: int,
        k: int,
        resamples: int,
        confidence: float,
        seed: int,
        progress: bool = False,
        costs: np.ndarray | None = None,
    ) -> RankStability:
        """Bootstrap over prompts of angles [L, H], of which self.heads are the Gram matrices [L, H, P, P].

        names: of the P prompts, equal for equal prompts; costs: float64 [C, L, H], whose mean over other prompts is taken off
        the angles. Those prompts are resampled on their own.
        """
        import torch  # only these need it: what a run folder holds is shown without

        from ..ops.subspaces import resampled_angle_deg

        check_settings(k, resamples, confidence, seed)
        prompts, scanned = len(self.base), ~np.isnan(angles)
        distinct = len(set(names))
        if distinct < rank + 2:
            raise InputError(
                f"{counted(distinct, 'distinct prompt')} cannot be resampled at rank {rank}: take at least "
                f"{rank + 2}"
            )
        if not scanned.any():
            raise InputError("no head was scanned: there are no scores to rank")
        matrices = self.heads[scanned]
        if np.isnan(self.base).any() or np.isnan(matrices).any():
            raise InputError("the Gram matrices of some heads are missing: scan again into a new folder")
        settings = (rank, resamples, seed, scanned.tobytes())
        if settings not in self._resampled:  # the same for any k
            counts = resample_counts(names, resamples, rank + 1, np.random.default_rng(seed))
            every = np.concatenate([counts, 1 - np.eye(prompts)])  # and each prompt left out once
            self._resampled[settings] = resampled_angle_deg(
                torch.from_numpy(self.base),
                torch.from_numpy(matrices),
                rank,
                torch.from_numpy(every),
                progress,
            ).numpy()
        found = self._resampled[settings]
        without = found[resamples:]
        drawn, influence = found[:resamples], without.mean(axis=0) - without
        if costs is not None:
            angles, of_each, others = angles - costs.mean(0), costs[:, scanned], len(costs)
            # Other draws than those of the prompts: the two sets are independent samples.
            drawn = drawn - resampled_means(of_each, resamples, np.random.default_rng([seed, 1]))
            # How far the mean moves with each of its prompts left out, as for the angles.
            influence = np.concatenate([influence, (of_each.mean(0) - of_each) / max(1, others - 1)])
        return stability_of(
            angles, drawn, influence, k, prompts=prompts, resamples=resamples, confidence=confidence, seed=seed,
        )  # fmt: skip

    @staticmethod
    def work(angles: np.ndarray, prompts: int) -> int:
        """What the default resampling takes, in operations or so."""
        return (RESAMPLES + prompts) * int((~np.isnan(angles)).sum()) * prompts**3

    def part(self, names: tuple[str, ...], index: list[tuple[int, ...]]) -> pd.DataFrame:
        """Those of `index`, and the unablated model's as -1, as rows: the columns `names`, and the lower triangle."""
        import pandas as pd

        rows = np.tril_indices(len(self.base))
        frame = pd.DataFrame([[-1] * len(names), *index], columns=list(names), dtype=np.int32)
        frame["gram"] = [self.base[rows], *(self.heads[at][rows] for at in index)]
        return frame

    def read(self, path: Path, names: tuple[str, ...]) -> Grams:
        """Fill in what a run folder holds."""
        rows = np.tril_indices(len(self.base))
        for part, frame in read_parts(path, GRAMS, [*names, "gram"]):
            with damage(part):
                cells(frame[frame[names[0]] != -1], names, self.heads.shape[: len(names)])
                for *index, values in frame.itertuples(index=False):
                    into = self.base if index[0] == -1 else self.heads[tuple(index)]
                    into[rows] = into.T[rows] = values
        return self
