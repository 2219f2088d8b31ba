"""Triton attention of one new query per entry over a key/value cache, with a mask vector per entry and head.

    o[n, h] = output_scale[n, h] * sum_j softmax_j(cap(logit_scale[n, h] * scaling * q[n, h] . k_j)) v_j
    cap(x)  = softcap * tanh(x / softcap), or x without softcap
    j runs over the positions of cache slot[n] that are seen:  max(0, length[n] - window) <= j < length[n]

Layout: q [N, H, D], k_cache and v_cache [S, HKV, C, D] with any strides but a contiguous last dimension,
output [N, H, D] contiguous. One program computes up to BLOCK_M query heads of one key/value head of one
entry, with a running maximum and sum over blocks of BLOCK_N keys in float32, so a group reads its keys once.
Positions that are not seen are never loaded, and no gathered cache, no repeated key/value head and nothing of
size N x H x C is ever materialised.

A key is read for the few heads of its group and little is done with it, so memory sets the pace. tl.dot pads a tile
of few heads, or of one, to what the tensor cores take: they have the time, while multiplying and summing by
tl.sum takes the ordinary cores several times the instructions. float32 has no tensor cores and is not padded.

The mask vectors only multiply, and the heads of a tile do not meet, so a head whose two factors are 1 gives
the very bits of an unmasked call. Flags per entry and head, replace[n, h], put other vectors in the place of
the head's own: a query q_alt [1 or N, D], keys k_alt [S, C, D], or its output before output_scale, out_alt
[1 or H, D]. The heads of a tile that take k_alt go to a second program (axis 1 of the grid), which runs the
same code with another address. A program without a head that needs keys reads none.

The oracle is shipsfast.ops.reference.decode_attention, the checks of the arguments are in attention_checks.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shipsfast.kernels.attention_blocks import (
    LOG2E,
    LOWEST,
    REPLACE_K,
    REPLACE_OUT,
    REPLACE_Q,
    capped,
    check_device,
    given_vectors,
    options,
    scales,
    with_block,
)
from shipsfast.kernels.attention_checks import (
    check_decode_arguments,
    check_decode_replacements,
    check_sink,
)
from shipsfast.kernels.launch_config import LaunchConfig, launch_config


# Cache and window sizes change while a model runs, so they must not choose between compiled versions.
@triton.jit(do_not_specialize=["S", "C", "window", "replaceable"])
def _decode_attention_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [S, HKV, C, D]
    v_ptr,  # [S, HKV, C, D]
    out_ptr,  # [N, H, D]
    logit_scale_ptr,  # [N, H]
    output_scale_ptr,  # [N, H]
    slot_ptr,  # [N]
    length_ptr,  # [N]
    replace_ptr,  # [N, H] int8; None, like all the replacement's arguments, without HAS_REPLACE
    q_alt_ptr,  # [1 or N, D]
    k_alt_ptr,  # [S, C, D]
    out_alt_ptr,  # [1 or H, D]
    sink_ptr,  # [H], None without HAS_SINK
    stride_qn,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_kc,
    stride_vs,
    stride_vh,
    stride_vc,
    stride_ln,
    stride_lh,
    stride_on,
    stride_oh,
    stride_rn,
    stride_rh,
    stride_q_alt_n,
    stride_k_alt_s,
    stride_k_alt_c,
    stride_out_alt_h,
    HKV,
    S,
    C,
    window,
    pre_scale,  # scaling * log2(e), or scaling / softcap
    post_scale,  # softcap * log2(e)
    replaceable,  # the flags whose vectors were given
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_REPLACE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # The tiles of one key/value head run next to each other, then the heads of one entry, then entries: those
    # that read one slot in a row share it in L2.
    TILES: tl.constexpr = (GROUPS + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    kv_head = (pid // TILES % HKV).to(tl.int64)
    entry = (pid // TILES // HKV).to(tl.int64)

    offs_m = pid % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < GROUPS
    mask_d = offs_d < D
    h = kv_head * GROUPS + offs_m  # [BLOCK_M]

    factor = tl.load(logit_scale_ptr + entry * stride_ln + h * stride_lh, mask=mask_m, other=0.0) * pre_scale
    output_scale = tl.load(output_scale_ptr + entry * stride_on + h * stride_oh, mask=mask_m, other=0.0)
    reads_keys = output_scale != 0.0  # [BLOCK_M]
    q = tl.load(
        q_ptr + entry * stride_qn + h[:, None] * stride_qh + offs_d[None, :],
        mask=mask_m[:, None] & mask_d[None, :],
        other=0.0,
    ).to(DOT_DTYPE)  # [BLOCK_M, BLOCK_D]

    slot = tl.load(slot_ptr + entry).to(tl.int64)
    length = tl.load(length_ptr + entry)
    # Nothing is read where nothing is: NaN is seen, another slot's keys would pass for the entry's.
    valid = (slot >= 0) & (slot < S) & (length >= 1) & (length <= C)
    output_scale = tl.where(valid, output_scale, float("nan"))

    k_row = k_ptr + slot * stride_ks + kv_head * stride_kh
    v_row = v_ptr + slot * stride_vs + kv_head * stride_vh
    step_k = stride_kc
    if HAS_REPLACE:
        flags = tl.load(replace_ptr + entry * stride_rn + h * stride_rh, mask=mask_m, other=0).to(tl.int32)
        # Asked for and not given: as above.
        output_scale = tl.where((flags & ~replaceable) != 0, float("nan"), output_scale)
        q_alt = tl.load(q_alt_ptr + entry * stride_q_alt_n + offs_d, mask=mask_d, other=0.0)  # [BLOCK_D]
        q = tl.where(((flags & REPLACE_Q) != 0)[:, None], q_alt.to(DOT_DTYPE)[None, :], q)
        other_k = tl.program_id(1) == 1
        k_row = tl.where(other_k, k_alt_ptr + slot * stride_k_alt_s, k_row)
        step_k = tl.where(other_k, stride_k_alt_c, stride_kc)
        # Of the two programs of a tile each computes and stores the heads that take its keys.
        mask_m = mask_m & (((flags & replaceable & REPLACE_K) != 0) == other_k)
        other_out = (flags & REPLACE_OUT) != 0
        reads_keys = reads_keys & mask_m & (other_out == 0)

    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    some_read = tl.max(reads_keys.to(tl.int32), 0) != 0
    stop = tl.where(valid & some_read, length, first)

    if HAS_SINK:  # a logit that is seen before the first key, and whose weight goes nowhere
        row_max = tl.maximum(tl.load(sink_ptr + h, mask=mask_m, other=0.0) * LOG2E, LOWEST)
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for start in range(first, stop, BLOCK_N):
        n = start + offs_n  # [BLOCK_N]
        mask_n = n < length
        mask_kv = mask_n[:, None] & mask_d[None, :]
        k = tl.load(k_row + n[:, None].to(tl.int64) * step_k + offs_d[None, :], mask=mask_kv, other=0.0)
        s = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        s = s * factor[:, None]
        if HAS_SOFTCAP:
            s = capped(s, post_scale)
        s = tl.where(mask_n[None, :], s, float("-inf"))

        v_ptrs = v_row + n[:, None].to(tl.int64) * stride_vc + offs_d[None, :]
        row_max, row_sum, acc = with_block(
            s, v_ptrs, mask_kv, row_max, row_sum, acc, DOT_DTYPE, INPUT_PRECISION
        )

    # Only a program that reads no keys has an empty sum.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    if HAS_REPLACE:
        out_alt = tl.load(
            out_alt_ptr + h[:, None] * stride_out_alt_h + offs_d[None, :],
            mask=(mask_m & other_out)[:, None] & mask_d[None, :],
            other=0.0,
        )
        out = tl.where(other_out[:, None], out_alt.to(tl.float32), out)
    # A head that is off may share its tile with heads that read keys, and those need not be finite for it.
    out = tl.where((output_scale == 0.0)[:, None], 0.0, out * output_scale[:, None])
    tl.store(
        out_ptr + (entry * HKV * GROUPS + h[:, None]) * D + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )


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
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Masked attention of new tokens over a cache on the GPU: the function of shipsfast.ops.reference.decode_attention.

    Args:
        q: [N, H, D], one query for each entry; k_cache, v_cache: [S, HKV, C, D], HKV dividing H; bfloat16, float16
            or float32, any strides with a contiguous last dimension.
        slot: int32 [N], whose cache an entry reads; length: int32 [N], how many of its positions are there, 1..C,
            the newest key at length - 1. What comes after is not read. Whether both are in range is not checked
            on a GPU, which would wait for it: there an entry out of range gives NaN.
        logit_scale, output_scale: float32 [N, H], 1 leaves the head as it is. A head whose output_scale is 0
            gives exactly 0.
        scaling: factor on q . k, usually D ** -0.5.
        softcap: soft limit of the scaled logits; window: sliding window in tokens, counting the new one.
        sink: float32 [H], one more logit of a head in the denominator; None for none.
        replace: int8 [N, H], the sum of REPLACE_Q, REPLACE_K and REPLACE_OUT (shipsfast/replacements.py) for each
            entry and head, 0 for a head that keeps its own; None for no replacement, and the next three are not
            looked at. Which flags are set is not checked on a GPU either: there a head whose vectors are
            missing gives NaN.
        q_alt: [N or 1, D]; k_alt: [S, C, D]; out_alt: [H or 1, D]; in q's dtype, any strides with a contiguous
            last dimension. None where no head is flagged for it.
        config: launch parameters, by default those of the device's file; block_m is the most query heads that
            one program takes.
    Returns:
        [N, H, D] in q's dtype, contiguous.
    Raises:
        TypeError: a dtype the kernel does not take. ValueError: shapes or strides that do not fit.
        RuntimeError: the tensors are not on a GPU.
    """
    check_decode_arguments(q, k_cache, v_cache, slot, length, logit_scale, output_scale, softcap, window)
    check_sink(sink, q, logit_scale)
    check_device(q)
    if replace is not None:
        check_decode_replacements(replace, q_alt, k_alt, out_alt, q, k_cache, logit_scale)
    entries, heads, head_dim = q.shape
    slots, kv_heads, positions = k_cache.shape[:3]
    groups = heads // kv_heads
    if config is None:
        config = launch_config("decode_attention", q.dtype, head_dim, q.device)
    block_m = min(config.block_m, triton.next_power_of_2(groups))

    out = torch.empty((entries, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    pointers, replaceable = given_vectors(replace, q_alt, k_alt, out_alt, q)
    pointer_strides = [None] * 6
    if replace is not None:
        one_for_all = lambda x: 0 if x is None or len(x) == 1 else x.stride(0)
        k_alt_strides = (0, 0) if k_alt is None else k_alt.stride()[:2]
        pointer_strides = [*replace.stride(), one_for_all(q_alt), *k_alt_strides, one_for_all(out_alt)]
    with torch.cuda.device_of(q):
        _decode_attention_kernel[
            (entries * kv_heads * triton.cdiv(groups, block_m), 1 if replace is None or k_alt is None else 2)
        ](
            q,
            k_cache,
            v_cache,
            out,
            logit_scale,
            output_scale,
            slot,
            length,
            *pointers,
            sink,
            *q.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *logit_scale.stride(),
            *output_scale.stride(),
            *pointer_strides,
            kv_heads,
            slots,
            positions,
            min(window or 0, positions),
            *scales(scaling, softcap),
            replaceable,
            GROUPS=groups,
            BLOCK_M=block_m,
            **options(q, config, softcap, window, replace, sink),
        )
    return out
