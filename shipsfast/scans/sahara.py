"""Sahara: a greedy search for the group of heads that carries a behaviour (arXiv 2410.13708, algorithm 1).

Each step is a growing-batch scan whose row 0 has the group so far switched off: the other rows fork from it with
one head more. What the steps share is computed once: the packed prompts, the unablated model's subspace, the
vectors that replace heads' outputs, the checks. With a beam, the W best groups are kept after every step instead
of one, and a set of heads that is reached in two orders is scored once. With a control, every group also goes through
ordinary prompts (search_control.py), and what it does to them is taken off its angle.
"""

from __future__ import annotations

import functools
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
from .angles import AngleScan, AngleStore
from .measurements import SaharaMeasurement
from .prepare import prepare
from .rescoring import rescore_angles
from .scan_bar import ScanBar
from .search_control import ControlScan

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

    With `control`, a step adds the head with the largest objective instead: angle in degrees - penalty x the mean over the
    control prompts of KL(p(base) || p(ablated)), in nats, of the next token. It takes a scan of these prompts more in every
    step. A group that turns the subspace by breaking the model for all prompts alike then pays for it.

    Returns:
        SaharaResult: .heads in the order chosen, .angle_deg float64 [group_size, L, H], every step's scores; with a control
        .control_kl_nats and .objective of the same shape.
    Raises:
        InputError: as `scan`, and for a rank, group size or beam that cannot be.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    measurement.check(len(prepared.token_ids), len(prepared.units), prepared.anatomy.hidden_size)
    group_size, beam, identity = measurement.group_size, measurement.beam, prepared.identity
    control = None
    if measurement.control is not None:
        control = ControlScan(prepared, tokenizer, (group_size, beam))
        identity = identity | control.identity()
    folder = None if execution.out is None else RunFolder(execution.out, identity, prepared.record)
    found = folder and folder.finished(SaharaResult.load)
    if found is not None:
        return found
    if control is not None and folder is not None:
        control.go_on(folder)
    store = AngleStore(prepared, folder, STEP_COLUMNS, (group_size, beam, *prepared.grid))

    groups = len(prepared.plan.prompt_groups)
    per_step = prepared.layer_passes(prepared.units, prepared.units, groups)
    rounds = 1 + (group_size - 1) * beam
    prompts = len(prepared.token_ids)
    if control is not None:
        per_step, prompts = per_step + control.layer_passes, prompts + len(control.prepared.token_ids)
    scores = rounds * len(prepared.units) * prompts
    with ScanBar("sahara", rounds * per_step, scores, prepared, execution) as bar:
        angular = AngleScan(store, bar)
        search = _Search(angular, control)
        seconds = []
        for step in range(group_size):
            bar.set_description(f"sahara, head {step + 1} of {group_size}", refresh=False)
            before = time.perf_counter()
            search.step(step)
            seconds.append(seconds_since(before))
        angular.complete()
        bar.total = bar.n
    best = search.beams[0]
    angles = np.stack([store.angles[step, at] for step, at in enumerate(best.path)])
    error = rescore_angles(store, angles, measurement.rank, angular.noise_floor, best.heads)
    record = prepared.record | angular.record() | {
        "path": best.path,
        "error": error.to_json(),
        "step_seconds": seconds,
        "repeated_angle_max_abs_deg": search.repeated,
        "seconds": seconds_since(started),
    } | ({} if control is None else control.record())  # fmt: skip
    kept = [(list(each.heads), each.angle) for each in search.beams]
    grams = store.grams
    if grams is not None:
        grams = Grams(grams.base, np.stack([grams.heads[step, at] for step, at in enumerate(best.path)]))
    noise_floor = error.floor
    result = SaharaResult(list(best.heads), angles, kept, noise_floor, record, identity, grams)
    if control is not None:
        result.control_by_prompt = np.stack([control.kl_nats[step, at] for step, at in enumerate(best.path)])
        result.beam_control_kl_nats = [each.control_kl_nats for each in search.beams]
    record["concentration"] = [result.concentration(step).to_json() for step in range(group_size)]
    if folder is not None:
        record["rank_stability"] = [result.stability_json(1, step) for step in range(group_size)]
        folder.write_manifest(record | result.outcome() | {"status": "complete", "noise_floor": noise_floor})
    return result


