"""Attention of single tokens at the ends of a prefix tree, each in the place of the base row's token there.

Token (b, u) of a row stands at the node ends[u]. It sees the base row's keys and values at the ancestors of the node, and its
own at the node itself:

    o[b, h, u] = softmax(cap(s q [K_base(ancestors of u); k_own]^T) + mask) [V_base(ancestors of u); v_own]

so that what a head does at an end changes no other token, and a row is as wide as there are ends. Ends on one path from the
root go together: their ancestors are on that path, and the base row's keys are one operand for all rows. Paths with as many ends,
and about as many keys, go together in turn, as many at a time as the two limits below let. In torch, for every device and dtype;
logits, from the products on, and softmax are in float32 for half precision. Where the backend is cpp, in C++
(end_attention_cpp.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from .end_attention_cpp import cpp_ends
from .masks import LayerMask, scaled
from .prefix_tree import PackedPrompts
from .sinks import sink_softmax

LOGIT_BYTES = 64 << 20  # of the logits that are made at a time
LOGIT_ARRAYS = 3  # of their size that are alive at once
GATHER_BYTES = 64 << 20  # keys and values of paths that are gathered at a time
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

    def cut(self, paths: slice, ends: int) -> Iterator[Paths]:
        """Some of the paths, with so many ends of each at a time."""
        places, keys = self.places.view(len(self.keys), -1)[paths], self.keys[paths]
        for start in range(0, places.shape[1], ends):
            some = slice(start, start + ends)
            hidden = None if self.hidden is None else self.hidden[paths, :, some]
            yield Paths(places[:, some].reshape(-1), keys, hidden)


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
    distance = depth[places][:, :, None] - np.arange(most, dtype=depth.dtype)
    hidden = distance <= 0
    if window is not None:
        hidden |= distance >= window
    put = lambda x: torch.as_tensor(x, device=device)
    return Paths(put(places.ravel()), put(keys), put(hidden[:, None]) if hidden.any() else None)


def scratch_bytes(
    rows: int, ends: int, longest: int, heads: int, kv_heads: int, sizes: int, itemsize: int
) -> int:
    """What `end_attention` holds while it runs, beside what it is given and returns.

    longest: keys above the deepest end; sizes: numbers of a key and a value; itemsize: bytes of a number.
    """
    logits = heads * (longest + 1) * max(itemsize, 4)
    keys = kv_heads * longest * sizes * max(itemsize, 4)
    hidden = ends * longest * (1 + 4)
    return (
        LOGIT_ARRAYS * min(max(LOGIT_BYTES, logits), rows * ends * logits)
        + min(max(GATHER_BYTES, keys), ends * keys)
        + hidden
    )


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
    every = torch.arange(base[0].shape[1], device=q.device)
    per_key = len(every) * (q.shape[3] + v.shape[3]) * wide.itemsize
    for paths in plan:
        count, longest = paths.keys.shape
        per_end = heads * (longest + 1) * wide.itemsize
        at_once = max(1, min(GATHER_BYTES // (per_key * max(1, longest)), LOGIT_BYTES // per_end))
        for some in range(0, count, at_once):
            keys = paths.keys[some : some + at_once]
            # [G, HKV, K, D], as products take them
            gathered = [x[0][every[:, None], keys[:, None]] for x in base]
            gathered[0] = gathered[0].to(wide)
            for part in paths.cut(slice(some, some + at_once), max(1, LOGIT_BYTES // (per_end * len(keys)))):
                step = max(1, LOGIT_BYTES // (per_end * len(part.places)))
                for start in range(0, rows, step):
                    chosen = slice(start, start + step)
                    # [G, heads, B, E, D]
                    own = [
                        x[chosen].index_select(1, part.places).unflatten(1, (len(keys), -1)).permute(1, 3, 0, 2, 4)
                        for x in (q, k, v)
                    ]  # fmt: skip
                    replaced = None
                    if other_k is not None:
                        own_k = (
                            alt["k_alt"][chosen].index_select(1, part.places).unflatten(1, (len(keys), -1))
                        )
                        replaced = (*other_k[chosen].nonzero(as_tuple=True), gathered[0].mean(1), own_k)
                    found = _attend(*own, *gathered, part, replaced, mask.logit_scale[chosen], **how)
                    out[chosen].index_copy_(1, part.places, found.permute(2, 0, 3, 1, 4).flatten(1, 2))
            del gathered  # before the next ones are
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
    q = q.to(wide)
    grouped = q.reshape(count, kv_heads, heads // kv_heads * rows * ends, size)
    logits = q.new_empty(count, heads, rows, ends, longest + 1)
    logits[..., :-1] = torch.matmul(grouped, base_k.transpose(2, 3)).view(count, heads, rows, ends, longest)
    by_kv = q.unflatten(1, (kv_heads, -1))
    logits[..., -1] = (by_kv * k.to(wide)[:, :, None]).sum(-1).flatten(1, 2)
    if replaced is not None:
        b, h, mean_k, own_k = replaced
        query = q[:, h, b]  # [G, N, E, D]
        logits[:, h, b, :, :-1] = torch.matmul(query, mean_k[:, None].transpose(2, 3))
        logits[:, h, b, :, -1] = (query * own_k[b].transpose(0, 1).to(wide)).sum(-1)
    logits *= (scaling * logit_scale.to(wide)).t()[None, :, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if paths.hidden is not None:
        logits[..., :-1].masked_fill_(paths.hidden[:, :, None], float("-inf"))
    weights = sink_softmax(logits.flatten(2, 3), None if sink is None else sink.to(wide)).to(v.dtype)
    del logits  # before the weights are copied
    weights = weights.view(count, kv_heads, heads // kv_heads, rows, ends, longest + 1)
    seen = (
        weights[..., :-1].reshape(count, kv_heads, -1, longest)
        if longest
        else weights.new_zeros(count, kv_heads, grouped.shape[2], 0)
    )
    out = torch.matmul(seen, base_v).view(count, kv_heads, -1, rows, ends, v.shape[-1])
    return torch.addcmul(out, weights[..., -1:], v[:, :, None]).flatten(1, 2)
