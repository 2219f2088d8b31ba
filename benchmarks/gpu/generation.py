"""Generation with every single head off, one head a group: rows per second, and what the whole scan would take.

The decode floor reads weights and cache once per step at the measured bandwidth, or multiplies at the measured rate,
whichever takes longer, with as many rows at a time as the planner chose, and adds the prefill as a scan. Rows that
share a history share layers, so a run may beat it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import shipsfast
from shipsfast.answers.generation import prepare_generation
from shipsfast.answers.measurements import DecodingExecution, GenerationMeasurement
from shipsfast.engine import flops
from shipsfast.ops.prefix_tree import pack

from .. import generation as cpu
from ..cases import GenerationCase
from . import peers
from .alarms import ALARM_LOGIT, alarms_off
from .ceilings import copy_ceiling
from .clock import peak_mib, reset_peak, seconds
from .rows import verdict
from .session import OURS, Session
from .shapes import LLAMA2_7B, Prompts, Shape, twin

CASE = "llama2-7b-generation"
PROMPTS, NEW_TOKENS, QUICK_GROUPS = Prompts(8, 5), 64, 128
SMOKE_TOKENS = 4
PAPER = (100, 128)  # prompts and new tokens of the full-generation scan
CHECKED_ROWS = 8


@dataclass(frozen=True)
class DecodeFloor:
    """Seconds. step: of one step of `slots` rows in the middle of their texts."""

    prefill: float
    step: float
    steps: float

    @property
    def total(self) -> float:
        return self.prefill + self.step * self.steps


def decode_floor(
    shape: Shape,
    token_ids: list[list[int]],
    groups: int,
    new_tokens: int,
    slots: int,
    gemm: float,
    bandwidth: float,
) -> DecodeFloor:
    """gemm in FLOP/s, bandwidth in bytes/s read and written."""
    costs = shape.costs()
    rows = groups * len(token_ids)
    units = [(i, h) for i in range(shape.layers) for h in range(shape.heads)][:groups]
    length = sum(map(len, token_ids)) / len(token_ids) + new_tokens / 2
    weights = (
        sum(layer.keys_values + layer.rest for layer in costs.layers) + costs.head
    )  # FLOPs a token, bytes in half
    per_row = weights + sum(layer.per_key for layer in costs.layers) * length
    moved = weights + slots * length * shape.kv_bytes_per_token
    step = max(moved / bandwidth, slots * per_row / gemm)
    return DecodeFloor(
        flops.scan_flops(costs, [pack(token_ids)], units) / gemm, step, rows / slots * (new_tokens - 1)
    )


class Job(cpu.Job):
    """What the CPU benchmark's paths take, over a model of true shape."""

    def __init__(self, session: Session, model, token_ids, heads, new_tokens: int) -> None:
        self.case = GenerationCase("gpu", None, groups=len(heads), new_tokens=new_tokens)
        self.session, self.model, self.prompts, self.heads = session, model, token_ids, heads
        self.head_size = model.config.head_dim
        self.model.generation_config = cpu.GenerationConfig()

    def with_groups(self, heads) -> Job:
        return Job(self.session, self.model, self.prompts, heads, self.case.new_tokens)


