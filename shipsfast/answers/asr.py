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
from ..results.evaluation_warnings import of_baseline, of_limit
from ..results.incoherence import limit_nats, mark, rule
from ..results.ships import ShipsResult, column
from ..runs.folder import RunFolder
from ..runs.kinds import LABELS
from ..runs.tables import read_scores, score_frame
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
        its share of every label as well (.record["unablated"]), its scores by prompt (.record["unablated_scores"]),
        and for each head, [L][H] with None where it was not scanned: the shares of "degenerate" and "incoherent", the share
        "cut" by max_new_tokens, and the "perplexity" of its answers under the unablated model. .difference(layer, head) is
        the head's rate less the unablated model's. .record["warnings"] are sentences.
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
        "incoherent": None if judge.is_final else rule(subject.anatomy.vocab_size),
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
    own = completions.rows(slice(1))
    limit = limit_nats(identity["incoherent"], [own])
    mark(identity["incoherent"], limit, completions)
    record |= {
        "plan": generation.plan.to_json(),
        "scan_seconds": seconds_since(scan_started),
        "unablated": {label: float(own.share(label)[0]) for label in LABELS}
        | {"perplexity": float(own.perplexity()[0]), "cut": float(own.cut()[0])},
        "unablated_scores": (own.label[0] == LABELS.index("complied")).astype(int).tolist(),
        "incoherent_above_nats": limit,
        "warnings": [*of_baseline(own), *of_limit(completions, measurement.max_new_tokens)],
    }
    layers, heads = np.transpose(units)
    labels, scores = completions.label[1:].T, np.full(shape, np.nan)
    scores[:, layers, heads] = np.where(labels == MISSING, np.nan, labels == LABELS.index("complied"))
    of_heads = {label: completions.share(label) for label in ("degenerate", "incoherent")}
    for name, values in (
        of_heads | {"cut": completions.cut(), "perplexity": completions.perplexity()}
    ).items():
        by_head = np.full(shape[1:], None)  # None stays where a head was not scanned
        by_head[layers, heads] = values[1:]
        record[name] = by_head.tolist()
    result = ShipsResult(scores, float(completions.share("complied")[0]), record, identity)
    record["concentration"] = result.concentration().to_json()
    record["seconds"] = seconds_since(started)
    if folder is not None:
        kept = read_scores(folder.path, tuple(shape), NAMES, column(METRIC))
        new = np.where(np.isnan(kept), result.scores, np.nan)  # none twice
        folder.write_part(score_frame(new, NAMES, column(METRIC)))
        folder.write_manifest(record | {"status": "complete", "noise_floor": result.noise_floor})
    return result
