"""What Sahara returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, whole_number
from ..runs.kinds import CONTROL, CONTROL_COLUMNS, KINDS
from ..runs.manifest import read_manifest
from ..runs.tables import read_scores, score_frame
from .bootstrap import RankStability, as_known
from .equality import Compared
from .gram_bootstrap import RESAMPLES, Grams
from .head_map import HeadScore, Ranked, error_json, ranked, save_scores, share_of
from .statistics import Concentration, above_noise, concentration
from .subspace import ANGLE_LABEL, _stability, quick_angles

if TYPE_CHECKING:
    import pandas as pd

CONTROL_LABEL = "KL on control prompts, nats"
STEP_COLUMNS, KL = KINDS["sahara"].index, "kl_nats"


@dataclass(repr=False, eq=False)
class SaharaResult(Compared):
    """The group of heads that Sahara found (arXiv 2410.13708, algorithm 1).

    heads: (layer, head) in the order chosen; scores: the dataset-level Ships in degrees of the group after each.
    angle_deg: float64 [group_size, L, H], the score of the group so far with each further head; NaN where the head
        was already chosen (or not in `heads=`).
    beams: the groups kept at the end, best first, as (heads, angle in degrees).
    noise_floor: degrees, what packing, chunking and rounding alone make of a gain; error: a `ScoreError`, of gains. See
        results/score_error.py. Both are of angles, with a control too.
    control_by_prompt: float64 [group_size, C, L, H], nats, what the group with each further head does to each control prompt;
        None without a control. beam_control_kl_nats: the mean over these prompts of each group in beams.
    """

    heads: list[tuple[int, int]]
    angle_deg: np.ndarray
    beams: list[tuple[list[tuple[int, int]], float]] = field(default_factory=list)
    noise_floor: float = 0.0
    record: dict = field(default_factory=dict, compare=False)
    identity: dict = field(default_factory=dict)
    grams: Grams | None = field(default=None, compare=False)
    control_by_prompt: np.ndarray | None = None
    beam_control_kl_nats: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        found = ", ".join(f"{i}-{j}" for i, j in self.heads)
        control = (
            "" if self.penalty is None else f", control KL {self.chosen(self.control_kl_nats)[-1]:.4g} nats"
        )
        return f"SaharaResult({found}: {self.scores[-1]:.4g} degrees{control})"

    @property
    def scores(self) -> list[float]:
        return self.chosen(self.angle_deg)

    def chosen(self, scores: np.ndarray) -> list[float]:
        """Of scores [group_size, L, H], those of the group after each step."""
        return [float(scores[step, layer, head]) for step, (layer, head) in enumerate(self.heads)]

    @property
    def penalty(self) -> float | None:
        """Degrees that a nat of control KL cost; None without a control."""
        return None if self.control_by_prompt is None else float(self.identity["penalty"])

    @property
    def control_kl_nats(self) -> np.ndarray | None:
        """float64 [group_size, L, H]: the mean over the control prompts of KL(base || ablated) of the next token; None without
        a control."""
        return None if self.control_by_prompt is None else self.control_by_prompt.mean(1)

    @property
    def objective(self) -> np.ndarray:
        """float64 [group_size, L, H], degrees: of which each step took the largest. The angle, less penalty x control KL."""
        return (
            self.angle_deg if self.penalty is None else self.angle_deg - self.penalty * self.control_kl_nats
        )

    @property
    def gain_deg(self) -> np.ndarray:
        """float64 [group_size, L, H], degrees: what each further head adds to the score of the group so far."""
        return self.angle_deg - np.reshape([0.0, *self.scores[:-1]], (-1, 1, 1))

    unit, error = Ranked.unit, Ranked.error

    def top(self, k: int = 10, step: int = 0) -> list[HeadScore]:
        """The k best candidates of a step (from 0), by objective: without a control their angle."""
        return ranked(self.objective[self._step(step)], k)

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

        With k = 1, .top_k_frequency says how often each head would have been chosen. With a control its prompts are resampled
        too, on their own, and .mean, .low and .high are of the objective.
        """
        step = self._step(step)
        grams = None if self.grams is None else self.grams.at(step)
        costs = None if self.penalty is None else self.penalty * self.control_by_prompt[step]
        return _stability(self, self.angle_deg[step], grams, k, resamples, confidence, seed, progress, costs)

    def _step(self, step: int) -> int:
        step = whole_number("step", step, 0)
        if step >= len(self.heads):
            raise InputError(f"step {step} is not one of 0 to {len(self.heads) - 1}")
        return step

    def to_pandas(self) -> pd.DataFrame:
        """One row per step and head: step, layer, head, angle_deg, and with a control control_kl_nats and objective_deg."""
        names = ("step", "layer", "head")
        frame = score_frame(self.angle_deg, names, "angle_deg")
        if self.penalty is not None:
            at = tuple(frame[name] for name in names)
            frame["control_kl_nats"], frame["objective_deg"] = self.control_kl_nats[at], self.objective[at]
        return frame

    def quick_stability(self, k: int, step: int) -> tuple[RankStability | None, str]:
        """`stability` of a step for tables, plots and run folders; None and the reason where it cannot be."""
        return quick_angles(self.grams, self.angle_deg[step], lambda: self.stability(k, step))

    def stability_json(self, k: int, step: int) -> dict:
        """The same for run.json, and for a program to read."""
        return as_known(*self.quick_stability(k, step))

    def plot(self, path: str | Path | None = None, *, title: str | None = None):
        """Heatmaps of every step, the chosen head marked; with a control its KL below them. Returns the matplotlib Figure; saved if
        a path is given."""
        from .plots import steps

        count = range(len(self.heads))
        rows = [[self._panel(step) for step in count]]
        rows += [] if self.penalty is None else [[self._control_panel(step) for step in count]]
        ablation = self.record.get("ablation", "")
        control = "" if self.penalty is None else f"; objective: degrees - {self.penalty:g} x control KL"
        return steps(rows, title or f"Sahara, ablation: {ablation} (x: chosen before){control}", path)

    def _control_panel(self, step: int):
        from .plots import Panel

        nats, (layer, head) = self.control_kl_nats[step], self.heads[step]
        objective = self.chosen(self.objective)[step]
        return Panel(
            nats, self.unit, CONTROL_LABEL, weak=np.zeros(nats.shape, dtype=bool), weak_note="",
            title=f"{nats[layer, head]:.3g} nats: objective {objective:.5g}°",
            named=[HeadScore(layer, head, nats[layer, head])], chosen=self.heads[:step],
        )  # fmt: skip

    def _panel(self, step: int):
        from .plots import Panel

        angles, (layer, head) = self.angle_deg[step], self.heads[step]
        title = f"step {step + 1}: {self.scores[step]:.5g}°"
        stability, _ = self.quick_stability(1, step)
        if stability is not None:
            title += f"\nchosen in {stability.top_k_frequency[layer, head]:.0%} of resamples"
        return Panel(
            angles, self.unit, ANGLE_LABEL, title=f"{title}\n{share_of(self.concentration(step))}",
            weak=~self.above_noise()[step] & ~np.isnan(angles), weak_note="dot: gain not above the noise floor",
            named=[HeadScore(layer, head, angles[layer, head])], chosen=self.heads[:step],
        )  # fmt: skip

    def show(self, top: int, console) -> None:
        """Print the heads that were chosen, step by step."""
        from .tables import show_sahara

        show_sahara(self, console)

    def as_json(self, top: int) -> dict:
        """What a program reads of it: the group, how firm each step is, and what ran."""
        count = range(len(self.heads))
        return self.outcome() | {
            "noise_floor": self.noise_floor,
            "error": error_json(self.error),
            "record": self.record,
            "angle_deg": self.scores,
            **self._control_json(),
            "concentration": [self.concentration(step).to_json() for step in count],
            "stability": [self.stability_json(1, step) for step in count],
        }

    def _control_json(self) -> dict:
        if self.penalty is None:
            return {}
        nats, objective = self.chosen(self.control_kl_nats), self.chosen(self.objective)
        return {"penalty": self.penalty, "control_kl_nats": nats, "objective_deg": objective}

    def save(self, folder: str | Path) -> Path:
        """Write a run folder. Raises InputError if the folder holds anything else."""
        path = self.record.get("path") or [0] * len(self.heads)
        stored = np.full((len(self.heads), self.identity["beam"], *self.angle_deg.shape[1:]), np.nan)
        grams = self.grams and Grams(self.grams.base, np.empty((*stored.shape, *self.grams.base.shape)))
        control = None
        if self.control_by_prompt is not None:
            control = np.full((*stored.shape[:2], *self.control_by_prompt.shape[1:]), np.nan)
        for step, at in enumerate(path):
            stored[step, at] = self.angle_deg[step]
            if grams is not None:
                grams.heads[step, at] = self.grams.heads[step]
            if control is not None:
                control[step, at] = self.control_by_prompt[step]
        record = self.record | self.outcome() | {"noise_floor": self.noise_floor}
        return save_scores(
            folder,
            self.identity,
            record,
            stored,
            STEP_COLUMNS,
            "angle_deg",
            grams,
            beside=lambda new: self._beside(control, new),
        )

    @staticmethod
    def _beside(control: np.ndarray | None, new: np.ndarray) -> dict[str, pd.DataFrame]:
        """Parts that belong to the `new` angles [group_size, beam, L, H]."""
        if control is None:
            return {}
        some = np.where(np.isnan(new)[:, :, None], np.nan, control)
        return {CONTROL: score_frame(some, CONTROL_COLUMNS, KL)}

    def outcome(self) -> dict:
        """The outcome as run.json has it."""
        beams = [{"heads": [list(h) for h in group], "angle_deg": angle} for group, angle in self.beams]
        for beam, nats in zip(beams, self.beam_control_kl_nats, strict=False):
            beam["control_kl_nats"] = nats
        return {"chosen": [list(h) for h in self.heads], "beams": beams}

    @classmethod
    def load(cls, folder: str | Path) -> SaharaResult:
        """Read the run folder of a finished search."""
        folder = Path(folder)
        manifest = read_manifest(folder, "sahara")
        if manifest.get("status") != "complete":
            raise InputError(f"{folder} holds a search that is not finished: run it again to continue")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        heads = [tuple(h) for h in manifest.pop("chosen")]
        kept = manifest.pop("beams")
        beams = [([tuple(h) for h in b["heads"]], b["angle_deg"]) for b in kept]
        shape = (len(heads), identity["beam"], *identity["shape"][1:])
        stored = read_scores(folder, shape, STEP_COLUMNS, "angle_deg")
        path = manifest.get("path") or [0] * len(heads)
        angles = np.stack([stored[step, beam] for step, beam in enumerate(path)])
        grams = Grams.empty(identity["shape"][0], shape)
        if grams is not None:
            every = grams.read(folder, STEP_COLUMNS).heads
            grams = Grams(grams.base, np.stack([every[step, beam] for step, beam in enumerate(path)]))
        control, nats = None, []
        if identity.get("control") is not None:
            shape = (*shape[:2], len(identity["control"]["prompts"]), *shape[2:])
            every = read_scores(folder, shape, CONTROL_COLUMNS, KL, room=CONTROL)
            control = np.stack([every[step, beam] for step, beam in enumerate(path)])
            nats = [b["control_kl_nats"] for b in kept]
        noise = manifest.get("noise_floor") or 0.0
        return cls(heads, angles, beams, noise, manifest, identity, grams, control, nats)
