"""The attack success rate of groups of heads."""

from __future__ import annotations

import time
from dataclasses import replace

from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.measurement import called_with
from ..errors import InputError
from ..models.restore import untouched
from ..prompts.messages import is_conversation, prompt_text
from ..results.completions import Completions
from ..results.evaluation import EvalResult
from ..results.incoherence import rule
from ..runs.folder import RunFolder
from .control import prepare_control, run_control
from .generation import prepare_generation
from .judges.choose import as_judge
from .judges.judge import Judge
from .label import Kept, answer
from .measurements import AnswerMeasurement, EvaluationMeasurement, JudgedExecution


@called_with(EvaluationMeasurement, JudgedExecution)
@untouched
def evaluate(
    model: PreTrainedModel, tokenizer, measurement: EvaluationMeasurement, execution: JudgedExecution
) -> EvalResult:
    """The attack success rate with each group of heads off.

    Every prompt is answered with every group off (`generate`), and every answer judged: refusal, degenerate,
    unfinished (inside a thought), incoherent or complied. The unablated model answers too, whether `groups` has [] or not:
    rates are compared with its own, and what it finds far less likely than its own answers is incoherent (unless the judge
    is "paper").

    `resample`, which matches positions one to one, is refused.

    Returns:
        EvalResult.
    Raises:
        InputError: bad prompts, groups, judge, settings or folder. UnsupportedModelError: as in `scan`.
    """
    started = time.perf_counter()
    judge = judge_of(measurement, tokenizer, execution)
    groups, every = measurement.groups, measurement
    if isinstance(groups, tuple) and groups and () not in groups:
        every = replace(measurement, groups=(*groups, ()))  # the unablated model, a row of its own
    generation = prepare_generation(model, tokenizer, every, execution)
    asked = generation.asked[: len(groups)]
    prompts, keep_text = [prompt_text(each) for each in measurement.prompts], measurement.keep_text
    identity = generation.subject.identity | {
        "groups": [[list(head) for head in group] for group in asked],
        "judge": judge.describe(),
        "generation": generation.describe(),
        "incoherent": None if judge.is_final else rule(generation.subject.anatomy.vocab_size),
        "keep_text": keep_text,
        "control": None,
    }
    ordinary = None
    if measurement.control is not None:
        ordinary = prepare_control(generation, len(asked), execution)
        identity["control"] = ordinary.describe()
    folder = None if execution.out is None else RunFolder(execution.out, identity, generation.subject.record)
    found = folder and folder.finished(EvalResult.load)
    if found is not None:
        return replace(found, prompts=prompts)
    record = generation.subject.record | {"plan": generation.plan.to_json(), "judge": judge.name}
    if keep_text:
        record["prompt_texts"] = prompts
    kept = Kept(Completions(len(generation.groups), len(prompts), keep_text=keep_text), folder)
    result = EvalResult.of(asked, prompts, kept.completions, record, identity)
    if folder is not None:
        folder.write_manifest(record | {"status": "running"})
    record["spot_check_max_deficit"] = answer(generation, judge, kept, execution.progress)
    if ordinary is not None:
        result.control = run_control(ordinary, folder, execution)
    result.finish()
    record["plan"] = generation.plan.to_json()
    record["seconds"] = seconds_since(started)
    record["asr"] = [round(float(x), 6) for x in result.asr]
    record |= {"warnings": result.warnings(), "incoherent_above_nats": result.limit_nats}
    if folder is not None:
        folder.write_manifest(record | {"status": "complete"})
    return result


def judge_of(measurement: AnswerMeasurement, tokenizer, execution: JudgedExecution) -> Judge:
    """Raises InputError where there is nothing to judge, or no judge."""
    judge = as_judge(measurement.judge)
    if tokenizer is None:
        raise InputError("judges read texts, so a tokenizer is needed: pass the model's")
    if not isinstance(measurement.prompts[0], str) and not is_conversation(measurement.prompts[0]):
        raise InputError("judges read texts, so prompts must be strings or chat messages")
    if execution.out is not None and not judge.is_named:
        raise InputError(
            f"judge {judge.name} has no name of its own, so a run folder cannot tell it from others: define it as a "
            "function of a module, or leave out= away"
        )
    return judge
