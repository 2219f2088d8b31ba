"""Plain torch oracles of every kernel: dense, slow, any device, any float dtype (float64 included).

They are what the kernels are tested against, and what `backend="reference"` runs. Nothing here is tuned.
"""

from __future__ import annotations

import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q, require_replacements
from .masks import scaled
from .sinks import sink_softmax


def visible(
    position: torch.Tensor,
    subtree_end: torch.Tensor,
    query_index: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Dense visibility of the prefix tree, bool [TQ, T]: which key each query may see.

    position, subtree_end: int [T] (see prefix_tree.py); query_index: int [TQ] packed indices of the queries,
    None for all T; window: sliding window in tokens, counting the token itself, None for no window.
    """
    node = torch.arange(position.shape[0], device=position.device)
    query = node if query_index is None else query_index.long()
    seen = (node[None, :] <= query[:, None]) & (query[:, None] < subtree_end[None, :])
    if window is not None:
        seen &= position[query][:, None] - position[None, :] < window
    return seen


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_scale: torch.Tensor,
    output_scale: torch.Tensor,
    position: torch.Tensor,
    subtree_end: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    query_index: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    replace: torch.Tensor | None = None,
    q_alt: torch.Tensor | None = None,
    k_alt: torch.Tensor | None = None,
    out_alt: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masked attention over a prefix tree with a mask vector per batch row and head.

        o[b, :, h] = output_scale[b, h] * softmax(cap(logit_scale[b, h] * scaling * q k^T) + mask) v
        cap(x) = softcap * tanh(x / softcap), or x without softcap

    A sink is one more logit of a head, whose weight goes nowhere: it joins the denominator, and neither factor nor
    softcap touches it.

    `replace` says which heads take their queries, their keys or their whole output from elsewhere: q_alt and
    k_alt stand in for q and k above, out_alt for softmax(...) v. Other heads give the bits of a call without it.

    Args:
        q: [B, H, TQ, D]; k, v: [B, HKV, T, D] with HKV dividing H (grouped-query attention). A batch
            dimension of 1 broadcasts over the rows of the mask vectors.
        logit_scale, output_scale: [B, H] float; 1 leaves the head as it is. A head whose output_scale
            is 0 gives exactly 0.
        sink: float [H], None for none.
        position, subtree_end: int [T], see prefix_tree.py.
        query_index: int [TQ], the packed index of each query, None if TQ = T.
        replace: int8 [B, H], the sum of REPLACE_Q, REPLACE_K and REPLACE_OUT for each row and query head, 0
            for a head that keeps its own; None for no replacement, and the three below are not looked at.
        q_alt: [B or 1, TQ, D], the queries of a head flagged REPLACE_Q.
        k_alt: [B or 1, T, D], the keys of a query head flagged REPLACE_K; others of its group keep theirs.
        out_alt: [H or 1, TQ or 1, D of v], the output of a head flagged REPLACE_OUT; dimensions of 1 broadcast.
            All three in q's dtype; None where no head is flagged for it.
    Returns:
        [B, TQ, H, D of v] in q's dtype, contiguous.
    Raises:
        ValueError: `replace` asks for vectors that are not given.
    """
    rows, heads = logit_scale.shape
    groups = heads // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    logits = logits.expand(rows, *logits.shape[1:])
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
        logits = _replaced_logits(logits, q, k, replace, q_alt, k_alt, scaling)
    logits = logits * logit_scale.to(q.dtype)[:, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = visible(position, subtree_end, query_index, window)
    weights = sink_softmax(logits.masked_fill(~seen, float("-inf")), sink)
    out = torch.matmul(weights, v)
    if replace is not None and out_alt is not None:
        out = torch.where((replace & REPLACE_OUT != 0)[:, :, None, None], out_alt, out)
    out = scaled(out, output_scale[:, :, None, None])
    return out.transpose(1, 2).contiguous()


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot: torch.Tensor,
    length: torch.Tensor,
    logit_scale: torch.Tensor,
    output_scale: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    replace: torch.Tensor | None = None,
    q_alt: torch.Tensor | None = None,
    k_alt: torch.Tensor | None = None,
    out_alt: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masked attention of one new query per entry over a key/value cache, with a mask vector per entry and head.

        o[n, h] = output_scale[n, h] * softmax(cap(logit_scale[n, h] * scaling * q k^T)) v
        cap(x) = softcap * tanh(x / softcap), or x without softcap

    over the visible positions of the entry's slot: length - window .. length - 1, or 0 .. length - 1 without a
    window. What the cache holds at other positions may be anything, NaN included, and changes nothing.

    Args:
        q: [N, H, D], one query for each entry; k_cache: [S, HKV, C, D] and v_cache: [S, HKV, C, D of v], slots of C
            positions, with HKV dividing H (grouped-query attention).
        slot: int [N], whose cache an entry reads. Several entries may read one slot, and some slots none.
        length: int [N], how many positions of the slot hold keys, 1..C; the newest key is at length - 1.
        logit_scale, output_scale: [N, H] float; 1 leaves the head as it is. A head whose output_scale
            is 0 gives exactly 0.
        window: sliding window in tokens, counting the new one, None for no window.
        sink: float [H], one more logit of a head, as in `tree_attention`; None for none.
        replace: int8 [N, H], the sum of REPLACE_Q, REPLACE_K and REPLACE_OUT for each entry and query head, 0 for a
            head that keeps its own; None for no replacement, and the three below are not looked at.
        q_alt: [N or 1, D], the query of a head flagged REPLACE_Q.
        k_alt: [S, C, D], a cache of the keys of a head flagged REPLACE_K; others of its group keep theirs.
        out_alt: [H or 1, D of v], the output of a head flagged REPLACE_OUT.
            All three in q's dtype; None where no head is flagged for it.
    Returns:
        [N, H, D of v] in q's dtype, contiguous.
    Raises:
        ValueError: `replace` asks for vectors that are not given.
    """
    slot = slot.long()
    groups = q.shape[1] // k_cache.shape[1]
    k, v = (x[slot].repeat_interleave(groups, dim=1) for x in (k_cache, v_cache))  # [N, H, C, D]
    ago = length[:, None] - torch.arange(k.shape[2], device=q.device)  # [N, C], 1 for the newest key
    seen = (ago >= 1) if window is None else (ago >= 1) & (ago <= window)
    logits = torch.matmul(q[:, :, None], k.transpose(-1, -2)) * scaling  # [N, H, 1, C]
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
        flagged = lambda flags: (replace & flags != 0)[:, :, None, None]
        query = q if q_alt is None else torch.where(flagged(REPLACE_Q)[..., 0], q_alt[:, None], q)
        key = k if k_alt is None else torch.where(flagged(REPLACE_K), k_alt[slot][:, None], k)
        other = torch.matmul(query[:, :, None], key.transpose(-1, -2)) * scaling
        logits = torch.where(flagged(REPLACE_Q | REPLACE_K), other, logits)
    logits = logits * logit_scale.to(q.dtype)[:, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = sink_softmax(logits.masked_fill(~seen[:, None, None], float("-inf")), sink)
    # A weight of 0 does not hide a value that is not finite.
    out = torch.matmul(weights, v.masked_fill(~seen[:, None, :, None], 0))[:, :, 0]
    if replace is not None and out_alt is not None:
        out = torch.where(flagged(REPLACE_OUT)[..., 0], out_alt, out)
    return scaled(out, output_scale[:, :, None]).contiguous()


def _replaced_logits(logits, q, k, replace, q_alt, k_alt, scaling: float) -> torch.Tensor:
    """`logits` [B, H, TQ, T], computed anew for the heads whose queries or keys are replaced, and for no other."""
    own_q, own_k = (x.expand(len(replace), -1, -1, -1) for x in (q, k))
    changed = replace & (REPLACE_Q | REPLACE_K) != 0
    logits = logits.clone()
    for b, h in changed.nonzero().tolist():
        query = q_alt[b if len(q_alt) > 1 else 0] if replace[b, h] & REPLACE_Q else own_q[b, h]  # [TQ, D]
        key = k_alt[b if len(k_alt) > 1 else 0] if replace[b, h] & REPLACE_K else own_k[b, h]  # [T, D]
        logits[b, h] = torch.matmul(query, key.transpose(-1, -2)) * scaling
    return logits
