"""One metric of one ablation of a scan: its scores so far, its noise floor, and the run folder that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..engine.heads import Head
from ..errors import InputError, note
from ..results.cells import cells_of
from ..results.score_error import Rescored, ScoreError
from ..results.ships import MARKED, ShipsResult, ablation_place, also_place, column
from ..results.sink_mass import SinkMass
from ..runs.folder import RunFolder
from ..runs.tables import read_scores, score_frame
from ..text import counted
from .hidden_metrics import HiddenMetric
from .metrics import Metric, as_metrics
from .prepare import Prepared


def measures_of(
    passes: Sequence[Prepared], tokenizer, control: Sequence[Prepared] | None
) -> list[list[Measure]]:
    """For each ablation one for each metric asked for, with its run folder: `out`, and folders in it for all but the first.
    control: a scan that is a part of this one."""
    first, out = passes[0], passes[0].execution.out
    metrics = metrics_of(first, tokenizer)
    others = {"further_metrics": [each.describe() for each in metrics[1:]]} if metrics[1:] else {}
    by_number = {
        number: (each, lead)
        for lead in passes
        for number, each in zip(lead.numbers, (lead, *lead.others), strict=True)
    }
    further = [by_number[number][0].identity["ablation"] for number in range(1, len(by_number))]
    more = {"further_ablations": further} if further else {}
    if control is not None:
        more["control"] = {"prompts": control[0].identity["prompts"]}
    found = []
    for number in range(len(by_number)):
        place = None if out is None else Path(out) / (ablation_place(number) if number else "")
        of_first = others | (more if number == 0 else {})
        found.append(
            [
                Measure(
                    *by_number[number],
                    metric,
                    place and (place / also_place(at) if at else place),
                    {} if at else of_first,
                )
                for at, metric in enumerate(metrics)
            ]
        )
    return found


def metrics_of(prepared: Prepared, tokenizer) -> list[Metric]:
    """The metrics that a scan is asked for, for the model at hand. Raises InputError for those that it cannot have."""
    metrics = as_metrics(prepared.measurement.metric, tokenizer, prepared.anatomy.vocab_size)
    metrics = [fitted(each, prepared) for each in metrics]
    own = next((each.name for each in metrics if each.of_answers), None)
    if own is not None and prepared.targets is None:
        raise InputError(f"metric {own} is of an answer's own tokens: give answers (--answer-column)")
    if prepared.execution.out is not None and not all(each.is_named for each in metrics):
        name = next(each.name for each in metrics if not each.is_named)
        raise InputError(
            f"metric {name} has no name of its own, so a run folder cannot tell it from others: define it "
            "as a function of a module, or leave out= away and save the result"
        )
    return metrics


def fitted(metric: Metric, prepared: Prepared) -> Metric:
    """A metric of hidden states, for the model at hand; any other as it is."""
    if not isinstance(metric, HiddenMetric):
        return metric
    hidden = getattr(prepared.model.config.get_text_config(), "hidden_size", None)
    made_of = getattr(metric, "made_of", "")
    if made_of and made_of != prepared.identity["fingerprint"]:
        note(f"metric {metric.name}: its direction is of other weights, or of these in another dtype")
    return metric.fitted(len(prepared.anatomy.blocks), hidden, prepared.model.dtype)


def finished(by_ablation: Sequence[Sequence[Measure]]) -> ShipsResult | None:
    """What their folders hold, where all are finished. Raises InputError for marked scores where none are wanted."""
    found = [[measure.finished() for measure in measures] for measures in by_ablation]
    if any(None in results for results in found):
        return None
    return together([replace(main, also=_by_name(others)) for main, *others in found])


def results_of(by_ablation: Sequence[Sequence[Measure]]) -> ShipsResult:
    """The first one's run folder is finished last: complete, it says that all are."""
    *further, first = [
        main.result(_by_name([measure.result() for measure in others]))
        for main, *others in reversed(by_ablation)
    ]
    return together([first, *reversed(further)])


def together(results: Sequence[ShipsResult]) -> ShipsResult:
    first, *further = results
    return first.with_further(further) if further else first


def about(metric: Metric) -> dict:
    """What the record says of it."""
    return {"name": metric.name, "unit": metric.unit, "signed": metric.signed, "label": metric.label}


def _by_name(results: Sequence[ShipsResult]) -> dict[str, ShipsResult]:
    return {result.metric["name"]: result for result in results}


def refuse_marks(prepared: Prepared, marked: np.ndarray, path: Path) -> None:
    """Raises InputError for marked scores in a run folder, by reads or by prompts, where none are wanted."""
    if marked.any() and prepared.measurement.nonfinite != "mark":
        read, layer, index = map(int, np.argwhere(marked)[0])
        where = prepared.read_name(read) if len(marked) == len(prepared.read_ids) else f"prompt {read}"
        raise InputError(
            f"{path} holds {counted(int(marked.sum()), 'marked score')}: the score of {prepared.unit} "
            f"{layer}-{index} on {where} is not a number; go on with nonfinite='mark' (--nonfinite mark), or "
            "choose another output folder"
        )


