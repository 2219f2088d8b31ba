"""Tree attention in plain torch, without a T x T mask: the path that runs where Triton does not.

The tree's unbranched runs are cut into blocks of at most BLOCK queries. The queries of a block see the
whole path above the block and, causally, the block itself, so a block is one small dense attention
[queries x (depth + queries)]. Blocks of the same depth and padded length go through one call of
`scaled_dot_product_attention` together, and share one mask. A mask lives while its block is computed; what is
kept is O(T) depths and indices per block, and the work is what the tree needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q, require_replacements
from .masks import scaled
from .prefix_tree import PackedPrompts
from .sinks import sink_softmax

BLOCK = 256  # queries per block: bounds the mask of a long prompt
GATHER_BYTES = 64 << 20  # keys and values gathered at a time
PAD = 8  # lengths are padded to a multiple of this, so that fewer, larger calls are made


@dataclass(frozen=True)
class BlockStack:
    """G blocks of S queries and K keys each, in one call.

    query_index int64 [G, S] into the queries; key_index int64 [G, K] into the packed tokens;
    depth_q int32 [G or 1, S], depth_k int32 [G or 1, K]: depths in the tree, which say what is visible; one
        row where all blocks have the same; the mask itself is made when it is needed, and not kept;
    causal: the mask is the plain causal one (S = K);
    real bool [G, S], None if all are: which entries of query_index are not padding.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    depth_q: torch.Tensor
    depth_k: torch.Tensor
    window: int | None
    causal: bool
    real: torch.Tensor | None

    def mask(self, blocks: slice) -> torch.Tensor | None:
        """bool [G or 1, 1, S, K]; None where causal."""
        if self.causal:
            return None
        part = blocks if len(self.depth_q) > 1 else slice(None)
        distance = self.depth_q[part, None, :, None] - self.depth_k[part, None, None, :]
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


def plan_segments(
    packed: PackedPrompts,
    *,
    window: int | None,
    query_index: np.ndarray | None,
    device: torch.device,
) -> list[BlockStack]:
    """Cut the tree into stacks of blocks. query_index: the packed index of each query, None for all T."""
    pending: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
    depths = np.arange(packed.num_tokens, dtype=np.int32)  # depth along a path is the place on it
    for place, queries, path, seen in tree_blocks(packed, BLOCK, window, query_index):
        keys = path[seen]
        shape = (_padded(len(queries)), _padded(len(keys) - len(queries)))
        pending.setdefault(shape, []).append((place, queries, keys, depths[seen]))
    return [_stack(blocks, packed, window, device) for _, blocks in sorted(pending.items())]


def tree_blocks(
    packed: PackedPrompts, size: int, window: int | None, query_index: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, slice]]:
    """Runs of at most `size` queries without a branch: (places among the queries, packed indices, path, keys they see).

    The path goes from the root down to the end of the run's segment, in packed indices, one array for all runs of the
    segment; the keys are a slice of it: each query sees those that are at most as deep as itself, and within the window.
    """
    inverse = np.arange(packed.num_tokens)
    if query_index is not None:
        inverse = np.full(packed.num_tokens, -1)
        inverse[query_index] = np.arange(len(query_index))
    for number, segment in enumerate(packed.segments):
        above = [
            np.arange(packed.segments[s].start, packed.segments[s].stop) for s in packed.path(number)[:-1]
        ]
        path = np.concatenate([*above, np.arange(segment.start, segment.stop)])
        before = len(path) - segment.stop
        for start in range(segment.start, segment.stop, size):
            stop = min(start + size, segment.stop)
            queries = np.arange(start, stop)
            queries = queries[inverse[queries] >= 0]
            if len(queries):
                # Depth along a path is the place on it.
                first = 0 if window is None else max(0, int(packed.position[queries[0]]) - window + 1)
                yield inverse[queries], queries, path, slice(first, before + stop)


