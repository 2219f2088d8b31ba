"""What a search for the top heads has found so far, and the run folder that keeps it: exact scores and screened ones, by prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ..clock import seconds_since
from ..engine.flops import scan_flops
from ..engine.heads import Head
from ..errors import note
from ..results.certificate import Certificate
from ..results.ships import MARKED, column
from ..results.top_heads import COLUMNS, TopHeads
from ..runs.folder import RunFolder
from ..runs.kinds import SCORES, SCREEN
from ..runs.tables import read_scores, score_frame
from .metrics import Metric
from .prepare import Prepared, part_of, work_of
from .score_store import Kept, about, fitted, refuse_marks
from .ships import _Work

ROOMS = (SCORES, SCREEN)
KEPT = (
    "screen",
    "round_ends",
    "plans",
    "scan_flops",
    MARKED,
)  # of what an unfinished run has found, beside scores


class SearchStore:
    """scores, marked: of each room [P, L, H]; record: for run.json; flops, seconds: spent in each room."""

    def __init__(self, prepared: Prepared, metric: Metric) -> None:
        self.prepared, self.metric = prepared, metric
        self.identity = prepared.identity | {"metric": metric.describe()}
        self.record = prepared.record | {"metric": about(metric), "plans": {}}
        self.shape = (len(prepared.token_ids), *prepared.grid)
        self.scores = {room: np.full(self.shape, np.nan) for room in ROOMS}
        self.marked = {room: np.zeros(self.shape, dtype=bool) for room in ROOMS}
        self.noise = dict.fromkeys(ROOMS, 0.0)  # what packing does
        self.compared = dict.fromkeys(ROOMS, False)  # whether it was measured
        self.flops, self.seconds = dict.fromkeys(ROOMS, 0), dict.fromkeys(ROOMS, 0.0)
        self.folder, out = None, prepared.execution.out
        if out is not None:
            self.folder = RunFolder(out, self.identity, self.record)

    def finished(self) -> TopHeads | None:
        found = None if self.folder is None else self.folder.finished(TopHeads.load)
        if found is not None and found.marked is not None:
            refuse_marks(self.prepared, found.marked, self.folder.path)
        return found

    def begin(self) -> None:
        """Take what an unfinished run has left, and say in the folder that it goes on."""
        if self.folder is None:
            return
        before, value = self.folder.previous, column(self.record["metric"])
        for room in ROOMS:
            done = np.zeros(self.shape, dtype=bool)
            self.scores[room] = read_scores(self.folder.path, self.shape, COLUMNS, value, done, room)
            self.marked[room] = done & np.isnan(self.scores[room])
        refuse_marks(self.prepared, self.marked[SCORES], self.folder.path)
        self.record |= {name: before[name] for name in KEPT if name in before}
        measured = self.folder.previous_measures()
        self.noise[SCORES] = measured.get("packing_noise", 0.0)
        if self.folder.same_environment:
            self.compared[SCORES] = "packing_noise" in measured
            self.record |= {name: measured[name] for name in ("error",) if name in measured}
        known = sum(int((~np.isnan(self.scores[room])).sum()) for room in ROOMS)
        if known and self.prepared.execution.progress:
            note(f"{self.folder.path} has {known:,} scores, and goes on")
        self.write()

    def write(self, status: str = "running", **more) -> None:
        if self.folder is not None:
            known, noise = self.compared[SCORES], self.noise[SCORES]
            noise = {"packing_noise": noise, "noise_floor": noise} if known else {}
            self.folder.write_manifest(self.record | noise | more | {"status": status})

    def run(
        self,
        whole: Prepared,
        room: str,
        number: int,
        prompts: Sequence[int],
        units: Sequence[Head],
        name: str,
    ) -> None:
        """Score these units on these prompts by the model of `whole`, but for what is known. number: of this stage in its room;
        name: of the progress bar."""
        prepared, plan = part_of(whole, prompts, units), f"{room} {number}"
        if self.folder is not None:
            prepared.continue_with(self.folder.previous.get("plans", {}).get(plan), self.folder)
        began, work = time.perf_counter(), _Work(prepared, [[Stage(self, prepared, room, plan)]], name)
        try:
            work.run()
        finally:
            work.bar.close()
        self.record["plans"][plan] = prepared.plan.to_json()
        self.flops[room] += flops_of(prepared)
        self.seconds[room] += seconds_since(began)

    def take(self, stage: Stage, part: np.ndarray, marked: np.ndarray) -> None:
        """New scores of a stage, which are NaN where there is none: to the disk first."""
        whole, marks = np.full(self.shape, np.nan), np.zeros(self.shape, dtype=bool)
        whole[stage.prompts], marks[stage.prompts] = part, marked
        self.record["plans"][stage.name] = stage.prepared.plan.to_json()
        if self.folder is not None:
            frame = score_frame(whole, COLUMNS, column(self.record["metric"]), marks)
            self.folder.write_part(frame, stage.room, plans=self.record["plans"])
        new = ~np.isnan(whole)
        self.scores[stage.room][new] = whole[new]
        self.marked[stage.room] |= marks

    def forget_screen(self, why: str) -> None:
        """What a screen has found that turned out not to run: there is none, and the search begins anew."""
        self.scores[SCREEN][:], self.marked[SCREEN][:], self.flops[SCREEN] = np.nan, False, 0
        self.record["screen"] = {"dtype": None, "why": why}
        self.record.pop("round_ends", None)
        self.record["plans"] = {
            name: plan for name, plan in self.record["plans"].items() if not name.startswith(SCREEN)
        }
        gone = [] if self.folder is None else self.folder.leave_out(SCREEN)
        self.write()
        for part in gone:
            part.unlink(missing_ok=True)

    def result(self, certificate: Certificate, upper: np.ndarray, floor: float) -> TopHeads:
        """The finished result; its run folder says so."""
        if not self.marked[SCORES].any():
            self.record.pop(MARKED, None)
        self.record |= {
            "packing_noise": self.noise[SCORES],
            "noise_floor": floor,
            "scan_seconds": sum(self.seconds.values()),
        }
        if self.record["screen"]["dtype"] is not None:
            self.record["screen"]["seconds"] = self.seconds[SCREEN]
        result = TopHeads.of(self.scores, self.marked[SCORES], upper, certificate, self.record, self.identity)
        if self.folder is not None:
            rows = {room: int((~np.isnan(self.scores[room]) | self.marked[room]).sum()) for room in ROOMS}
            self.folder.write_manifest(self.record | result.outcome() | {"rows": rows, "status": "complete"})
        return result


class Stage(Kept):
    """Some heads on some prompts, which run at once. name: of its plan."""

    def __init__(self, store: SearchStore, prepared: Prepared, room: str, name: str) -> None:
        """prepared: of these prompts and heads only, by the model whose scores the room holds."""
        exact = room == SCORES
        super().__init__(
            prepared, fitted(store.metric, prepared), store.record if exact else store.record["screen"]
        )
        self.store, self.room, self.name = store, room, name
        self.prompts = list(range(len(prepared.token_ids))) if prepared.of_all is None else prepared.of_all
        self.scores, self.marked = store.scores[room][self.prompts], store.marked[room][self.prompts]
        self.mark |= not exact  # the head is scored exactly then
        self.noise_floor, self.compared = store.noise[room], store.compared[room]

    def _write_part(self, part: np.ndarray, marked: np.ndarray) -> None:
        self.store.take(self, part, marked)

    def _write(self) -> None:
        store, room = self.store, self.room
        store.noise[room], store.compared[room] = self.noise_floor, self.compared
        if room == SCREEN:
            self.record["packing_noise"] = self.noise_floor
        store.write()


def flops_of(prepared: Prepared) -> int:
    """Of a scan as it is planned."""
    work = work_of(
        prepared.model, prepared.anatomy, prepared.measurement, prepared.device, fused=prepared.fused
    )
    some, held = prepared.counting(prepared.units), prepared.plan.needs.held
    packs = [held.pack(prepared.sequences.ids, group) for group in prepared.plan.prompt_groups]
    return scan_flops(
        work.costs, packs, some, blocks=prepared.plan.blocks(some), ends_alone=prepared.ends_alone
    ) if some else 0  # fmt: skip
