"""Triton attention over a prefix tree, with a mask vector per batch row and head.

    o[b, i, h] = output_scale[b, h] * sum_j softmax_j(cap(logit_scale[b, h] * scaling * q_i . k_j)) v_j
    cap(x)     = softcap * tanh(x / softcap), or x without softcap
    j runs over the keys that query i sees:  j <= i < subtree_end[j]  and  position[i] - position[j] < window

Layout: q [B, H, TQ, D], k and v [B, HKV, T, D] with any strides but a contiguous last dimension (rows that
share q, k and v come with a batch dimension of 1), output [B, TQ, H, D] contiguous. One program computes
BLOCK_M queries of one head of one row, with a running maximum and sum over key blocks in float32. Which
blocks it reads comes from a block table (block_table.py): first those that every query of the block sees,
without a mask, then those that need one; for trees that have hardly any of the first, all are masked and the loop
without a mask is not compiled (`unmasked_loop`). Blocks that nobody sees are never loaded, and nothing of size T x T,
no repeated key/value head and no copy of the inputs is ever materialised.

The mask vectors only multiply, so a head whose two factors are 1 gives the very bits of an unmasked call.
Flags per batch row and head, replace[b, h], put other vectors in the place of the head's own: queries
q_alt [1 or B, TQ, D], keys k_alt [1 or B, T, D], or its output before output_scale, out_alt
[1 or H, 1 or TQ, D]. A flag chooses where a program reads, so a replaced output reads no keys, and a head
without flags does what it does in a call without replacements.

The oracle is shipsfast.ops.reference.tree_attention, the checks of the arguments are in attention_checks.py.
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
from shipsfast.kernels.attention_checks import check_arguments, check_replacements, check_sink
from shipsfast.kernels.block_table import BlockTable
from shipsfast.kernels.block_table import block_table as build_block_table
from shipsfast.kernels.launch_config import LaunchConfig, launch_config
from shipsfast.kernels.tree_kind import kind_of_tree


# The sizes change from pack to pack, so they must not choose between compiled versions.
@triton.jit(do_not_specialize=["TQ", "T", "num_query_blocks", "window", "replaceable"])
def _tree_attention_kernel(
    q_ptr,  # [B, H, TQ, D]
    k_ptr,  # [B, HKV, T, D]
    v_ptr,  # [B, HKV, T, D]
    out_ptr,  # [B, TQ, H, D]
    logit_scale_ptr,  # [B, H]
    output_scale_ptr,  # [B, H]
    position_ptr,  # [T]
    subtree_end_ptr,  # [T]
    query_index_ptr,  # [TQ], None for all T tokens
    row_ptr_ptr,  # [NQ + 1]
    full_end_ptr,  # [NQ]
    col_ptr,  # [N]
    replace_ptr,  # [B, H] int8; None, like all the replacement's arguments, without HAS_REPLACE
    q_alt_ptr,  # [1 or B, TQ, D]
    k_alt_ptr,  # [1 or B, T, D]
    out_alt_ptr,  # [1 or H, 1 or TQ, D]
    sink_ptr,  # [H], None without HAS_SINK
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_lb,
    stride_lh,
    stride_ob,
    stride_oh,
    stride_rb,
    stride_rh,
    stride_q_alt_b,
    stride_q_alt_t,
    stride_k_alt_b,
    stride_k_alt_t,
    stride_out_alt_h,
    stride_out_alt_t,
    H,
    TQ,
    T,
    num_query_blocks,
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
    HAS_QUERY_INDEX: tl.constexpr,
    HAS_REPLACE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    UNMASKED_LOOP: tl.constexpr,  # for key blocks that a query block sees all of
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    # Query blocks of one head run next to each other, then the heads of one key/value head: they share
    # keys in L2.
    pid = tl.program_id(0)
    block_m = pid % num_query_blocks
    b = (pid // num_query_blocks // H).to(tl.int64)
    h = (pid // num_query_blocks % H).to(tl.int64)

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < TQ
    mask_d = offs_d < D

    if HAS_QUERY_INDEX:
        query = tl.load(query_index_ptr + offs_m, mask=mask_m, other=0)  # [BLOCK_M]
    else:
        query = offs_m
    if HAS_WINDOW:
        query_position = tl.load(position_ptr + query, mask=mask_m, other=0)  # [BLOCK_M]

    factor = tl.load(logit_scale_ptr + b * stride_lb + h * stride_lh) * pre_scale
    output_scale = tl.load(output_scale_ptr + b * stride_ob + h * stride_oh)

    q_row = q_ptr + b * stride_qb + h * stride_qh
    k_row = k_ptr + b * stride_kb + h // GROUPS * stride_kh
    v_row = v_ptr + b * stride_vb + h // GROUPS * stride_vh
    step_q, step_k = stride_qt, stride_kt
    reads_keys = output_scale != 0.0
    if HAS_REPLACE:
        flags = tl.load(replace_ptr + b * stride_rb + h * stride_rh).to(tl.int32)
        # Asked for and not given: NaN is seen, the head's own vectors would pass for the ablation.
        output_scale = tl.where((flags & ~replaceable) != 0, float("nan"), output_scale)
        other_q = (flags & REPLACE_Q) != 0
        other_k = (flags & REPLACE_K) != 0
        q_row = tl.where(other_q, q_alt_ptr + b * stride_q_alt_b, q_row)
        k_row = tl.where(other_k, k_alt_ptr + b * stride_k_alt_b, k_row)
        step_q = tl.where(other_q, stride_q_alt_t, stride_qt)
        step_k = tl.where(other_k, stride_k_alt_t, stride_kt)
        other_out = reads_keys & ((flags & REPLACE_OUT) != 0)
        reads_keys = reads_keys & ((flags & REPLACE_OUT) == 0)
    q = tl.load(
        q_row + offs_m[:, None].to(tl.int64) * step_q + offs_d[None, :],
        mask=mask_m[:, None] & mask_d[None, :],
        other=0.0,
    ).to(DOT_DTYPE)  # [BLOCK_M, BLOCK_D]

    if HAS_SINK:  # a logit that every query sees before the first key, and whose weight goes nowhere
        sink = tl.maximum(tl.load(sink_ptr + h) * LOG2E, LOWEST)
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    row_start = tl.load(row_ptr_ptr + block_m)
    row_stop = tl.load(row_ptr_ptr + block_m + 1)
    # A head that is switched off, or whose output is replaced, reads no keys at all.
    row_stop = tl.where(reads_keys, row_stop, row_start)
    if UNMASKED_LOOP:
        full_end = tl.load(full_end_ptr + block_m)
        full_end = tl.where(reads_keys, full_end, row_start)
    else:
        full_end = row_start

    for MASKED in tl.static_range(0 if UNMASKED_LOOP else 1, 2):
        if MASKED:
            start, stop = full_end, row_stop
        else:
            start, stop = row_start, full_end
        for entry in range(start, stop):
            n = tl.load(col_ptr + entry) * BLOCK_N + offs_n  # [BLOCK_N]
            # D fits its block in most models: then a fully visible block loads without any mask.
            if MASKED:
                mask_kv = (n < T)[:, None] & mask_d[None, :]
            else:
                mask_kv = mask_d[None, :]
            k = tl.load(k_row + n[:, None].to(tl.int64) * step_k + offs_d[None, :], mask=mask_kv, other=0.0)
            s = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
            s = s * factor
            if HAS_SOFTCAP:
                s = capped(s, post_scale)
            if MASKED:
                # Keys past T get subtree_end = 0, so nobody sees them.
                subtree_end = tl.load(subtree_end_ptr + n, mask=n < T, other=0)  # [BLOCK_N]
                seen = (n[None, :] <= query[:, None]) & (query[:, None] < subtree_end[None, :])
                if HAS_WINDOW:
                    key_position = tl.load(position_ptr + n, mask=n < T, other=0)  # [BLOCK_N]
                    seen = seen & (query_position[:, None] - key_position[None, :] < window)
                s = tl.where(seen, s, float("-inf"))

            v_ptrs = v_row + n[:, None].to(tl.int64) * stride_vt + offs_d[None, :]
            row_max, row_sum, acc = with_block(
                s, v_ptrs, mask_kv, row_max, row_sum, acc, DOT_DTYPE, INPUT_PRECISION
            )

    # Only padding queries and heads that read no keys have an empty sum.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    if HAS_REPLACE:
        out_row = out_alt_ptr + h * stride_out_alt_h
        if other_out:
            out = tl.load(
                out_row + offs_m[:, None].to(tl.int64) * stride_out_alt_t + offs_d[None, :],
                mask=mask_m[:, None] & mask_d[None, :],
                other=0.0,
            ).to(tl.float32)
    out = out * output_scale
    tl.store(
        out_ptr + ((b * TQ + offs_m[:, None]) * H + h) * D + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )


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
    sink: torch.Tensor | None = None,
    query_index: torch.Tensor | None = None,
    replace: torch.Tensor | None = None,
    q_alt: torch.Tensor | None = None,
    k_alt: torch.Tensor | None = None,
    out_alt: torch.Tensor | None = None,
    block_table: BlockTable | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Masked attention over a prefix tree on the GPU: the function of shipsfast.ops.reference.tree_attention.

    Args:
        q: [B, H, TQ, D]; k, v: [B, HKV, T, D], HKV dividing H; bfloat16, float16 or float32, any strides with
            a contiguous last dimension. A batch dimension of 1 broadcasts over the rows of the mask vectors.
        logit_scale, output_scale: float32 [B, H], 1 leaves the head as it is. A head whose output_scale is 0
            gives exactly 0.
        position, subtree_end: int32 [T], see shipsfast/ops/prefix_tree.py.
        scaling: factor on q . k, usually D ** -0.5.
        softcap: soft limit of the scaled logits; window: sliding window in tokens, counting the token itself.
        sink: float32 [H], one more logit of a head in the denominator; None for none.
        query_index: int32 [TQ], packed indices of the queries in ascending order, None if TQ = T.
        replace: int8 [B, H], the sum of REPLACE_Q, REPLACE_K and REPLACE_OUT (shipsfast/replacements.py) for each
            row and head, 0 for a head that keeps its own; None for no replacement, and the next three are not
            looked at. Which flags are set is not checked on a GPU, which would wait for it: there a head
            whose vectors are missing gives NaN.
        q_alt: [B or 1, TQ, D]; k_alt: [B or 1, T, D]; out_alt: [H or 1, TQ or 1, D]; in q's dtype, any strides
            with a contiguous last dimension. None where no head is flagged for it.
        block_table: from block_table(...) with the same tree, queries and window and the block sizes of
            `config`. Without one it is built here, which waits for the GPU: build it once for a tree.
        config: launch parameters, by default those of the device's file for this kind of tree, which waits for
            the GPU: give both for a tree.
    Returns:
        [B, TQ, H, D] in q's dtype, contiguous.
    Raises:
        TypeError: a dtype the kernel does not take. ValueError: shapes, strides or a table that do not fit.
        RuntimeError: the tensors are not on a GPU.
    """
    check_arguments(q, k, v, logit_scale, output_scale, position, subtree_end, query_index, softcap, window)
    check_sink(sink, q, logit_scale)
    check_device(q)
    if replace is not None:
        check_replacements(replace, q_alt, k_alt, out_alt, q, k, logit_scale)
    rows, heads = logit_scale.shape
    kv_heads, num_keys = k.shape[1:3]
    num_queries, head_dim = q.shape[2:]
    if config is None:
        kind = kind_of_tree(position, subtree_end, window)
        config = launch_config("tree_attention", q.dtype, head_dim, q.device, kind)
    if block_table is None:
        block_table = build_block_table(
            position,
            subtree_end,
            block_m=config.block_m,
            block_n=config.block_n,
            query_index=query_index,
            window=window,
            device=q.device,
        )
    wanted = (config.block_m, config.block_n, num_queries, num_keys, window)
    if block_table.made_for != wanted:
        raise ValueError(
            "block_table is for another call: (block_m, block_n, queries, keys, window) are "
            f"{block_table.made_for} in the table and {wanted} here; build it with these values"
        )

    out = torch.empty((rows, num_queries, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    # A dimension of 1 broadcasts, the last one is contiguous.
    strides = lambda x: [
        step if size > 1 else 0 for size, step in zip(x.shape[:-1], x.stride(), strict=False)
    ]
    pointers, replaceable = given_vectors(replace, q_alt, k_alt, out_alt, q)
    pointer_strides = [None] * 8
    if replace is not None:
        pointer_strides = list(replace.stride())
        for x in (q_alt, k_alt, out_alt):
            pointer_strides += [0, 0] if x is None else strides(x)
    with torch.cuda.device_of(q):
        _tree_attention_kernel[(block_table.num_query_blocks * rows * heads,)](
            q,
            k,
            v,
            out,
            logit_scale,
            output_scale,
            position,
            subtree_end,
            query_index,
            block_table.row_ptr,
            block_table.full_end,
            block_table.col,
            *pointers,
            sink,
            *strides(q),
            *strides(k),
            *strides(v),
            *logit_scale.stride(),
            *output_scale.stride(),
            *pointer_strides,
            heads,
            num_queries,
            num_keys,
            block_table.num_query_blocks,
            window or 0,
            *scales(scaling, softcap),
            replaceable,
            GROUPS=heads // kv_heads,
            BLOCK_M=config.block_m,
            HAS_QUERY_INDEX=query_index is not None,
            UNMASKED_LOOP=config.unmasked_loop,
            **options(q, config, softcap, window, replace, sink),
        )
    return out
