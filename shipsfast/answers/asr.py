"""The exhaustive full-generation scan: the attack success rate of every single head.

It is the experiment that arXiv 2410.13708 prices at about 850 GPU-hours (table 2) and scores heads by the next token
instead to avoid. Here it is a generation like any other, with one group per head.
"""

from __future__ import annotations

import time

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.measurement import called_with
from ..models.restore import untouched
from ..results.completions import MISSING, Completions
from ..results.ships import ShipsResult, column
from ..runs.folder import RunFolder
from ..runs.kinds import LABELS
from ..runs.tables import score_frame
from .evaluate import judge_of
from .generation import prepare_generation
from .label import Kept, answer
from .measurements import AsrMeasurement, JudgedExecution

METRIC = {
    "name": "asr",
    "unit": "",
    "signed": False,
    "title": "Attack success rate",
    "label": "attack success rate with the head off",
    "floor": "the unablated model's rate",
}
NAMES = ("prompt", "layer", "head")


@called_with(AsrMeasurement, JudgedExecution)
@untouched
def scan_asr(
    model: PreTrainedModel, tokenizer, measurement: AsrMeasurement, execution: JudgedExecution
) -> ShipsResult:
    """Answer every prompt with every head off, one at a time, and judge the answers.

    `resample`, which matches positions one to one, is refused.

    Returns:
        ShipsResult of the metric "asr": .scores float64 [P, L, H] are 1 for an answer that complied and 0 for one that
        did not, .mean() is each head's attack success rate, .noise_floor that of the unablated model. .record has
        its share of refusals and degenerate answers as well, and, beside the scores, mean shares of "degenerate" by
        head are in .record["degenerate"], [L][H].
    Raises:
        As `evaluate` does.
    """
    started = time.perf_counter()
    judge = judge_of(measurement, tokenizer, execution)
    generation = prepare_generation(model, tokenizer, measurement, execution)
    subject, units = generation.subject, [unit for group in generation.asked for unit in group]
    shape = [len(subject.token_ids), subject.anatomy.num_layers, subject.num_units]
    identity = subject.identity | {
        "metric": {"name": "asr", "judge": judge.describe(), "generation": generation.describe()},
        "heads": "all" if len(units) == shape[1] * shape[2] else [list(u) for u in units],
        "shape": shape,
        "keep_text": measurement.keep_text,
    }
    folder = None if execution.out is None else RunFolder(execution.out, identity, subject.record)
    found = folder and folder.finished(ShipsResult.load)
    if found is not None:
        return found
    record = subject.record | {"metric": METRIC, "plan": generation.plan.to_json(), "judge": judge.name}
    completions = Completions(1 + len(units), shape[0], keep_text=measurement.keep_text)
    kept = Kept(completions, folder)
    if folder is not None:
        folder.write_manifest(record | {"status": "running"})
    scan_started = time.perf_counter()
    record["spot_check_max_deficit"] = answer(generation, judge, kept, execution.progress)
    record |= {
        "plan": generation.plan.to_json(),
        "scan_seconds": seconds_since(scan_started),
        "unablated": {label: float(completions.share(label)[0]) for label in LABELS},
    }
    layers, heads = np.transpose(units)
    labels, scores = completions.label[1:].T, np.full(shape, np.nan)
    scores[:, layers, heads] = np.where(labels == MISSING, np.nan, labels == LABELS.index("complied"))
    degenerate = np.full(shape[1:], None)  # None stays where a head was not scanned
    degenerate[layers, heads] = completions.share("degenerate")[1:]
    record["degenerate"] = degenerate.tolist()
    result = ShipsResult(scores, float(completions.share("complied")[0]), record, identity)
    record["concentration"] = result.concentration().to_json()
    record["seconds"] = seconds_since(started)
    if folder is not None:
        kept = ShipsResult.read(folder.path, tuple(shape), METRIC)
        new = np.where(np.isnan(kept), result.scores, np.nan)  # none twice
        folder.write_part(score_frame(new, NAMES, column(METRIC)))
        folder.write_manifest(record | {"status": "complete", "noise_floor": result.noise_floor})
    return result
