"""Attention of single tokens at the ends of a prefix tree, each in the place of the base row's token there.

Token (b, u) of a row stands at the node ends[u]. It sees the base row's keys and values at the ancestors of the node, and its
own at the node itself:

    o[b, h, u] = softmax(cap(s q [K_base(ancestors of u); k_own]^T) + mask) [V_base(ancestors of u); v_own]

so that what a head does at an end changes no other token, and a row is as wide as there are ends. Ends on one path from the
root go together: their ancestors are on that path, and the base row's keys are one operand for all rows. Paths with as many ends,
and about as many keys, go together in turn. In torch, for every device and dtype; logits and softmax are in float32 for half
precision. Where the backend is cpp, in C++ (end_attention_cpp.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from .end_attention_cpp import cpp_ends
from .masks import LayerMask, scaled
from .prefix_tree import PackedPrompts
from .sinks import sink_softmax

LOGIT_BYTES = 64 << 20  # of the logits that are made at a time
PADDED = 1.25  # keys of the longest path that goes with others, by those of the shortest


@dataclass(frozen=True)
class Paths:
    """G paths from the root with E ends on each.

    places int64 [G * E]: which of all ends; keys int64 [G, K]: nodes of each path above its deepest end, padded with node 0;
    hidden bool [G, 1, E, K]: keys that an end does not see, None where each sees all.
    """

    places: torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor | None


def plan_ends(
    packed: PackedPrompts, ends: np.ndarray, window: int | None, device: torch.device | str
) -> list[Paths]:
    """ends: int64 [U], nodes in ascending order, which is depth first."""
    found = sorted(packed.paths_of(ends), key=lambda path: (len(path[0]), len(path[1])))
    stacks: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for path in found:
        first = stacks[-1][0] if stacks else None
        if first and len(first[0]) == len(path[0]) and len(path[1]) <= PADDED * max(len(first[1]), 8):
            stacks[-1].append(path)
        else:
            stacks.append([path])
    return [_stack(paths, packed.position[ends], window, device) for paths in stacks]


def _stack(paths, depth: np.ndarray, window: int | None, device) -> Paths:
    """depth: of all ends."""
    most = len(paths[-1][1])
    keys = np.zeros((len(paths), most), dtype=np.int64)
    for row, (_, above) in zip(keys, paths, strict=True):
        row[: len(above)] = above
    places = np.stack([places for places, _ in paths])
    # Depth along a path is the place on it, and padding is deeper than every end.
    distance = depth[places][:, :, None] - np.arange(most)
    hidden = distance <= 0
    if window is not None:
        hidden |= distance >= window
    put = lambda x: torch.as_tensor(x, device=device)
    return Paths(put(places.ravel()), put(keys), put(hidden[:, None]) if hidden.any() else None)


def end_attention(
    tree,
    base: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: LayerMask,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B or 1, H, U, D], own k and v [B or 1, HKV, U, D], base keys and values [1, HKV, T, D] -> [B, U, H, D of v], contiguous.

    tree: a TreeContext, whose `trimmed` are the ends; mask: of the B rows, a value per token being one per end.
    """
    q, k, v = (x.expand(len(mask.logit_scale), -1, -1, -1) for x in (q, k, v))
    how = {"scaling": scaling, "softcap": softcap, "sink": sink}
    plan, attend = tree.end_plan(window), cpp_ends if tree.backend == "cpp" else _torch_ends
    if tree.backend == "cpp" and mask.mean_out is None:  # it leaves out heads that are off
        return attend(plan, base, q, k, v, mask, **how)
    before = out = attend(plan, base, q, k, v, mask.without_outputs(), **how)
    fixed = mask.flagged(REPLACE_OUT)
    if fixed is not None:
        out = torch.where(fixed[:, None, :, None], mask.value.transpose(0, 1)[None], out)
    return mask.finish(scaled(out, mask.output_scale[:, None, :, None]), before)