class Kept:
    """Scores of a metric so far, float64 [M, L, H] by reads, in memory, and what is known of their error."""

    def __init__(self, prepared: Prepared, metric: Metric, record: dict) -> None:
        """record: to which is added what is found beside the scores."""
        self.prepared, self.metric, self.record = prepared, metric, record
        self.scores = np.full((len(prepared.read_ids), *prepared.grid), np.nan)
        self.mark = prepared.measurement.nonfinite == "mark"  # scores that are not finite
        self.marked = np.zeros(self.scores.shape, dtype=bool)
        self.noise_floor, self.compared = 0.0, False  # what packing does
        self.plain: list[Rescored] = []  # scores that plain passes in the model's own dtype gave

    def keep(self, scores: np.ndarray, reads: Sequence[int], block: Sequence[Head]) -> None:
        """Take what is missing of scores [units, reads] of a block of units at the reads packed together; what is not finite is
        marked."""
        part, marked = np.full_like(self.scores, np.nan), np.zeros_like(self.marked)
        for (layer, index), row in zip(block, scores, strict=True):
            bad = ~np.isfinite(row)
            part[list(reads), layer, index] = np.where(bad, np.nan, row)
            marked[list(reads), layer, index] = bad
        known = ~self.missing()
        part[known], marked[known] = np.nan, False
        self._write_part(part, marked)  # first: what runs out of memory or disk here is still missing
        new = ~np.isnan(part)
        self.scores[new] = part[new]
        self.marked |= marked

    def missing(self) -> np.ndarray:
        """bool [M, L, H]: neither a number nor marked."""
        return np.isnan(self.scores) & ~self.marked

    def keep_noise(self, noise: float) -> None:
        self.noise_floor, self.compared = max(self.noise_floor, noise), True
        self._write()  # before the first scores are

    def knows_error(self, asked: int) -> bool:
        """Whether it was measured before the run was cut, if it is `asked` for."""
        return "error" in self.record and ScoreError.from_json(self.record["error"]).settles(asked)

    def keep_error(self, error: ScoreError) -> None:
        self.record["error"] = error.to_json()
        self._write()

    def _write_part(self, part: np.ndarray, marked: np.ndarray) -> None:
        """Put new scores, and marks, where they are kept; before they count."""

    def _write(self) -> None:
        """The same of the record."""


class Measure(Kept):
    """One metric of one ablation of a scan, with its run folder."""

    def __init__(
        self, prepared: Prepared, lead: Prepared, metric: Metric, path: Path | None, others: dict
    ) -> None:
        """lead: whose plan it goes by, of the ablations that go through together; others: what the identity says of further metrics
        and ablations of the same scan."""
        super().__init__(prepared, metric, prepared.record | {"metric": about(metric)})
        self.lead, self.folder = lead, None
        self.identity = prepared.identity | {"metric": metric.describe()} | others
        if path is not None:
            self.folder = RunFolder(path, self.identity, self.record)

    def take(self) -> None:
        """Read what the folder holds. Raises InputError for marked scores where none are wanted."""
        at = cells_of(self.identity)
        done = np.zeros(at.shape, dtype=bool)
        self.scores = at.flat(
            read_scores(self.folder.path, at.shape, at.names, column(self.record["metric"]), done)
        )
        self.marked = at.flat(done) & ~np.isfinite(self.scores)
        self.scores[self.marked] = np.nan
        self.record |= {k: self.folder.previous[k] for k in (MARKED,) if k in self.folder.previous}
        refuse_marks(self.prepared, self.marked, self.folder.path)

    def finished(self) -> ShipsResult | None:
        """What the folder holds, if the run is finished, without further metrics."""
        found = self.folder.finished(ShipsResult.load_one)
        if found is not None and found.marked is not None:
            refuse_marks(self.prepared, found.marked, self.folder.path)
        return found

    def begin(self) -> None:
        """Say in the folder that the run goes on."""
        before = self.folder.previous_measures()
        self.noise_floor = before.get("packing_noise", before.get("noise_floor", 0.0))
        self.compared = "noise_floor" in before and self.folder.same_environment
        if "error" in before and self.folder.same_environment:
            self.record["error"] = before["error"]
        self.record["plan"] = self.lead.plan.to_json()
        self.folder.write_manifest(before | self.record | {"status": "running"})

    def _write_part(self, part: np.ndarray, marked: np.ndarray) -> None:
        if self.folder is not None:
            value, at = column({"name": self.metric.name}), cells_of(self.identity)
            frame = score_frame(at.padded(part, np.nan), at.names, value, at.padded(marked, False))
            self.folder.write_part(frame, plan=self.lead.plan.to_json())

    def keep_sinks(self, measured: Callable[[], SinkMass | None]) -> None:
        """Put what heads rest on into the record, as an earlier part of the run found it, or as it is measured now."""
        before = self.folder.previous if self.folder is not None and self.folder.same_environment else {}
        sinks = SinkMass.from_json(before["sink_mass"]) if "sink_mass" in before else measured()
        if sinks is not None:
            self.record["sink_mass"] = sinks.to_json()

    def _write(self) -> None:
        noise = {"noise_floor": self.noise_floor, "packing_noise": self.noise_floor}
        if self.folder is not None:
            self.folder.write_manifest(self.record | {"status": "running"} | noise)

    def result(self, also: dict[str, ShipsResult] | None = None) -> ShipsResult:
        """The finished result; its run folder says so."""
        marked = self.marked if self.marked.any() else None
        if marked is None:  # those that a run begun elsewhere had were lost with their part
            self.record.pop(MARKED, None)
        self.record["packing_noise"], floor = self.noise_floor, self.noise_floor
        if "error" in self.record:
            floor = max(floor, ScoreError.from_json(self.record["error"]).floor)
        result = ShipsResult.of_reads(self.scores, floor, self.record, self.identity, also or {}, marked)
        self.record["concentration"] = result.concentration().to_json()
        if not np.isnan(result.mean()).all():
            self.record["rank_stability"] = result.stability().to_json()
        if self.folder is not None:
            self.folder.write_manifest(self.record | {"status": "complete", "noise_floor": floor})
        return result
