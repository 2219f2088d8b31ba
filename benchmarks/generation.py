"""Generation under ablation on the CPU against the best other ways, in one process, runs interleaved.

Groups of heads x prompts rows answer greedily; no token ends a text, so that every row is as long. Each text is held
against one float64 pass over prompt and text. In float32 two tokens may be within rounding of each other, and a row
that takes the other one goes on differently: the share of equal rows is in the results.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

import shipsfast
from shipsfast.answers.measurements import GenerationMeasurement
from shipsfast.answers.self_check import ALARM_LOGIT
from shipsfast.engine.ablation import Ablation
from shipsfast.engine.measurement import Execution
from shipsfast.engine.subject import look_at

from .cases import GenerationCase
from .peers import EPS, hooked, scale_head
from .provenance import append, provenance
from .timing import Paths

OURS = "shipsfast"
LOOP = "one row at a time, no cache (the paper's code)"
# By how much a chosen token's logit may fall short of the largest one of a float64 pass, in standard deviations of
# the logits: what `generate` allows itself.
TOLERANCE = ALARM_LOGIT[torch.float32]
SAMPLED_LENGTHS = 8  # of a text, by the loop

Texts = list[list[list[int]]]  # [G][P], new tokens


class Job:
    """A case with its model: what every path gets."""

    def __init__(self, case: GenerationCase) -> None:
        self.case, self.model, self.tokenizer = case, case.model(), case.tokenizer()
        self.prompts, self.heads = case.token_ids(), case.heads(self.model)
        self.head_size = self.model.config.head_dim
        # What a call of `generate` leaves open comes from here; the village's names a token that ends texts.
        self.model.generation_config = GenerationConfig()

    @property
    def greedy(self) -> GenerationConfig:
        """Settings of transformers' `generate`: no token ends a text."""
        new_tokens = self.case.new_tokens
        return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    def shorter(self, new_tokens: int) -> Job:
        out = copy.copy(self)
        out.case = replace(self.case, new_tokens=new_tokens)
        return out

    @property
    def device(self) -> torch.device:
        return self.model.device

    def q_proj(self, layer: int) -> torch.nn.Module:
        return self.model.model.layers[layer].self_attn.q_proj


def ours(job: Job) -> Texts:
    return shipsfast.generate(
        job.model,
        job.prompts,
        groups=job.heads,
        max_new_tokens=job.case.new_tokens,
        eos_token_id=[],
        progress=False,
    )


def by_group(job: Job) -> Texts:
    """transformers' `generate` with its cache, all prompts of a group in one left-padded batch."""
    ids, seen = _left_padded(job)
    out = []
    for group in job.heads:
        with contextlib.ExitStack() as hooks:
            for layer, head in group:
                hooks.enter_context(hooked(job.q_proj(layer), _scale_in_place(head, job.head_size)))
            out.append(_generate(job, ids, seen))
    return out


def all_rows(job: Job) -> Texts:
    """The same with all groups in one batch, each row with its own heads scaled."""
    ids, seen = _left_padded(job)
    config = job.model.config
    scale = torch.ones(len(job.heads), len(ids), config.num_hidden_layers, config.num_attention_heads)
    for g, group in enumerate(job.heads):
        for layer, head in group:
            scale[g, :, layer, head] = EPS
    scale = scale.flatten(0, 1).to(job.device, job.model.dtype)
    with contextlib.ExitStack() as hooks:
        for layer in sorted({layer for group in job.heads for layer, _ in group}):
            hooks.enter_context(hooked(job.q_proj(layer), _scale_rows(scale[:, layer], job.head_size)))
        texts = _generate(job, ids.repeat(len(job.heads), 1), seen.repeat(len(job.heads), 1))
    return [texts[start : start + len(ids)] for start in range(0, len(texts), len(ids))]


@dataclass(frozen=True)
class Said:
    """A token that the loop chose after the first `at` tokens of a row's text."""

    group: int
    prompt: int
    at: int
    token: int


