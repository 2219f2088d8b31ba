"""Tree attention in C++ (csrc/tree_attention_cpu.cpp): the way on CPUs where the extension is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..replacements import require_replacements
from .prefix_tree import PackedPrompts
from .sinks import sink_numbers
from .tree_attention_torch import tree_blocks

BLOCK = 96  # queries per block: what a thread holds of a head's outputs


@dataclass(frozen=True)
class Blocks:
    """The tree in int32 tables.

    blocks [G, 4]: where a block's queries begin and end, and its keys;
    queries [NQ, 3]: index of a query, and which of the block's keys it sees: first, one past the last;
    keys [NK]: packed indices by depth, the path of each segment; a block's keys are a slice of one.
    """

    blocks: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor


def plan_blocks(packed: PackedPrompts, *, window: int | None, query_index: np.ndarray | None) -> Blocks:
    """Cut the tree into blocks. query_index: the packed index of each query, None for all T."""
    parts = tree_blocks(packed, BLOCK, window, query_index)
    return block_tables(
        ((place, packed.position[nodes], path, seen) for place, nodes, path, seen in parts),
        window,
        itself=True,
    )


def block_tables(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, slice]], window: int | None, *, itself: bool
) -> Blocks:
    """parts: of each block the indices and depths of its queries, their path in packed indices from the root, and which of it
    is the block's keys. itself: a query's own token is one of the keys that it sees.
    """
    blocks, queries, keys = [], [], []
    num_queries = num_keys = begin = 0
    for place, depth, path, seen in parts:
        if not keys or keys[-1] is not path:  # the blocks of a segment share its path
            keys.append(path)
            begin, num_keys = num_keys, num_keys + len(path)
        # Depth along a path is the place on it.
        depth = depth.astype(np.int64)
        first = np.zeros_like(depth) if window is None else np.maximum(depth - window + 1, 0)
        queries.append(np.stack([place, first - seen.start, depth + itself - seen.start], 1))
        blocks.append([num_queries, num_queries + len(place), begin + seen.start, begin + seen.stop])
        num_queries += len(place)

    def table(rows) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32))

    return Blocks(table(blocks), table(np.concatenate(queries)), table(np.concatenate(keys)))


def cpp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_scale: torch.Tensor,
    output_scale: torch.Tensor,
    plan: Blocks,
    *,
    scaling: float,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    replace: torch.Tensor | None = None,
    q_alt: torch.Tensor | None = None,
    k_alt: torch.Tensor | None = None,
    out_alt: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same function as `reference.tree_attention` in float32 or float64, the tree as `plan_blocks` cut it."""
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
    rows, heads = logit_scale.shape
    none = q.new_empty(0, 0, 0)
    out = q.new_empty(rows, q.shape[2], heads, v.shape[3])
    torch.ops.shipsfast.tree_attention(
        *(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)),
        logit_scale.double().contiguous(), output_scale.double().contiguous(),
        torch.empty(0, dtype=torch.int8) if replace is None else replace.to(torch.int8).contiguous(),
        *(none if x is None else x if x.stride(2) == 1 else x.contiguous() for x in (q_alt, k_alt, out_alt)),
        plan.blocks, plan.queries, plan.keys, sink_numbers(sink), scaling, softcap or 0.0, out,
    )  # fmt: skip
    return out