def run_generation(session: Session) -> None:
    shape, prompts = session.shape(LLAMA2_7B), session.prompts(PROMPTS)
    new_tokens = SMOKE_TOKENS if session.smoke else NEW_TOKENS
    token_ids = prompts.token_ids(shape.vocabulary)
    common = {"dtype": "bfloat16", "prompts": len(token_ids), "new_tokens": new_tokens}
    ours_rate, texts, job = None, None, None
    with session.guarded(CASE, OURS, common), alarms_off():
        model = session.model(shape)
        every = peers.every_head(model)
        step = max(1, len(every) // QUICK_GROUPS) if session.quick else 1
        job = Job(session, model, token_ids, [[head] for head in every[::step]], new_tokens)
        how = dict(max_new_tokens=new_tokens, eos_token_id=[], progress=False)
        shipsfast.generate(model, token_ids, groups=job.heads[:2], **how | {"max_new_tokens": 3})
        before = reset_peak(session.device)
        taken, texts = seconds(
            lambda: shipsfast.generate(model, token_ids, groups=job.heads, **how), session.device
        )
        peak = peak_mib(session.device, before)
        measurement = GenerationMeasurement(
            prompts=token_ids, groups=job.heads, max_new_tokens=new_tokens, eos_token_id=[]
        )
        plan = prepare_generation(model, None, measurement, DecodingExecution())
        slots = plan.plan.slots
        gemm = session.gemm_rate(shape, tokens=slots)
        floor = decode_floor(
            shape, token_ids, len(job.heads), new_tokens, slots, gemm.sustained, copy_ceiling(session)
        )
        rows = len(job.heads) * len(token_ids)
        ours_rate = rows / taken
        wide_prompts, wide_tokens = PAPER
        tokens_per_s = ours_rate * new_tokens
        row = session.write_unchecked(
            CASE,
            OURS,
            common | gemm.figures() | {
                "groups": len(job.heads), "rows": rows, "median_s": round(taken, 4), "runs": 1,
                "rows_per_s": round(ours_rate, 3), "tokens_per_s": round(tokens_per_s, 1),
                "floor_s": float(f"{floor.total:.4g}"), "share_of_floor": round(floor.total / taken, 4),
                "slots": slots, "peak_mib": peak,
                "predicted_mib": round(plan.plan.predicted_bytes / 2**20, 1),
                "times_slower_than_shipsfast": 1.0,
                "resolved_backend": plan.subject.backend,
                # By tokens: rows of twice the length take a little more than twice as long.
                "full_scan_s": round(len(every) * wide_prompts * wide_tokens / tokens_per_s, 1),
                "full_scan_of": f"{len(every)} heads x {wide_prompts} prompts x {wide_tokens} tokens",
            },
        )  # fmt: skip
        session.settle(row, session.checked(lambda: check_texts(session, job, texts)))
    session.clear()
    if job is None:
        return
    for name, path, groups in (
        ("HF generate, prompts batched", cpu.by_group, 2),
        ("HF generate, row masks", cpu.all_rows, max(2, 512 // len(token_ids))),
    ):
        with session.guarded(CASE, name, common):
            some = job.with_groups(job.heads[:: max(1, len(job.heads) // groups)][:groups])
            path(some.shorter(2))
            taken, found = seconds(lambda path=path, some=some: path(some), session.device)
            _write_peer(session, name, common, taken, some, found, ours_rate)
        session.clear()


def _write_peer(session: Session, name: str, common: dict, taken: float, some: Job, found, ours_rate) -> None:
    short = any(len(text) != some.case.new_tokens for group in found for text in group)
    rows = len(some.heads) * len(some.prompts)
    session.write(
        CASE,
        name,
        common | {
            "check": verdict(f"not every row has {some.case.new_tokens} tokens" if short else None),
            "groups": len(some.heads), "rows": rows, "median_s": round(taken, 4), "runs": 1,
            "rows_per_s": round(rows / taken, 3), "tokens_per_s": round(rows * some.case.new_tokens / taken, 1),
            "times_slower_than_shipsfast": round(ours_rate / (rows / taken), 3) if ours_rate else None,
        },
    )  # fmt: skip


@torch.inference_mode()
def check_texts(session: Session, job: Job, texts) -> dict:
    """`check`, and by how much a token's logit falls short of the largest of a float32 pass over prompt and text, at
    most, in standard deviations of the logits, for some rows: half precision does so by a little."""
    rows = [
        (g, g % len(job.prompts)) for g in range(0, len(job.heads), max(1, len(job.heads) // CHECKED_ROWS))
    ]
    session.clear()  # the run's cache
    exact, short = twin(job.model, torch.float32), []
    for g, p in rows:
        prompt, text = job.prompts[p], texts[g][p]
        if len(text) != job.case.new_tokens:
            return {"check": verdict(f"a row has {len(text)} tokens instead of {job.case.new_tokens}")}
        ids = torch.tensor([[*prompt, *text[:-1]]], device=session.device)
        with peers.head_off(exact, job.heads[g][0]):
            logits = exact(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(-1, torch.tensor(text, device=session.device)[:, None])[:, 0]
        short.append(float(((logits.amax(-1) - chosen) / logits.std(-1)).max()))
    worst, wrong = float(np.max(short)), None  # NaN, if one is
    if not worst <= ALARM_LOGIT[job.model.dtype]:
        wrong = (
            f"texts are not those of a float32 pass: a logit falls short by {worst:.2g} standard deviations"
        )
    return {"check": verdict(wrong), "max_shortfall_std": float(f"{worst:.4g}")}
