"""How many tokens pass a layer together, and how large a piece of the output head is: the same scan with each, in turns.

Differences are of a percent: every setting runs ROUNDS times, every other time in the other order, so that a device that
slows down slows all of them. The floor is the same for all, at the rate of the default chunk.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from unittest import mock

import shipsfast
from shipsfast.engine import flops, memory_plan
from shipsfast.ops.prefix_tree import pack

from .alarms import alarms_off
from .clock import peak_mib, reset_peak, seconds
from .scans import how_it_ran, scan_oracle
from .session import Session
from .shapes import LLAMA2_7B, LLAMA31_8B, Prompts

CHUNK_TOKENS, HEAD_CHUNK = "chunk-tokens", "head-chunk"
PROMPTS, ROUNDS = Prompts(20, 5), 2


@dataclass(frozen=True)
class Setting:
    """chunk_tokens: None for the planner's; head_bytes: of the logits of one piece of the head."""

    chunk_tokens: int | None = None
    head_bytes: int = memory_plan.HEAD_BYTES

    @property
    def path(self) -> str:
        if self.chunk_tokens is not None:
            return f"{self.chunk_tokens} tokens"
        return f"head chunk of {self.head_bytes / 2**20:.3g} MiB"

    def scan(self, model, token_ids, **how):
        with alarms_off(), mock.patch.object(memory_plan, "HEAD_BYTES", self.head_bytes):
            return shipsfast.scan(
                model, token_ids, chunk_tokens=self.chunk_tokens, progress=False, rescored=0, **how
            )


CASES = {
    CHUNK_TOKENS: (LLAMA2_7B, tuple(Setting(tokens) for tokens in (16384, 32768, 65536))),
    HEAD_CHUNK: (LLAMA31_8B, (Setting(), Setting(head_bytes=1 << 30))),
}
SMOKE = {
    CHUNK_TOKENS: (Setting(16), Setting(64)),
    HEAD_CHUNK: (Setting(), Setting(head_bytes=1 << 10)),
}


def run_chunks(session: Session, case: str) -> None:
    shape, settings = session.shape(CASES[case][0]), SMOKE[case] if session.smoke else CASES[case][1]
    token_ids = session.prompts(PROMPTS).token_ids(shape.vocabulary)
    units = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    work = flops.scan_flops(shape.costs(), [pack(token_ids)], units)
    common = {"dtype": "bfloat16", "prompts": len(token_ids), "flops": work}
    times: dict[Setting, list[float]] = {}
    rows, results = {}, {}
    for turn in range(ROUNDS):
        for setting in settings if turn % 2 == 0 else settings[::-1]:
            if turn and (setting not in rows or session.left_s < 3 * times[setting][0]):
                continue
            with session.guarded(case, setting.path, common):
                model = session.model(shape)
                if not turn:  # what is compiled for this setting, and the rate that its floor is made of
                    setting.scan(model, token_ids, heads=[units[0], units[-1]])
                    rate = session.gemm_rate(shape)
                before = reset_peak(session.device)
                taken, result = seconds(lambda s=setting, m=model: s.scan(m, token_ids), session.device)
                peak = peak_mib(session.device, before)
                times.setdefault(setting, []).append(taken)
                figures = _figures(times[setting], work, rate, len(units) * len(token_ids))
                if turn:
                    session.settle(rows[setting], figures)
                    continue
                results[setting] = result
                more = (
                    rate.figures()
                    | how_it_ran(result)
                    | {"head_mib": setting.head_bytes / 2**20, "peak_mib": peak}
                )
                rows[setting] = session.write_unchecked(case, setting.path, common | more | figures)
    session.clear()
    if rows:
        check = scan_oracle(session, shape, token_ids)
        for setting, row in rows.items():
            session.settle(row, check(results[setting]))
    session.clear()


def _figures(times: list[float], work: int, rate, scores: int) -> dict:
    median = statistics.median(times)
    return {
        "median_s": round(median, 4), "least_s": round(min(times), 4), "runs": len(times),
        "floor_s": float(f"{work / rate.sustained:.4g}"), "share_of_floor": round(work / rate.sustained / median, 4),
        "scores_per_s": round(scores / median, 1),
    }  # fmt: skip
