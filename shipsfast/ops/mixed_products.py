"""Matrix products of half-precision factors that are added to float32: the residual stream of `fused_fp32_residual`.

On a GPU the product itself adds up, and rounds, in float32. On a CPU, where only the interpreter's tests come here, the
factors are copied to float32 first: the same sums.

PyTorch takes float32 terms beside half-precision factors on a GPU since November 2025 (its pull request 167931). Before, it
refused them, or added to what happened to lie in `out`. So it is tried, once for each dtype and device.
"""

from __future__ import annotations

import functools

import torch

from ..memory import is_out_of_memory


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


@functools.cache
def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this PyTorch cannot add products of this half precision to float32 on this device, None if it can, and where
    there is nothing to try: on a CPU, and for a GPU that is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return problem_of_products(dtype, device)


def problem_of_products(dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with a few small products, None if they are right to the last bit.

    Factors are small whole numbers, and so are terms, but for a fraction. No order of adding up rounds in float32, which
    holds 24 binary digits; sums and most terms here have more than the 11 or 8 of half precision.
    """
    B, N, K, M = 3, 8, 64, 16
    whole = torch.arange(B * K * max(N, M), dtype=torch.float32, device=device)
    y = (whole[: B * N * K] * 5 % 61 - 20).view(B, N, K).to(dtype)  # -20 to 40
    weight = (whole[: B * K * M] * 7 % 31 - 10).view(B, K, M).to(dtype)  # -10 to 20
    start = (whole[: N * M] + 1 / 64).view(1, N, M)
    right = start.double() + y.double() @ weight.double()  # [B, N, M]
    try:
        x = start[0].clone()
        add_product_(x, y[0], weight[0].t().contiguous().t())  # as a linear layer's weight lies
        out = torch.full((B, N, M), torch.nan, device=device)
        sums_of_products(start.expand(B, -1, -1), y, weight, out)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return f"torch {torch.__version__} does not add half-precision products to float32 here: {error}"
    if not (torch.equal(x.double(), right[0]) and torch.equal(out.double(), right)):
        return f"torch {torch.__version__} adds half-precision products to float32 wrongly here"
    return None
