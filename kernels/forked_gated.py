"""Gate and up of rows that fork, and their activation, with nothing of their width in memory but what comes out.

    z = scale[n, t] * (factor[n, t] * (change[n, t] @ products[n]) + base[t] + drift[n, t] * other[t]) + bias

and out = act(gate) * up, with gate and up side by side in z. What it is of a model is said in
shipsfast/engine/forked_rows.py. One program makes BLOCK_T tokens of one row and BLOCK_M columns of `out`, from as many of
gate and of up. Programs of all rows at one place follow each other, as they share the tile of `base`, which then comes
from L2; then those of all tokens, as they share columns of `products`. Sums are in float32, and rounded where a product
and then the gated activation would round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from shipsfast.kernels.small_ops import FP_FUSION, INTERPRETED, activated, check_kind, require, rounded


@triton.jit(do_not_specialize=["N", "T", "num_token_blocks"])
def _forked_gated_kernel(
    change_ptr,  # [N, T, R]
    products_ptr,  # [N, R, 2 M]
    factor_ptr,  # [N, T] float32
    base_ptr,  # [T, 2 M]
    scale_ptr,  # [N, T] float32
    drift_ptr,  # [N, T] float32, None without HAS_OTHER
    other_ptr,  # [T, 2 M], None without HAS_OTHER
    bias_ptr,  # [2 M], None without HAS_BIAS
    out_ptr,  # [N * T, M]
    stride_on,
    N,
    T,
    num_token_blocks,
    R: tl.constexpr,
    M: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid % N).to(tl.int64)
    offs_t = (pid // N % num_token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_m = (pid // N // num_token_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_t, mask_m = offs_t < T, offs_m < M
    mask = mask_t[:, None] & mask_m[None, :]
    row = n * T + offs_t  # [BLOCK_T]

    gate = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + offs_r
        change = tl.load(
            change_ptr + row[:, None] * R + r[None, :], mask=mask_t[:, None] & (r < R)[None, :], other=0.0
        ).to(DOT_DTYPE)  # [BLOCK_T, BLOCK_R]
        at = products_ptr + (n * R + r)[:, None] * (2 * M) + offs_m[None, :]
        mask_r = (r < R)[:, None] & mask_m[None, :]
        of_gate = tl.load(at, mask=mask_r, other=0.0).to(DOT_DTYPE)  # [BLOCK_R, BLOCK_M]
        of_up = tl.load(at + M, mask=mask_r, other=0.0).to(DOT_DTYPE)
        gate = tl.dot(change, of_gate, gate, input_precision="ieee")
        up = tl.dot(change, of_up, up, input_precision="ieee")

    at = offs_t[:, None].to(tl.int64) * (2 * M) + offs_m[None, :]
    factor = tl.load(factor_ptr + row, mask=mask_t, other=0.0)[:, None]
    gate = gate * factor + tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = up * factor + tl.load(base_ptr + at + M, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        drift = tl.load(drift_ptr + row, mask=mask_t, other=0.0)[:, None]
        gate += drift * tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up += drift * tl.load(other_ptr + at + M, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=mask_t, other=0.0)[:, None]
    gate, up = gate * scale, up * scale
    if HAS_BIAS:
        gate += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + M + offs_m, mask=mask_m, other=0.0).to(tl.float32)[None, :]
    out = activated(rounded(gate, out_ptr), out_ptr, GELU) * rounded(up, out_ptr)
    tl.store(
        out_ptr + row[:, None] * stride_on + offs_m[None, :], out.to(out_ptr.dtype.element_ty), mask=mask
    )


def forked_gated(
    change: torch.Tensor,
    products: torch.Tensor,
    factor: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    drift: torch.Tensor | None,
    other: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> torch.Tensor:
    """act(gate) * up of scale (factor (change @ products) + base + drift other) + bias.

    Args:
        change: [N, T, R]; products: [N, R, 2 M], gates before ups; base: [T, 2 M]; all contiguous, in bfloat16, float16 or
            float32.
        factor, scale: float32 [N, T]. drift: float32 [N, T] and other: [T, 2 M], both or neither. bias: [2 M] or None.
        activation: "silu" or "gelu" (by tanh).
        out: [N * T, M], rows of any stride.
    Returns:
        out.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit, or another activation. RuntimeError: not on a GPU.
    """
    name = "forked_gated"
    require(activation in ("silu", "gelu"), name, "activation 'silu' or 'gelu'")
    require(
        change.dim() == 3 and base.dim() == 2 and base.shape[1] % 2 == 0,
        name,
        "change [N, T, R], base [T, 2 M]",
    )
    rows, tokens, rank = change.shape
    width = base.shape[1] // 2
    require(products.shape == (rows, rank, 2 * width), name, "products [N, R, 2 M]")
    require(
        len(base) == tokens and out.shape == (rows * tokens, width), name, "base [T, 2 M], out [N * T, M]"
    )
    require(out.stride(1) == 1, name, "contiguous rows of out")
    require((drift is None) == (other is None), name, "drift and other together")
    wide = [x for x in (factor, scale, drift) if x is not None]
    for x in wide:
        require(
            x.shape == (rows, tokens) and x.dtype == torch.float32,
            name,
            "factor, scale and drift float32 [N, T]",
        )
    require(other is None or other.shape == base.shape, name, "other [T, 2 M]")
    require(bias is None or bias.shape == (2 * width,), name, "bias [2 M]")
    own = [x for x in (change, products, base, other, bias) if x is not None]
    require(all(x.is_contiguous() for x in (*own, *wide)), name, "contiguous inputs")
    require(len({x.dtype for x in (*own, out)}) == 1, name, "one dtype")
    check_kind(name, *own, *wide, out)
    if out.numel() == 0:
        return out
    blocks, warps, stages = forked_launch(change.dtype, tokens)
    factors = torch.float32 if INTERPRETED else change.dtype  # the interpreter's bfloat16 products are wrong
    token_blocks = triton.cdiv(tokens, blocks["BLOCK_T"])
    with torch.cuda.device_of(change):
        _forked_gated_kernel[(rows * token_blocks * triton.cdiv(width, blocks["BLOCK_M"]),)](
            change, products, factor, base, scale, drift, other, bias, out, out.stride(0), rows, tokens, token_blocks,
            R=rank, M=width, HAS_OTHER=other is not None, HAS_BIAS=bias is not None, GELU=activation == "gelu",
            DOT_DTYPE=getattr(tl, str(factors).removeprefix("torch.")), **blocks, num_warps=warps, num_stages=stages,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


def forked_launch(dtype: torch.dtype, tokens: int) -> tuple[dict[str, int], int, int]:
    """(sizes of a program's tile, warps, stages)."""
    short = tokens <= 64  # the last layer's ends
    if dtype == torch.float32:
        size = 32 if short else 64
        return dict(BLOCK_T=size, BLOCK_M=size, BLOCK_R=32), 4 if short else 8, 2
    return dict(BLOCK_T=64 if short else 128, BLOCK_M=64, BLOCK_R=64), 4 if short else 8, 2