def _best(pool: list[tuple[float, int, Head]], count: int) -> list[tuple[float, int, Head]]:
    """The largest (objective, place in the beam, head). Equal up to rounding, the lower place and head comes first."""
    pool, kept = list(pool), []
    while pool and len(kept) < count:
        limit = max(pool)[0] - TIE_DEG
        won = min((entry for entry in pool if entry[0] >= limit), key=lambda entry: entry[1:])
        pool.remove(won)
        kept.append(won)
    return kept


class _Group:
    """A group of heads in the order chosen.

    path: in which place of the beam each of its beginnings stood; angle: degrees; control_kl_nats: what it does to the
    control prompts, on average.
    """

    def __init__(
        self,
        heads: tuple[Head, ...] = (),
        path: tuple[int, ...] = (),
        angle: float = 0.0,
        control_kl_nats: float = 0.0,
    ) -> None:
        self.heads, self.path, self.angle, self.control_kl_nats = heads, list(path), angle, control_kl_nats


class _Search:
    def __init__(self, angular: AngleScan, control: ControlScan | None = None) -> None:
        self.angular, self.store, self.control = angular, angular.store, control
        self.penalty = self.store.prepared.measurement.degrees_per_nat
        self.beams = [_Group()]
        # The group's own score, when it is row 0 of the next step, against the first time.
        self.repeated = self.store.before.get("repeated_angle_max_abs_deg", 0.0)

    def step(self, step: int) -> None:
        """Score every group of the beam with every head more, and keep the best."""
        store = self.store
        known: dict[frozenset, tuple[int, ...]] = {}  # where a set of heads was scored
        pool = []
        for place, group in enumerate(self.beams):
            at, angles = (step, place), store.angles[step, place]
            candidates = [u for u in store.prepared.units if u not in group.heads]
            sets = {u: frozenset((*group.heads, u)) for u in candidates}
            again = [u for u in candidates if sets[u] in known]
            if any(np.isnan(angles[u]) for u in again):
                part = np.full_like(angles, np.nan)
                for unit in again:
                    angles[unit] = part[unit] = store.angles[known[sets[unit]]]
                    if store.grams is not None:
                        store.grams.heads[(*at, *unit)] = store.grams.heads[known[sets[unit]]]
                store.keep(at, part, again, repeated_angle_max_abs_deg=self.repeated)
            fresh = [u for u in candidates if sets[u] not in known]
            if any(np.isnan(angles[u]) for u in fresh):
                self.angular.run(at, fresh, group.heads, functools.partial(self._keep, group))
            if self.control is not None:
                self.control.take(at, {u: known[sets[u]] for u in again})
                self.control.run(at, fresh, group.heads, self.angular.bar)
            known |= {sets[u]: (*at, *u) for u in fresh}
            objective = self._objective(at)
            pool += [(float(objective[u]), place, u) for u in fresh]
        self.beams = [self._grown(step, place, unit) for _, place, unit in _best(pool, store.angles.shape[1])]

    def _objective(self, at: tuple[int, ...]) -> np.ndarray:
        """Degrees, [L, H]."""
        angles = self.store.angles[at]
        return angles if self.control is None else angles - self.penalty * self.control.mean(at)

    def _grown(self, step: int, place: int, unit: Head) -> _Group:
        """A group of the beam with one unit more."""
        before, angle = self.beams[place], float(self.store.angles[step, place][unit])
        nats = 0.0 if self.control is None else float(self.control.mean((step, place))[unit])
        return _Group((*before.heads, unit), (*before.path, place), angle, nats)

    def _keep(self, group: _Group, at: tuple[int, ...], part: np.ndarray, units: list[Head]) -> None:
        """group: the one that was row 0."""
        if group.heads:
            self.repeated = max(self.repeated, abs(self.angular.parent_angle - group.angle))
        self.store.keep(at, part, units, repeated_angle_max_abs_deg=self.repeated)
