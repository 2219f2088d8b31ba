"""What groups of heads do to whole answers: the attack success rate (ASR), and what it costs the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.ablation import DEFAULT_SCALE, Ablation
from ..errors import InputError, whole_number
from ..memory import once_more
from ..models.restore import untouched
from ..results.completions import ROOM as COMPLETIONS
from ..results.completions import Completions
from ..results.evaluation import CONTROL_ROOM, KL, KL_NAMES, Control, EvalResult, group_name
from ..runs.folder import RunFolder
from ..runs.identity import prompt_hashes
from ..runs.tables import SCORES, read_scores, score_frame
from .control import CONTROL_TOKENS, kl_along
from .generate import NEW_TOKENS, prepare_generation
from .judges.choose import as_judge
from .judges.degeneration import degenerate
from .judges.judge import Completion, Judge
from .label import judged
from .queue import Generation, Longest
from .sampling import TOP_K, Sampling
from .self_check import check_generation


@untouched
def evaluate(
    model: PreTrainedModel,
    prompts: Sequence[str],
    tokenizer,
    *,
    groups: Iterable[Iterable[Sequence[int | None]]] = ((),),
    judge: str | Judge | Callable = "keywords",
    control: Sequence[str] | None = None,
    control_tokens: int = CONTROL_TOKENS,
    max_new_tokens: int = NEW_TOKENS,
    do_sample: bool = False,
    top_k: int = TOP_K,
    temperature: float = 1.0,
    seed: int = 0,
    template: str = "none",
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    unit: str = "head",
    eos_token_id: int | Sequence[int] | None = None,
    backend: str = "auto",
    layers: str = "auto",
    out: str | Path | None = None,
    keep_text: bool = False,
    max_memory: int | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> EvalResult:
    """The attack success rate with each group of heads off.

    Every prompt is answered with every group off (`generate`), and every answer judged: refusal, degenerate or
    complied.

    Args:
        model, prompts, tokenizer, groups, and the settings of generation: as in `generate`.
        judge: "keywords" (refusal phrases in normalised text), "paper" (the published rule with its defects, for
            comparison), "classifier:PATH:LABEL" or "chat:PATH" (a model on disk), a `Judge`, or a function that takes a
            list of answers (and `prompts`, if it has a parameter of that name) and returns a label or boolean each. It
            is called for some answers at a time, as they are finished.
        control: ordinary prompts, in the same template. The same groups then answer these too, and the result's
            .control says how far each ablation breaks the model.
        control_tokens: how many tokens of the unablated model's answer the control's KL is taken along, at most
            max_new_tokens.
        out: run folder. What is finished is kept there, and the same evaluation continues from it.
        keep_text: keep the answers in the run folder; else their labels, lengths and hashes only. The result at hand
            has those that were decoded for it in either case.
    Returns:
        EvalResult.
    Raises:
        InputError: bad prompts, groups, judge, settings or folder. UnsupportedModelError: as in `scan`.
    """
    started = time.perf_counter()
    judge = as_judge(judge)
    check_texts(tokenizer, prompts, judge, out)
    settings = dict(
        groups=groups, max_new_tokens=max_new_tokens, sampling=Sampling(do_sample, top_k, temperature, seed),
        template=template, ablation=ablation, scale=scale, unit=unit, eos_token_id=eos_token_id, backend=backend,
        layers=layers, max_memory=max_memory, batch_rows=batch_rows,
    )  # fmt: skip
    generation = prepare_generation(model, prompts, tokenizer, **settings)
    identity = generation.subject.describe("evaluate") | {
        "groups": [[list(head) for head in group] for group in generation.asked],
        "judge": judge.describe(),
        "generation": describe_generation(generation),
        "keep_text": keep_text,
        "control": None,
    }
    if control is not None:
        tokens = min(whole_number("control_tokens", control_tokens), max_new_tokens)
        ordinary = _ordinary(model, control, tokenizer, settings, generation)
        identity["control"] = {
            "prompts": prompt_hashes(ordinary.subject.token_ids),
            "tokens": tokens,
        }
    folder = None if out is None else RunFolder(out, identity, generation.subject.record)
    found = folder and folder.finished(EvalResult.load, (COMPLETIONS, CONTROL_ROOM, SCORES))
    if found is not None:
        return replace(found, prompts=list(prompts))
    record = generation.subject.record | {"plan": generation.plan.to_json(), "judge": judge.name}
    if keep_text:
        record["prompt_texts"] = list(prompts)
    completions = Completions(len(generation.groups), len(prompts), keep_text=keep_text)
    result = EvalResult(generation.asked, list(prompts), completions, None, record, identity)
    if folder is not None:
        completions.read(folder.path)
        folder.write_manifest(record | {"status": "running"})
    record["spot_check_max_deficit"] = fill(
        generation, completions, prompts, tokenizer, judge, folder, progress
    )
    if control is not None:
        result.control = _control(
            ordinary, list(control), tokenizer, tokens, keep_text, folder, progress, max_memory
        )
    record["plan"] = generation.plan.to_json()
    record["seconds"] = seconds_since(started)
    record["asr"] = [round(float(x), 6) for x in result.asr]
    if folder is not None:
        folder.write_manifest(record | {"status": "complete"})
    return result


def fill(
    generation: Generation,
    completions: Completions,
    prompts: Sequence[str],
    tokenizer,
    judge: Callable,
    folder: RunFolder | None,
    progress: bool,
    *room: str,
) -> float:
    """Decode and judge what is missing, and hold one of the new texts against a plain forward pass.

    Returns the shortfall that `check_generation` found. Where nothing is missing, the run was ended before that check
    or by it: it is made on a text that is decoded anew.
    """
    missing = completions.missing()
    sample = Longest()
    if missing:
        batches = sample.watch(generation.run(missing, progress))
        judged(generation, batches, prompts, tokenizer, judge, completions, folder, *room)
    else:
        longest = np.unravel_index(completions.num_tokens.argmax(), completions.num_tokens.shape)
        for _ in sample.watch(generation.run([tuple(map(int, longest))])):
            pass
    what = "holding a text against a plain forward pass"
    return once_more(what, lambda: check_generation(generation, sample.row))


def _ordinary(model, control, tokenizer, settings: dict, generation: Generation) -> Generation:
    """The same groups, and after them the unablated model, on the control prompts."""
    try:
        ordinary = prepare_generation(
            model, control, tokenizer, **settings | {"groups": [*generation.asked, []]}
        )
    except InputError as error:
        raise InputError(f"in the control prompts: {error}") from error
    # Means are those of the judged prompts, for both.
    return replace(ordinary, values=generation.values)


def _control(
    ordinary: Generation, control: Sequence[str], tokenizer, tokens: int, keep_text: bool,
    folder: RunFolder | None, progress: bool, max_memory: int | None,
) -> Control:  # fmt: skip
    count, control_ids = len(ordinary.groups) - 1, ordinary.subject.token_ids
    completions = Completions(count + 1, len(control_ids), keep_text=keep_text)
    kl_nats = np.full((count, len(control_ids)), np.nan)
    if folder is not None:
        completions.read(folder.path, CONTROL_ROOM)
        kl_nats = read_scores(folder.path, kl_nats.shape, KL_NAMES, KL)
    fill(ordinary, completions, control, tokenizer, _only_degenerate, folder, progress, CONTROL_ROOM)
    if np.isnan(kl_nats).any():
        answers: list[list[int]] = [[] for _ in control_ids]
        greedy = replace(ordinary, sampling=Sampling(), max_new_tokens=tokens)
        for rows in greedy.run([(count, p) for p in range(len(control_ids))]):
            for row in rows:
                answers[row.prompt] = row.tokens
        ablated = replace(ordinary, groups=ordinary.groups[:-1])
        kl_nats = once_more(
            "taking the KL along the control's answers",
            lambda: kl_along(ablated, control_ids, answers, tokens, max_memory),
        )
        if not np.isfinite(kl_nats).all():  # NaN would be missing for ever
            group, prompt = np.argwhere(~np.isfinite(kl_nats))[0]
            raise InputError(
                f"the KL of group {group_name(ablated.groups[group])} on control prompt {prompt} is not a number: with "
                "these heads off the model overflows; use a smaller scale or a wider dtype"
            )
        if folder is not None:
            kept = read_scores(folder.path, kl_nats.shape, KL_NAMES, KL)
            new = np.where(np.isnan(kept), kl_nats, np.nan)
            folder.write_part(score_frame(new, KL_NAMES, KL))
    return Control(kl_nats, completions, tokens)


def _only_degenerate(completions: Sequence[Completion]) -> list[str]:
    return ["degenerate" if degenerate(c.text, c.num_tokens, c.limit) else "complied" for c in completions]


def describe_generation(generation: Generation) -> dict:
    sampling = asdict(generation.sampling)
    if not generation.sampling.do_sample:
        sampling = {"do_sample": False}
    return sampling | {
        "max_new_tokens": generation.max_new_tokens,
        "end_tokens": sorted(generation.end_tokens),
    }


def check_texts(tokenizer, prompts, judge: Judge, out: str | Path | None) -> None:
    if tokenizer is None:
        raise InputError("judges read texts, so a tokenizer is needed: pass the model's")
    if not isinstance(prompts, (str, bytes)) and any(not isinstance(p, str) for p in prompts):
        raise InputError("judges read texts, so prompts must be strings")
    if out is not None and not judge.is_named:
        raise InputError(
            f"judge {judge.name} has no name of its own, so a run folder cannot tell it from others: define it as a "
            "function of a module, or leave out= away"
        )
