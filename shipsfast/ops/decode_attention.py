"""Attention of one new token per row over a key/value cache, by the backend that was chosen.

The contract is `reference.decode_attention`. Triton: kernels/decode_attention.py; cpp: csrc/decode_attention_cpu.cpp;
torch, where neither runs, is below.
"""

from __future__ import annotations

import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q, require_replacements
from . import reference
from .masks import LayerMask, scaled
from .sinks import sink_numbers, sink_softmax


def decode_attention(
    backend: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    mean_key: torch.Tensor | None,
    slot: torch.Tensor,
    length: torch.Tensor,
    mask: LayerMask,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.decode_attention` with the mask vectors and replacements of a `LayerMask` of N rows.

    q [N, H, D]; caches [S, HKV, C, D]; mean_key [S, C, D], None if no ablation asks for it; slot, length int32 [N].
    Returns [N, H, DV].
    """
    function = {"cpp": cpp_attention, "torch": torch_attention, "reference": reference.decode_attention}.get(
        backend
    )
    if function is None:
        from ..kernels.decode_attention import decode_attention as function  # needs triton

        sink = None if sink is None else sink.float().contiguous()
    alt = mask.replace_by(lambda: q.mean(1), lambda: mean_key, lambda: mask.value[:, 0])
    out = function(
        q, k_cache, v_cache, slot, length, mask.logit_scale, mask.output_scale,
        scaling=scaling, softcap=softcap, window=window, sink=sink, **alt,
    )  # fmt: skip
    return mask.finish(out[:, None])[:, 0]


def cpp_attention(
    q, k_cache, v_cache, slot, length, logit_scale, output_scale, *, scaling, softcap=None, window=None, sink=None,
    replace=None, q_alt=None, k_alt=None, out_alt=None,
) -> torch.Tensor:  # fmt: skip
    """In C++, float32 or float64, on a CPU."""
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
    none = q.new_empty(0, 0)
    out = q.new_empty(*q.shape[:2], v_cache.shape[3])
    torch.ops.shipsfast.decode_attention(
        q if q.stride(2) == 1 else q.contiguous(), k_cache, v_cache, slot.int().contiguous(), length.int().contiguous(),
        logit_scale.double().contiguous(), output_scale.double().contiguous(),
        torch.empty(0, dtype=torch.int8) if replace is None else replace.to(torch.int8).contiguous(),
        *(none if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in (q_alt, k_alt, out_alt)),
        sink_numbers(sink), scaling, softcap or 0.0, window or 0, out,
    )  # fmt: skip
    return out


def torch_attention(
    q, k_cache, v_cache, slot, length, logit_scale, output_scale, *, scaling, softcap=None, window=None, sink=None,
    replace=None, q_alt=None, k_alt=None, out_alt=None,
) -> torch.Tensor:  # fmt: skip
    """In torch, on any device and in any dtype: the slots' keys and values are gathered, up to the longest row."""
    if replace is not None:
        require_replacements(replace, q_alt, k_alt, out_alt)
    longest = int(length.max()) if length.numel() else 1
    slot = slot.long()
    place = torch.arange(longest, device=q.device)
    seen = place < length[:, None]
    if window is not None:
        seen &= place >= length[:, None] - window
    groups = q.shape[1] // k_cache.shape[1]
    # What lies beyond a row's length may be anything, and 0 x NaN is NaN.
    value = torch.where(seen[:, None, :, None], v_cache[slot, :, :longest], 0)
    key = k_cache[slot, :, :longest]
    if replace is not None and q_alt is not None:
        q = torch.where((replace & REPLACE_Q != 0)[:, :, None], q_alt[:, None], q)
    grouped = q.unflatten(1, (-1, groups))
    logits = torch.matmul(grouped, key.transpose(-1, -2)).flatten(1, 2)
    if replace is not None and k_alt is not None:
        other = torch.matmul(q, k_alt[slot, :longest].transpose(-1, -2))
        logits = torch.where((replace & REPLACE_K != 0)[:, :, None], other, logits)
    logits = logits * (scaling * logit_scale.to(logits.dtype))[:, :, None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = sink_softmax(logits[:, :, None].masked_fill(~seen[:, None, None], float("-inf")), sink)[:, :, 0]
    out = torch.matmul(weights.unflatten(1, (-1, groups)), value).flatten(1, 2)
    if replace is not None and out_alt is not None:
        out = torch.where((replace & REPLACE_OUT != 0)[:, :, None], out_alt, out)
    return scaled(out, output_scale[:, :, None])
