"""Attention of ends in C++ (csrc/end_attention_cpu.cpp): the way of end_attention.py on CPUs where the extension is built."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..replacements import REPLACE_K, require_replacements
from .masks import LayerMask
from .prefix_tree import PackedPrompts
from .sinks import sink_numbers
from .tree_attention_cpp import BLOCK, Blocks, block_tables


def plan_end_blocks(packed: PackedPrompts, ends: np.ndarray, window: int | None) -> Blocks:
    """ends: int64 [U], nodes in ascending order. An end sees the keys above it, and not its own, which is no base row's."""

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, slice]]:
        for places, path in packed.paths_of(ends):
            for start in range(0, len(places), BLOCK):
                some = places[start : start + BLOCK]
                depth = packed.position[ends[some]]
                first = 0 if window is None else max(0, int(depth[0]) - window + 1)
                yield some, depth, path, slice(first, int(depth[-1]))

    return block_tables(parts(), window, itself=False)


def cpp_ends(
    plan: Blocks,
    base: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: LayerMask,
    *,
    scaling: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """`end_attention` in float32 or float64, without the mean over outputs: [B, U, H, D of v]."""
    alt = mask.replacements(q, k)
    if alt:
        require_replacements(alt["replace"], *(alt.get(name) for name in ("q_alt", "k_alt", "out_alt")))
    alt["base_k_alt"] = base[0][0].mean(0) if mask.bits & REPLACE_K else None
    none = q.new_empty(0, 0, 0)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    contiguous = lambda x: none if x is None else x if x.stride(-1) == 1 else x.contiguous()
    torch.ops.shipsfast.end_attention(
        *map(contiguous, (q, k, v, *base)), mask.logit_scale.double().contiguous(), mask.output_scale.double().contiguous(),
        torch.empty(0, dtype=torch.int8) if mask.replace is None else mask.replace.to(torch.int8).contiguous(),
        *(contiguous(alt.get(name)) for name in ("q_alt", "k_alt", "base_k_alt", "out_alt")),
        plan.blocks, plan.queries, plan.keys, sink_numbers(sink), scaling, softcap or 0.0, out,
    )  # fmt: skip
    return out
