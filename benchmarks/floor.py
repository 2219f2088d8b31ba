"""The least work a scan can be, and the rate at which this machine could do it.

    FLOPs_min = sum over layers of rows alive x unique tokens x FLOPs of the layer per token
                (the last layer: keys and values everywhere, the rest at the prompts' ends) + the head

Attention itself is counted with the keys each token really sees.
"""

from __future__ import annotations

import statistics
import time

import torch

from shipsfast.packing import pack

from .cases import Case


def floor_flops(case: Case) -> float:
    packed = pack(case.token_ids())
    d, m = case.hidden, case.intermediate
    tokens, ends = packed.num_tokens, len(set(packed.last_index.tolist()))
    seen = int((packed.position + 1).sum())
    seen_last = int((packed.position[packed.last_index] + 1).sum())
    linear = 2 * (4 * d * d + 3 * d * m)
    total = 0.0
    for layer in range(case.layers):
        rows = 1 + case.heads * (layer + 1)
        if layer < case.layers - 1:
            total += rows * (tokens * linear + 4 * d * seen)
        else:
            total += rows * (tokens * 4 * d * d + ends * (linear - 4 * d * d) + 4 * d * seen_last)
    return total + rows * ends * 2 * d * case.vocabulary


def brute_force_flops(case: Case) -> float:
    """What one full forward pass per head, without sharing a prefix, has to do."""
    length = case.shared + case.own
    per_token = case.layers * 2 * (4 * case.hidden**2 + 3 * case.hidden * case.intermediate)
    attention = case.layers * 4 * case.hidden * length * (length + 1) / 2
    passes = (1 + case.layers * case.heads) * case.prompts
    return passes * (length * per_token + attention + 2 * case.hidden * case.vocabulary)


@torch.inference_mode()
def gemm_flops_per_s(case: Case, chunk_tokens: int, device: str = "cpu", repeats: int = 4) -> float:
    """FLOP/s of one layer's seven matrix products, alone, at the chunk's shape: the median of `repeats`."""
    d, m = case.hidden, case.intermediate
    x = torch.randn(chunk_tokens, d, dtype=case.dtype, device=device)
    y = torch.randn(chunk_tokens, m, dtype=case.dtype, device=device)
    square = [torch.randn(d, d, dtype=case.dtype, device=device) for _ in range(4)]
    wide = [torch.randn(m, d, dtype=case.dtype, device=device) for _ in range(2)]
    down = torch.randn(d, m, dtype=case.dtype, device=device)
    linear = torch.nn.functional.linear

    def layer() -> None:
        for w in square + wide:
            linear(x, w)
        linear(y, down)

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(5):
            layer()
        times.append((time.perf_counter() - start) / 5)
    return 2 * chunk_tokens * (4 * d * d + 3 * d * m) / statistics.median(times[2:])