@torch.inference_mode()
def published_loop(job: Job, texts: Texts) -> list[Said]:
    """The loop of the paper's published code, for a sample of tokens: one row, eager attention, no cache, logits of
    every position; for each token the whole text is decoded and tokenised anew.

    The sample: each prompt with one of the groups in turn, at SAMPLED_LENGTHS lengths of its text, the middles of
    equal stretches (of two middles the shorter). Cost grows with length near enough to linearly for their mean to be
    that of all.
    """
    count = job.case.new_tokens
    stretches = min(SAMPLED_LENGTHS, count)
    lengths = [int((i + 0.5) * count / stretches - 0.5) for i in range(stretches)]
    out = []
    before = job.model.config._attn_implementation
    job.model.set_attn_implementation("eager")
    try:
        for p, prompt in enumerate(job.prompts):
            g = (2 * p + 1) % len(job.heads)
            with contextlib.ExitStack() as hooks:
                for layer, head in job.heads[g]:
                    hooks.enter_context(hooked(job.q_proj(layer), scale_head(head, job.head_size)))
                for at in lengths:
                    text = job.tokenizer.decode([*prompt, *texts[g][p][:at]])
                    ids = job.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(
                        job.device
                    )
                    out.append(Said(g, p, at, int(job.model(ids, use_cache=False).logits[0, -1].argmax())))
    finally:
        job.model.set_attn_implementation(before)
    return out


PEERS: dict[str, Callable[[Job], Texts]] = {
    "HF generate, prompts batched": by_group,
    "HF generate, groups x prompts as row masks": all_rows,
}


class Oracle:
    """The model in float64: one forward pass over prompt and text with the heads scaled by hooks."""

    def __init__(self, case: GenerationCase) -> None:
        self.job = Job(case)
        self.job.model.double()
        self.known: dict[tuple, float] = {}

    @torch.inference_mode()
    def shortfall(self, group: int, prompt: int, text: Sequence[int]) -> float:
        """By how much the logit of a token of the text falls short of the largest, at most, in standard deviations."""
        key = (group, prompt, *text)
        if key not in self.known:
            job, ids = self.job, self.job.prompts[prompt]
            with contextlib.ExitStack() as hooks:
                for layer, head in job.heads[group]:
                    hooks.enter_context(hooked(job.q_proj(layer), scale_head(head, job.head_size)))
                logits = job.model(torch.tensor([[*ids, *text[:-1]]]), use_cache=False).logits[
                    0, len(ids) - 1 :
                ]
            chosen = logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
            self.known[key] = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
        return self.known[key]


