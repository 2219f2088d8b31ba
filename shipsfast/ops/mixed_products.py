"""Matrix products of half-precision factors that are added to float32: the residual stream of `fused_fp32_residual`.

On a GPU the product itself adds up, and rounds, in float32. On a CPU, where only the interpreter's tests come here, the
factors are copied to float32 first: the same sums.
"""

from __future__ import annotations

import torch


def add_product_(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    """x [N, M] += y [N, K] @ weight [K, M], in place; x in the factors' dtype, or in float32 where they are half."""
    if x.dtype == y.dtype:
        x.addmm_(y, weight)
    elif x.is_cuda:
        torch.addmm(x, y, weight, out_dtype=x.dtype, out=x)
    else:
        x.addmm_(y.to(x.dtype), weight.to(x.dtype))


def sums_of_products(start: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [B, N, M] = start + y [B, N, K] @ weight [B, K, M]; dtypes as in `add_product_`, start's is out's."""
    if out.dtype == y.dtype:
        torch.baddbmm(start, y, weight, out=out)
    elif out.is_cuda:
        torch.baddbmm(start, y, weight, out_dtype=out.dtype, out=out)
    else:
        torch.baddbmm(start, y.to(out.dtype), weight.to(out.dtype), out=out)
