"""What the device can do at best: matrix products at the scan's own shapes, and copies in its memory."""

from __future__ import annotations

import torch

from .clock import Timing, timed
from .session import SUSTAINED_S, SUSTAINED_SHORT_S, Session
from .shapes import LLAMA2_7B

CASE = "ceilings"
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
COPY_BYTES = 4 << 30


def ceilings(session: Session) -> None:
    shape = session.shape(LLAMA2_7B)
    for name, (dtype, precision) in PRECISIONS.items():
        with session.guarded(CASE, f"gemm {name}"):
            matmul = torch.backends.cuda.matmul
            before, matmul.fp32_precision = matmul.fp32_precision, precision
            try:
                whole = dtype == session.dtype or not session.quick
                rate = session.gemm_rate(shape, dtype, seconds=SUSTAINED_S if whole else SUSTAINED_SHORT_S)
            finally:
                matmul.fp32_precision = before
            session.ceilings[name] = rate.burst
            session.write(
                CASE,
                f"gemm {name}",
                {
                    "tflops_per_s": float(f"{rate.sustained / 1e12:.4g}"),
                    "burst_tflops_per_s": float(f"{rate.burst / 1e12:.4g}"), "tokens": session.chunk_tokens,
                    "products": [list(p) for p in shape.costs().products],
                },
            )  # fmt: skip
    with session.guarded(CASE, "copy"):
        count = 1 << 20
        if session.on_gpu:
            free, _ = torch.cuda.mem_get_info(session.device)
            count = min(COPY_BYTES, free // 4)
        source = torch.empty(count, dtype=torch.int8, device=session.device).random_()
        target = torch.empty_like(source)
        timing = timed(lambda: target.copy_(source), session.device, budget_s=session.share_s(1))
        session.ceilings["copy"] = 2 * count / timing.median
        session.write(
            CASE,
            "copy",
            timing.figures() | {"gb_per_s": round(session.ceilings["copy"] / 1e9, 1), "bytes": 2 * count},
        )
    session.clear()


def gemm_ceiling(session: Session, name: str = "bf16") -> float:
    """FLOP/s of a burst, as kernels alone are: of this run, measured now if it has not been."""
    if name not in session.ceilings:
        session.ceilings[name] = session.gemm_rate(session.shape(LLAMA2_7B), PRECISIONS[name][0]).burst
    return session.ceilings[name]


def copy_ceiling(session: Session) -> float:
    """Bytes per second, read and written; measured now if it has not been."""
    if "copy" not in session.ceilings:
        source = torch.empty(1 << (30 if session.on_gpu else 20), dtype=torch.int8, device=session.device)
        target = torch.empty_like(source)
        timing = timed(lambda: target.copy_(source), session.device, budget_s=0.2)
        session.ceilings["copy"] = 2 * source.numel() / timing.median
    return session.ceilings["copy"]


def bandwidth_figures(session: Session, timing: Timing, moved: int, ours_s: float | None) -> dict:
    """Of a kernel that moves so many bytes at the least; ours_s: seconds of our own, None if it failed."""
    return timing.figures() | {
        "gb_per_s": round(moved / timing.median / 1e9, 2),
        "share_of_ceiling": round(moved / timing.median / copy_ceiling(session), 4),
        "times_slower_than_shipsfast": round(timing.median / ours_s, 3) if ours_s else None,
    }
