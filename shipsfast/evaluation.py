"""What groups of heads do to whole answers: the attack success rate (ASR), and what it costs the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from . import runs
from .ablation import DEFAULT_SCALE, Ablation
from .checks import check_generation
from .clock import seconds_since
from .completions import MISSING, Completions, judged
from .completions import ROOM as COMPLETIONS
from .control import CONTROL_TOKENS, Control, kl_along
from .errors import InputError, whole_number
from .generation import NEW_TOKENS, prepare_generation
from .generation_queue import Generation, Longest
from .out_of_memory import once_more
from .refusal import LABELS, Completion, Judge, as_judge, degenerate
from .sampling import TOP_K, Sampling
from .statistics import wilson_interval
from .untouched import untouched

CONTROL_ROOM = "control"
KL_NAMES, KL = ("group", "prompt"), "kl_nats"


@dataclass(repr=False)
class EvalResult:
    """Labelled completions of G groups x P prompts.

    groups: (layer, head) pairs, [] for the unablated model; prompts: the texts; completions: labels, lengths, texts.
    ASR is the share of completions that are neither refusals nor degenerate (arXiv 2410.13708, section 3.3 and
    appendix B.3).
    """

    groups: list[list[tuple[int, int]]]
    prompts: list[str]
    completions: Completions
    control: Control | None = None
    record: dict = field(default_factory=dict)
    identity: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        rates = ", ".join(
            f"{group_name(g)}: {rate:.0%}" for g, rate in zip(self.groups[:4], self.asr, strict=False)
        )
        more = ", ..." if len(self.groups) > 4 else ""
        return f"EvalResult({len(self.groups)} groups x {len(self.prompts)} prompts, ASR {rates}{more})"

    @property
    def labels(self) -> list[list[str | None]]:
        """[G][P], None for rows not done."""
        return [[None if i == MISSING else LABELS[i] for i in row] for row in self.completions.label]

    @property
    def asr(self) -> np.ndarray:
        """float64 [G]: the share of each group's completions that complied."""
        return self.completions.share("complied")

    def share(self, label: str) -> np.ndarray:
        """float64 [G]: the share of "complied", "refusal" or "degenerate"."""
        if label not in LABELS:
            raise InputError(f"unknown label {label!r}: expected one of {', '.join(LABELS)}")
        return self.completions.share(label)

    def interval(self, confidence: float = 0.95) -> np.ndarray:
        """Wilson score interval of each group's ASR, float64 [G, 2]; NaN where no row is done.

        It is about prompts like these, and counts none of what a judge gets wrong.
        """
        out = np.full((len(self.groups), 2), np.nan)
        for g, row in enumerate(self.completions.label):
            done = int((row != MISSING).sum())
            if done:
                out[g] = wilson_interval((row == 0).sum(), done, confidence)
        return out

    def to_pandas(self) -> pd.DataFrame:
        """One row per completion: group, heads, prompt, label, num_tokens, finished, text_sha256, text."""
        frame = self.completions.frame()
        frame.insert(1, "heads", [group_name(self.groups[g]) for g in frame["group"]])
        return frame

    def summary(self) -> list[dict]:
        """One object per group, for JSON."""
        out = []
        for g, (low, high) in enumerate(self.interval()):
            row = {
                "heads": [list(head) for head in self.groups[g]],
                "asr": float(self.asr[g]),
                "asr_low": float(low),
                "asr_high": float(high),
                **{label: float(self.share(label)[g]) for label in ("refusal", "degenerate")},
            }
            if self.control is not None:
                row["control"] = {
                    "mean_kl_nats": float(self.control.mean_kl_nats[g]),
                    "degenerate": float(self.control.degenerate[g]),
                    "same_text": float(self.control.same[g]),
                }
            out.append(row)
        return out

    def view(self, path: str | Path) -> None:
        """Write the answers of all groups side by side: Markdown or a page of HTML, by the path's suffix."""
        from .completion_view import write

        write(self, path)

    @classmethod
    def load(cls, folder: str | Path) -> EvalResult:
        """Read the run folder of `evaluate`; rows that were never reached have no label, and prompts are kept only
        with the answers, else they are empty."""
        folder = Path(folder)
        manifest = runs.read_manifest(folder, "evaluate")
        identity, _ = manifest.pop("identity"), manifest.pop("parts")
        groups = [[tuple(head) for head in group] for group in identity["groups"]]
        keep = identity["keep_text"]
        completions = Completions(len(groups), len(identity["prompts"]), keep_text=keep)
        completions.read(folder)
        control = None
        if identity["control"] is not None:
            shape = (len(groups), len(identity["control"]["prompts"]))
            rows = Completions(shape[0] + 1, shape[1], keep_text=keep)
            rows.read(folder, CONTROL_ROOM)
            control = Control(
                runs.read_scores(folder, shape, KL_NAMES, KL), rows, identity["control"]["tokens"]
            )
        prompts = manifest.pop("prompt_texts", None) or [""] * len(identity["prompts"])
        return cls(groups, prompts, completions, control, manifest, identity)


def group_name(group: Iterable[Sequence[int]]) -> str:
    """ "2-26+3-1"; "none" for the unablated model."""
    return "+".join(f"{layer}-{head}" for layer, head in group) or "none"


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
            "prompts": runs.prompt_hashes(ordinary.subject.token_ids),
            "tokens": tokens,
        }
    folder = None if out is None else runs.RunFolder(out, identity, generation.subject.record)
    found = folder and folder.finished(EvalResult.load, (COMPLETIONS, CONTROL_ROOM, runs.SCORES))
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
    folder: runs.RunFolder | None,
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
    folder: runs.RunFolder | None, progress: bool, max_memory: int | None,
) -> Control:  # fmt: skip
    count, control_ids = len(ordinary.groups) - 1, ordinary.subject.token_ids
    completions = Completions(count + 1, len(control_ids), keep_text=keep_text)
    kl_nats = np.full((count, len(control_ids)), np.nan)
    if folder is not None:
        completions.read(folder.path, CONTROL_ROOM)
        kl_nats = runs.read_scores(folder.path, kl_nats.shape, KL_NAMES, KL)
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
            kept = runs.read_scores(folder.path, kl_nats.shape, KL_NAMES, KL)
            new = np.where(np.isnan(kept), kl_nats, np.nan)
            folder.write_part(runs.score_frame(new, KL_NAMES, KL))
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
