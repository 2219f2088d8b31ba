"""Plain torch oracles of every kernel: dense, slow, any device, any float dtype (float64 included).

They are what the kernels are tested against, and what `backend="reference"` runs. Nothing here is tuned.
"""

from __future__ import annotations

import torch


def visible(
    position: torch.Tensor,
    subtree_end: torch.Tensor,
    query_index: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Dense visibility of the prefix tree, bool [TQ, T]: which key each query may see.

    position, subtree_end: int [T] (see packing.py); query_index: int [TQ] packed indices of the queries,
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
) -> torch.Tensor:
    """Masked attention over a prefix tree with a mask vector per batch row and head.

        o[b, :, h] = output_scale[b, h] * softmax(cap(logit_scale[b, h] * scaling * q k^T) + mask) v
        cap(x) = softcap * tanh(x / softcap), or x without softcap

    Args:
        q: [B, H, TQ, D]; k, v: [B, HKV, T, D] with HKV dividing H (grouped-query attention). A batch
            dimension of 1 broadcasts over the rows of the mask vectors.
        logit_scale, output_scale: [B, H] float; 1 leaves the head as it is. A head whose output_scale
            is 0 gives exactly 0.
        position, subtree_end: int [T], see packing.py.
        query_index: int [TQ], the packed index of each query, None if TQ = T.
    Returns:
        [B, TQ, H, D] in q's dtype, contiguous.
    """
    rows, heads = logit_scale.shape
    groups = heads // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    logits = logits.expand(rows, *logits.shape[1:]) * logit_scale.to(q.dtype)[:, :, None, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = visible(position, subtree_end, query_index, window)
    weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), dim=-1)
    out = torch.matmul(weights, v)
    off = (output_scale == 0)[:, :, None, None]
    out = (out * output_scale.to(q.dtype)[:, :, None, None]).masked_fill(off, 0)
    return out.transpose(1, 2).contiguous()
