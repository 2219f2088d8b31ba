"""Attention of single tokens at the ends of a prefix tree, each in the place of the base row's token there.

Token (b, u) of a row stands at the node ends[u]. It sees the base row's keys and values at the ancestors of the node, and its
own at the node itself:

    o[b, h, u] = softmax(cap(s q [K_base(ancestors of u); k_own]^T) + mask) [V_base(ancestors of u); v_own]

so that what a head does at an end changes no other token, and a row is as wide as there are ends. Ends on one path from the
root go together: their ancestors are on that path, and the base row's keys are one operand for all rows. In torch, for every
device and dtype; logits and softmax are in float32 for half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from .masks import LayerMask, scaled
from .prefix_tree import PackedPrompts
from .sinks import sink_softmax

LOGIT_BYTES = 64 << 20  # of the logits that are made at a time


@dataclass(frozen=True)
class Path:
    """`count` ends on one path from the root. places: which of all ends, a slice or int64 [E]; keys int64 [K], nodes of the path above the deepest of
    them; hidden bool [E, K], None where each end sees every key."""

    count: int
    places: slice | torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor | None


def plan_ends(
    packed: PackedPrompts, ends: np.ndarray, window: int | None, device: torch.device | str
) -> list[Path]:
    """ends: int64 [U], nodes in ascending order, which is depth first."""
    paths, left = [], np.ones(len(ends), dtype=bool)
    for deepest in reversed(range(len(ends))):
        node = ends[deepest]
        if not left[deepest]:
            continue
        above = np.arange(node)
        above = above[packed.subtree_end[:node] > node]
        places = np.flatnonzero(left & np.isin(ends, np.append(above, node)))
        left[places] = False
        # Depth along a path is the place on it.
        distance = packed.position[ends[places]][:, None] - np.arange(len(above))[None]
        hidden = distance <= 0
        if window is not None:
            hidden |= distance >= window
        put = lambda x: torch.as_tensor(x, device=device)
        in_a_row = places[-1] - places[0] == len(places) - 1
        chosen = slice(int(places[0]), int(places[-1]) + 1) if in_a_row else put(places)
        paths.append(Path(len(places), chosen, put(above), put(hidden) if hidden.any() else None))
    return paths


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
    """q [B, H, U, D], own k and v [B, HKV, U, D], base keys and values [1, HKV, T, D] -> [B, U, H, D of v], contiguous.

    tree: a TreeContext, whose `trimmed` are the ends; mask: of the B rows, a value per token being one per end.
    """
    rows, heads, ends, _ = q.shape
    alt = mask.replacements(q, k)
    other_q, other_k, fixed = map(mask.flagged, (REPLACE_Q, REPLACE_K, REPLACE_OUT))
    if other_q is not None:
        q = torch.where(other_q[:, :, None, None], alt["q_alt"][:, None], q)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(rows, ends, heads, v.shape[3])
    for path in tree.end_paths(window):
        base_k, base_v = (x[0].index_select(1, path.keys) for x in base)  # [HKV, K, D]
        per_row = heads * path.count * (len(path.keys) + 1) * wide.itemsize
        for some in range(0, rows, step := max(1, LOGIT_BYTES // per_row)):
            chosen = slice(some, some + step)
            own = [x[chosen, :, path.places] for x in (q, k, v)]
            flagged = None if other_k is None else other_k[chosen].nonzero(as_tuple=True)
            keys = None if flagged is None else (*flagged, base_k.mean(0), alt["k_alt"][chosen, path.places])
            out[chosen, path.places] = _attend(
                *own, base_k, base_v, path, keys, mask.logit_scale[chosen], wide, scaling, softcap, sink
            ).transpose(1, 2)
    before = out
    if fixed is not None:
        out = torch.where(fixed[:, None, :, None], alt["out_alt"].transpose(0, 1)[None], out)
    return mask.finish(scaled(out, mask.output_scale[:, None, :, None]), before)


def _attend(
    q, k, v, base_k, base_v, path: Path, replaced, logit_scale, wide, scaling, softcap, sink
) -> torch.Tensor:
    """Of some rows at the ends of a path, [B, H, E, D of v]. replaced: (rows [N], query heads [N], the base row's mean keys [K, D],
    the rows' own [B, E, D]), None for no head."""
    rows, heads, ends, size = q.shape
    kv_heads = base_k.shape[0]
    group = heads // kv_heads
    # [HKV, rows x group x E, D]: one product for each key/value head
    grouped = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, rows * group * ends, size)
    above = torch.matmul(grouped, base_k.transpose(1, 2)).to(wide)
    above = (
        above.view(kv_heads, rows, group, ends, above.shape[-1]).transpose(0, 1).flatten(1, 2)
    )  # [B, H, E, K]
    own = (
        (q.to(wide).unflatten(1, (kv_heads, -1)) * k.to(wide)[:, :, None]).sum(-1).flatten(1, 2)
    )  # [B, H, E]
    logits = torch.cat([above, own[..., None]], -1)
    if replaced is not None:
        b, h, mean_k, own_k = replaced
        query = q[b, h]  # [N, E, D]
        logits[b, h, :, :-1] = torch.matmul(query, mean_k.t()).to(wide)
        logits[b, h, :, -1] = (query.to(wide) * own_k[b].to(wide)).sum(-1)
    logits *= scaling * logit_scale.to(wide)[:, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if path.hidden is not None:
        logits[..., :-1].masked_fill_(path.hidden, float("-inf"))
    weights = sink_softmax(logits, None if sink is None else sink.to(wide)).to(v.dtype)
    seen = (
        weights[..., :-1]
        .unflatten(1, (kv_heads, -1))
        .transpose(0, 1)
        .reshape(kv_heads, rows * group * ends, -1)
    )
    out = torch.matmul(seen, base_v).view(kv_heads, rows, group, ends, v.shape[3]).transpose(0, 1)
    return (out + weights[..., -1:].unflatten(1, (kv_heads, -1)) * v[:, :, None]).flatten(1, 2)
