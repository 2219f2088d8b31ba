"""Sahara: a greedy search for the group of heads that carries a behaviour (arXiv 2410.13708, algorithm 1).

Each step is a growing-batch scan whose row 0 has the group so far switched off: the other rows fork from it with
one head more. What the steps share is computed once: the packed prompts, the unablated model's subspace, the
vectors that replace heads' outputs, the checks. With a beam, the W best groups are kept after every step instead
of one, and a set of heads that is reached in two orders is scored once.
"""

from __future__ import annotations

import time

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.heads import Head
from ..engine.measurement import ScanExecution, called_with
from ..models.restore import untouched
from ..results.gram_bootstrap import Grams
from ..results.sahara import STEP_COLUMNS, SaharaResult
from ..runs.folder import RunFolder
from ..runs.kinds import GRAMS, SCORES
from ..runs.tables import read_scores, score_frame
from .angles import AngleScan
from .measurements import SaharaMeasurement
from .prepare import prepare, progress_bar

TIE_DEG = 1e-9  # heads that can stand in for each other differ by rounding only


@called_with(
    SaharaMeasurement,
    ScanExecution,
    heads="the candidates: (layer, head) pairs, from 0; (layer, None) for a whole layer; None for all.",
)
@untouched
def sahara(
    model: PreTrainedModel, tokenizer, measurement: SaharaMeasurement, execution: ScanExecution
) -> SaharaResult:
    """Find a group of heads greedily: add the head that turns the prompts' subspace furthest, `group_size` times.

    Algorithm 1 of arXiv 2410.13708. In every step each remaining head is switched off together with the group so
    far, and scored by dataset-level Ships (see `scan_dataset`) against the unablated model. Ties, to
    1e-9 degrees, go to the lower (layer, head).

    Returns:
        SaharaResult: .heads in the order chosen, .angle_deg float64 [group_size, L, H], every step's scores.
    Raises:
        InputError: as `scan`, and for a rank, group size or beam that cannot be.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    measurement.check(len(prepared.token_ids), len(prepared.units), prepared.anatomy.hidden_size)
    group_size, beam, rank = measurement.group_size, measurement.beam, measurement.rank
    grid, out, identity = prepared.grid, execution.out, prepared.identity
    scores, folder = np.full((group_size, beam, *grid), np.nan), None
    if out is not None:
        folder = RunFolder(out, identity, prepared.record)
        found = folder.finished(SaharaResult.load)
        if found is not None:
            return found
        scores = read_scores(folder.path, scores.shape, STEP_COLUMNS, "angle_deg")
        prepared.continue_plan(folder)
        prepared.record["plan"] = prepared.plan.to_json()
        folder.write_manifest(folder.previous_measures() | prepared.record | {"status": "running"})
    grams = Grams.empty(len(prepared.token_ids), scores.shape)
    if grams is not None and folder is not None:
        grams = grams.read(folder.path, STEP_COLUMNS)

    groups = len(prepared.plan.prompt_groups)
    per_step = prepared.layer_passes(prepared.units, prepared.units, groups)
    total = per_step * (1 + (group_size - 1) * beam)
    with progress_bar("sahara", total, execution) as bar:
        angular = AngleScan(prepared, rank, bar, folder, None if grams is None else grams.base)
        search = _Search(prepared, angular, scores, grams, folder)
        seconds = []
        for step in range(group_size):
            bar.set_description(f"sahara, head {step + 1} of {group_size}")
            before = time.perf_counter()
            search.step(step)
            seconds.append(seconds_since(before))
        angular.complete()
        bar.total = bar.n
    best = search.beams[0]
    record = prepared.record | angular.record() | {
        "path": best.path,
        "step_seconds": seconds,
        "repeated_angle_max_abs_deg": search.repeated,
        "seconds": seconds_since(started),
    }  # fmt: skip
    angles = np.stack([scores[step, at] for step, at in enumerate(best.path)])
    kept = [(list(each.heads), each.angle) for each in search.beams]
    if grams is not None:
        grams = Grams(grams.base, np.stack([grams.heads[step, at] for step, at in enumerate(best.path)]))
    noise_floor = angular.noise_floor
    result = SaharaResult(list(best.heads), angles, kept, noise_floor, record, identity, grams)
    record["concentration"] = [result.concentration(step).to_json() for step in range(group_size)]
    if folder is not None:
        record["rank_stability"] = [result.stability_json(1, step) for step in range(group_size)]
        folder.write_manifest(record | result.outcome() | {"status": "complete", "noise_floor": noise_floor})
    return result


def _best(pool: list[tuple[float, int, Head]], count: int) -> list[tuple[float, int, Head]]:
    """The largest (angle, place in the beam, head). Equal up to rounding, the lower place and head comes first."""
    pool, kept = list(pool), []
    while pool and len(kept) < count:
        limit = max(pool)[0] - TIE_DEG
        won = min((entry for entry in pool if entry[0] >= limit), key=lambda entry: entry[1:])
        pool.remove(won)
        kept.append(won)
    return kept


class _Group:
    """A group of heads in the order chosen; path: in which place of the beam each of its beginnings stood."""

    def __init__(self, heads: tuple[Head, ...] = (), path: tuple[int, ...] = (), angle: float = 0.0) -> None:
        self.heads, self.path, self.angle = heads, list(path), angle


class _Search:
    def __init__(self, prepared, angular: AngleScan, scores: np.ndarray, grams: Grams | None, folder) -> None:
        self.prepared, self.angular, self.scores, self.grams, self.folder = (
            prepared, angular, scores, grams, folder,
        )  # fmt: skip
        self.beams = [_Group()]
        before = folder.previous_measures() if folder else {}
        # The group's own score, when it is row 0 of the next step, against the first time.
        self.repeated = before.get("repeated_angle_max_abs_deg", 0.0)

    def step(self, step: int) -> None:
        """Score every group of the beam with every head more, and keep the best."""
        known: dict[frozenset, tuple[int, Head]] = {}  # where a set of heads was scored: (place, head)
        pool = []
        for at, group in enumerate(self.beams):
            angles = self.scores[step, at]
            candidates = [u for u in self.prepared.units if u not in group.heads]
            sets = {u: frozenset((*group.heads, u)) for u in candidates}
            again = [u for u in candidates if sets[u] in known]
            if any(np.isnan(angles[u]) for u in again):
                part = np.full_like(angles, np.nan)
                for unit in again:
                    place, head = known[sets[unit]]
                    angles[unit] = part[unit] = self.scores[step, place][head]
                    if self.grams is not None:
                        self.grams.heads[step, at][unit] = self.grams.heads[step, place][head]
                self._keep(step, at, part, again)
            fresh = [u for u in candidates if sets[u] not in known]
            if any(np.isnan(angles[u]) for u in fresh):
                self.angular.run(
                    angles,
                    fresh,
                    group.heads,
                    lambda part, units, at=at, group=group: self._keep(step, at, part, units, group),
                    None if self.grams is None else self.grams.heads[step, at],
                )
            known |= {sets[u]: (at, u) for u in fresh}
            pool += [(float(angles[u]), at, u) for u in fresh]
        self.beams = [
            _Group((*self.beams[at].heads, unit), (*self.beams[at].path, at), angle)
            for angle, at, unit in _best(pool, self.scores.shape[1])
        ]

    def _keep(
        self, step: int, at: int, part: np.ndarray, units: list[Head], group: _Group | None = None
    ) -> None:
        """group: the one that was row 0, if the model has run for it."""
        if group is not None and group.heads:
            self.repeated = max(self.repeated, abs(self.angular.parent_angle - group.angle))
        if self.folder is None:
            return
        whole = np.full(self.scores.shape, np.nan)
        whole[step, at] = part
        frames = {SCORES: score_frame(whole, STEP_COLUMNS, "angle_deg")}
        if self.grams is not None:
            frames[GRAMS] = self.grams.part(STEP_COLUMNS, [(step, at, *unit) for unit in units])
        plan = self.prepared.plan.to_json()
        self.folder.write_parts(frames, plan=plan, repeated_angle_max_abs_deg=self.repeated)