def _padded(length: int) -> int:
    return length if length <= 1 else -(-length // PAD) * PAD


def _extend(values: np.ndarray, length: int, step: int) -> np.ndarray:
    """`values` padded at the end to `length`, counting on from the last by `step`."""
    pad = length - len(values)
    return np.concatenate([values, values[-1] + step * np.arange(1, pad + 1)])


def _stack(blocks, packed: PackedPrompts, window, device) -> BlockStack:
    num_q = max(len(q) for _, q, _, _ in blocks)
    num_k = max(len(k) for _, _, k, _ in blocks)
    queries = np.stack([_extend(p, num_q, 0) for p, _, _, _ in blocks])  # [G, S]
    # Within a path, "ancestor or itself" is "at most as deep". Padding repeats the last token but counts on
    # in depth: no real query sees it, and blocks of different length keep one and the same mask.
    depth_q = np.stack([_extend(packed.position[q], num_q, 1) for _, q, _, _ in blocks])
    if len(blocks) == 1:  # as slices of the path, which all blocks of a long prompt share
        keys, depth_k = blocks[0][2][None], blocks[0][3][None]
    else:
        keys = np.stack([_extend(k, num_k, 0) for _, _, k, _ in blocks])  # [G, K]
        depth_k = np.stack([_extend(d, num_k, 1) for *_, d in blocks])
    if (depth_q == depth_q[:1]).all() and (depth_k == depth_k[:1]).all():
        depth_q, depth_k = depth_q[:1], depth_k[:1]
    causal = (
        len(depth_q) == 1
        and num_q == num_k
        and (window is None or num_q <= window)
        and (depth_q == depth_k).all()
    )
    real = np.stack([np.arange(num_q) < len(q) for _, q, _, _ in blocks])

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=device)

    return BlockStack(
        query_index=tensor(queries),
        key_index=tensor(keys),
        depth_q=tensor(depth_q),
        depth_k=tensor(depth_k),
        window=window,
        causal=bool(causal),
        real=None if real.all() else tensor(real),
    )


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_scale: torch.Tensor,
    output_scale: torch.Tensor,
    stacks: list[BlockStack],
    *,
    scaling: float,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    replace: torch.Tensor | None = None,
    q_alt: torch.Tensor | None = None,
    k_alt: torch.Tensor | None = None,
    out_alt: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same function as `reference.tree_attention`, with the tree given as `plan_segments` cut it.

    q [B, H, TQ, D], k and v [B, HKV, T, D], logit_scale and output_scale [B, H], sink [H] -> [B, TQ, H, D of v].
    The replacements are those of the reference too: replace int8 [B, H], q_alt [B or 1, TQ, D],
    k_alt [B or 1, T, D], out_alt [H or 1, TQ or 1, D of v]. Rows and heads without a flag pay nothing for them.
    Raises ValueError if `replace` asks for vectors that are not given.
    """
    rows, heads = logit_scale.shape
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, heads, D], how the projections laid them out
    touched = (logit_scale != 1).any(1).nonzero().flatten()
    replaced = _flagged(replace, REPLACE_Q)
    if len(touched) or replaced:
        q = q.expand(rows, -1, -1, -1).clone()
        if replaced:
            b, h = replaced
            q[b, :, h] = q_alt if len(q_alt) == 1 else q_alt[b]
        q[touched] *= logit_scale[touched].to(q.dtype)[:, None, :, None]
    q, k, v = (x.expand(rows, -1, -1, -1) for x in (q, k, v))
    keys = _flagged(replace, REPLACE_K)
    keys = (*keys, k_alt) if keys else None
    out = torch.empty(rows, q.shape[1], heads, v.shape[3], dtype=q.dtype, device=q.device)
    for stack in stacks:
        # Every block gathers its own copy of its path: few enough at a time to bound what that takes.
        per_block = rows * heads * stack.key_index.shape[1] * (q.shape[3] + v.shape[3]) * q.element_size()
        step = max(1, GATHER_BYTES // per_block)
        for start in range(0, len(stack.key_index), step):
            blocks = slice(start, start + step)
            index = stack.query_index[blocks].flatten()
            part = _attend(q, k, v, keys, stack, blocks, scaling, softcap, sink)
            if stack.real is not None:
                real = stack.real[blocks].flatten().nonzero().flatten()
                index, part = index[real], part.index_select(1, real)
            out[:, index] = part
    replaced = _flagged(replace, REPLACE_OUT)
    if replaced:
        b, h = replaced
        out[b, :, h] = out_alt if len(out_alt) == 1 else out_alt[h]
    touched = (output_scale != 1).any(1).nonzero().flatten()
    if len(touched):
        out[touched] = scaled(out[touched], output_scale[touched][:, None, :, None])
    return out


def _flagged(replace: torch.Tensor | None, flag: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows [N], query heads [N]) that have the flag, None if there are none."""
    if replace is None:
        return None
    b, h = (replace & flag).nonzero(as_tuple=True)
    return (b, h) if len(b) else None


def _attend(
    q, k, v, replaced, stack: BlockStack, chosen: slice, scaling: float, softcap: float | None, sink
) -> torch.Tensor:
    """Some blocks of a stack, [B, G * S, H, D of v]. replaced: (rows [N], query heads [N], k_alt), or None."""
    rows, size = q.shape[0], len(stack.query_index[chosen])

    def blocks(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # [B, T, h, D] -> [B * G, h, n, D]
        return x.index_select(1, index[chosen].flatten()).view(rows * size, -1, *x.shape[2:]).transpose(1, 2)

    qb, kb, vb = blocks(q, stack.query_index), blocks(k, stack.key_index), blocks(v, stack.key_index)
    repeat = qb.shape[1] // kb.shape[1]
    if repeat > 1:
        kb, vb = kb.repeat_interleave(repeat, 1), vb.repeat_interleave(repeat, 1)
    if replaced is not None:
        # Only now has every query head keys of its own, and they are a copy.
        b, h, k_alt = replaced
        index = stack.key_index[chosen]  # [G, K]
        keys = k_alt[:, index] if len(k_alt) == 1 else k_alt[b[:, None, None], index]  # [N or 1, G, K, D]
        kb.unflatten(0, (rows, size))[b, :, h] = keys
    mask = stack.mask(chosen)
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat(rows, 1, 1, 1)
    out = visible_attention(qb, kb, vb, mask, scaling, softcap, sink)
    return out.transpose(1, 2).reshape(rows, -1, out.shape[1], out.shape[3])


def visible_attention(q, k, v, visible, scaling: float, softcap: float | None, sink) -> torch.Tensor:
    """Plain attention [B, H, TQ, DV] of q [B, H, TQ, D] over k and v [B, H, T, ...]; visible: bool, None for causal."""
    if softcap is None and sink is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scaling
        )
    return torch.matmul(visible_weights(q, k, visible, scaling, softcap, sink), v)


def visible_weights(q, k, visible, scaling: float, softcap: float | None, sink) -> torch.Tensor:
    """The weights [B, H, TQ, T] of `visible_attention`: those of a row sum to 1, or to less where there is a sink."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is None:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    # A finite number: padding sees nothing, and what it gives is read by nobody.
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return sink_softmax(logits, sink)