def _torch_ends(plan: list[Paths], base, q, k, v, mask: LayerMask, **how) -> torch.Tensor:
    rows, heads, ends, _ = q.shape
    alt = mask.replacements(q, k)
    other_q, other_k = map(mask.flagged, (REPLACE_Q, REPLACE_K))
    if other_q is not None:
        q = torch.where(other_q[:, :, None, None], alt["q_alt"][:, None], q)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, U, heads, D], how the projections laid them out
    out = q.new_empty(rows, ends, heads, v.shape[3])
    for paths in plan:
        count, longest = paths.keys.shape
        gathered = [x[0].transpose(0, 1)[paths.keys].transpose(1, 2) for x in base]  # [G, HKV, K, D]
        per_row = heads * len(paths.places) * (longest + 1) * wide.itemsize
        for some in range(0, rows, step := max(1, LOGIT_BYTES // per_row)):
            chosen = slice(some, some + step)
            # [G, heads, B, E, D]
            own = [
                x[chosen].index_select(1, paths.places).unflatten(1, (count, -1)).permute(1, 3, 0, 2, 4)
                for x in (q, k, v)
            ]
            replaced = None
            if other_k is not None:
                own_k = alt["k_alt"][chosen].index_select(1, paths.places).unflatten(1, (count, -1))
                replaced = (*other_k[chosen].nonzero(as_tuple=True), gathered[0].mean(1), own_k)
            found = _attend(*own, *gathered, paths, replaced, mask.logit_scale[chosen], **how)
            out[chosen].index_copy_(1, paths.places, found.permute(2, 0, 3, 1, 4).flatten(1, 2))
    return out


def _attend(
    q, k, v, base_k, base_v, paths: Paths, replaced, logit_scale, scaling: float, softcap: float | None, sink
) -> torch.Tensor:
    """q [G, H, B, E, D], k and v [G, HKV, B, E, D], base_k and base_v [G, HKV, K, D] -> [G, H, B, E, D of v].

    replaced: (rows [N], query heads [N], the base row's mean keys [G, K, D], the rows' own [B, G, E, D]), None for no head.
    """
    count, heads, rows, ends, size = q.shape
    kv_heads, longest = base_k.shape[1], base_k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    # One product for each path and key/value head, of [query heads that share it x rows x ends, D].
    grouped = q.reshape(count, kv_heads, heads // kv_heads * rows * ends, size)
    logits = q.new_empty(count, heads, rows, ends, longest + 1, dtype=wide)
    logits[..., :-1] = torch.matmul(grouped, base_k.transpose(2, 3)).view(count, heads, rows, ends, longest)
    by_kv = q.to(wide).unflatten(1, (kv_heads, -1))
    logits[..., -1] = (by_kv * k.to(wide)[:, :, None]).sum(-1).flatten(1, 2)
    if replaced is not None:
        b, h, mean_k, own_k = replaced
        query = q[:, h, b]  # [G, N, E, D]
        logits[:, h, b, :, :-1] = torch.matmul(query, mean_k[:, None].transpose(2, 3)).to(wide)
        logits[:, h, b, :, -1] = (query.to(wide) * own_k[b].transpose(0, 1).to(wide)).sum(-1)
    logits *= (scaling * logit_scale.to(wide)).t()[None, :, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if paths.hidden is not None:
        logits[..., :-1].masked_fill_(paths.hidden[:, :, None], float("-inf"))
    weights = sink_softmax(logits.flatten(2, 3), None if sink is None else sink.to(wide)).to(v.dtype)
    weights = weights.view(count, kv_heads, heads // kv_heads, rows, ends, longest + 1)
    seen = (
        weights[..., :-1].reshape(count, kv_heads, -1, longest)
        if longest
        else weights.new_zeros(count, kv_heads, grouped.shape[2], 0)
    )
    out = torch.matmul(seen, base_v).view(count, kv_heads, -1, rows, ends, v.shape[-1])
    return torch.addcmul(out, weights[..., -1:], v[:, :, None]).flatten(1, 2)