def run_case(case: GenerationCase, repeats: int, console: Console) -> list[dict]:
    """Check, time and append the rows of one case; returns them."""
    job, oracle = Job(case), Oracle(case)
    reference = ours(job)
    for path in PEERS.values():  # warm-ups
        path(job.shorter(2))
    published_loop(job.shorter(2), reference)
    measurement = GenerationMeasurement(
        prompts=job.prompts, ablation=Ablation(scale=EPS), max_new_tokens=case.new_tokens
    )
    record = look_at(job.model, None, measurement, Execution()).record
    short: dict[str, float] = {}
    equal: dict[str, float] = {}

    def held(name: str, texts: list[tuple[int, int, list[int]]], same: list[bool]) -> str | None:
        if any(len(text) == 0 for _, _, text in texts):
            return "a row has no text"
        short[name] = max([short.get(name, 0.0), *(oracle.shortfall(*row) for row in texts)])
        equal[name] = min(equal.get(name, 1.0), sum(same) / len(same))
        if short[name] <= TOLERANCE:
            return None
        return f"texts are not those of a float64 pass: a logit falls short by {short[name]:.2g} standard deviations"

    def check(name: str, texts: Texts) -> str | None:
        rows = [(g, p, texts[g][p]) for g in range(case.groups) for p in range(case.prompts)]
        if any(len(text) != case.new_tokens for _, _, text in rows):
            return f"not every row has {case.new_tokens} tokens"
        return held(name, rows, [text == reference[g][p] for g, p, text in rows])

    def check_sample(name: str, said: list[Said]) -> str | None:
        rows = [(s.group, s.prompt, [*reference[s.group][s.prompt][: s.at], s.token]) for s in said]
        return held(name, rows, [s.token == reference[s.group][s.prompt][s.at] for s in said])

    sampled = case.prompts * min(SAMPLED_LENGTHS, case.new_tokens)
    paths = Paths(OURS, [*PEERS, LOOP])
    for _ in range(repeats):
        for name, path in PEERS.items():
            paths.timed(OURS, lambda: ours(job), check)
            paths.timed(name, lambda path=path: path(job), check)
            paths.paired(name)
        paths.timed(OURS, lambda: ours(job), check)
        paths.timed(LOOP, lambda: published_loop(job, reference), check_sample, case.num_tokens / sampled)
        paths.paired(LOOP)

    common = provenance("cpu") | {
        "bench": "generation", "case": case.name, "dtype": str(job.model.dtype).removeprefix("torch."),
        "prompts": case.prompts, "groups": case.groups, "new_tokens": case.new_tokens, "tokens": case.num_tokens,
    }  # fmt: skip
    rows = []
    for name in paths.times:
        row = common | {"path": name, "max_shortfall_std": short.get(name), "equal_share": equal.get(name)}
        row |= paths.figures(name)
        if "failed" not in row:
            row |= {
                "tokens_per_s": round(case.num_tokens / row["median_s"], 1),
                "extrapolated_from": f"{sampled} tokens" if name == LOOP else None,
                "resolved_backend": record["attention_backend"] if name == OURS else None,
                "layers": record["layers"] if name == OURS else None,
            }
        rows.append(row)
    append("generation", rows)
    _show(case, rows, console)
    return rows


@torch.inference_mode()
def _generate(job: Job, ids: torch.Tensor, seen: torch.Tensor) -> list[list[int]]:
    out = job.model.generate(input_ids=ids, attention_mask=seen, generation_config=job.greedy)
    return out[:, ids.shape[1] :].tolist()


def _left_padded(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, job.prompts))
    ids = [[0] * (width - len(x)) + x for x in job.prompts]
    seen = [[0] * (width - len(x)) + [1] * len(x) for x in job.prompts]
    return torch.tensor(ids, device=job.device), torch.tensor(seen, device=job.device)


def _scale_in_place(head: int, size: int) -> Callable:
    def hook(_module, _args, out):
        out[..., head * size : (head + 1) * size] *= EPS

    return hook


def _scale_rows(scale: torch.Tensor, size: int) -> Callable:
    """scale: [rows, H]"""

    def hook(_module, _args, out):
        out.unflatten(-1, (-1, size)).mul_(scale[:, None, :, None])

    return hook


def _show(case: GenerationCase, rows: list[dict], console: Console) -> None:
    table = Table(title=f"{case.name}: {case.num_tokens} tokens", title_justify="left")
    for name in ("path", "median s", "p20", "p80", "tokens/s", "x shipsfast", "max shortfall, std", "equal"):
        table.add_column(name, justify="left" if name == "path" else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["path"], "failed: " + row["failed"])
            continue
        label = row["path"]
        if row["extrapolated_from"]:
            label += f" (extrapolated from {row['extrapolated_from']})"
        table.add_row(
            label, f"{row['median_s']:.3f}", f"{row['p20_s']:.3f}", f"{row['p80_s']:.3f}", f"{row['tokens_per_s']:.0f}",
            f"{row['times_slower_than_shipsfast']:.2f}", f"{row['max_shortfall_std']:.1e}", f"{row['equal_share']:.1%}",
        )  # fmt: skip
    console.print(table)
