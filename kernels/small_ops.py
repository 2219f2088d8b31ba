"""The element-wise work between a decoder layer's matrix products, one pass over memory each.

    rms_norm        out = x / sqrt(mean(x^2) + eps) * weight, per row
    add_rms_norm_   x += rms_norm(y), in place
    rope_           x = x * cos + rotate_half(x) * sin, in place, after an rms_norm of each head where a weight is given
    gated           out = act(gate) * up, gate and up side by side in a row

Rows may have any stride, so that queries and keys are turned where they lie in the product of q, k and v. All is computed
in float32 and rounded where the modules of transformers round, so that a result is theirs up to the order of sums:

    Llama, Mistral, Qwen   the normalised row is rounded, then its product with the weight
    Gemma                  the weight is 1 + w, and only the end is rounded
    rotary embedding       both products are rounded, then their sum
    gated activation       the activation is rounded, then its product

Block sizes follow from the width alone: these kernels wait for memory, and nothing is to be tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_COLUMNS = 1 << 16  # of a row that one program holds
NORM_TILE = 2048  # numbers of a program that takes several short rows
ROPE_TILE = 2048  # numbers of either half of its heads
GATED_BLOCK, GATED_WARPS = 1024, 4
FP_FUSION = True  # the default changes after triton 3.9
GELU_FACTOR = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def rounded(x, like_ptr):
    """What x would be in the dtype of a pointer, in float32."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _weighted(x, scale, weight, like_ptr, PLUS_ONE: tl.constexpr):
    """x * scale * weight, rounded as the family's module rounds it."""
    if PLUS_ONE:
        return rounded(x * scale * (1.0 + weight), like_ptr)
    return rounded(rounded(x * scale, like_ptr) * weight, like_ptr)


@triton.jit
def activated(gate, like_ptr, GELU: tl.constexpr):
    """silu(gate), or gelu(gate) by tanh, rounded as the activation's module rounds it."""
    if GELU:  # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which does not cancel where u is negative
        steep = 2.0 * GELU_FACTOR * (gate + GELU_CUBE * gate * gate * gate)
    else:
        steep = gate
    return rounded(gate / (1.0 + tl.exp(-steep)), like_ptr)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    out_ptr,  # [N, D], to which is added with ADD
    stride_xn,
    stride_on,
    N,
    eps,
    D: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_n < N)[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)  # [ROWS, BLOCK_D]
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)  # [ROWS]
    out = _weighted(x, scale[:, None], weight[None, :], out_ptr, PLUS_ONE)
    to = out_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
    if ADD:
        out = tl.load(to, mask=mask, other=0.0).to(tl.float32) + out
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _rope_kernel(
    x_ptr,  # [B, T, H, D]
    cos_ptr,  # [T, D]
    sin_ptr,  # [T, D]
    weight_ptr,  # [D], None without HAS_NORM
    stride_xb,
    stride_xt,
    stride_xh,
    T,
    eps,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask_d = offs_d < HALF
    mask = (offs_h < H)[:, None] & mask_d[None, :]
    low_ptr = (
        x_ptr + b * stride_xb + t * stride_xt + offs_h[:, None].to(tl.int64) * stride_xh + offs_d[None, :]
    )
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_HALF]
    high = tl.load(low_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        low_weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_HALF]
        high_weight = tl.load(weight_ptr + HALF + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)  # [BLOCK_H]
        low = _weighted(low, scale[:, None], low_weight[None, :], x_ptr, False)
        high = _weighted(high, scale[:, None], high_weight[None, :], x_ptr, False)
    at = t * (2 * HALF) + offs_d
    low_cos = tl.load(cos_ptr + at, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_ptr + at, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_ptr + at + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_ptr + at + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    new_low = rounded(low * low_cos, x_ptr) - rounded(high * low_sin, x_ptr)
    new_high = rounded(high * high_cos, x_ptr) + rounded(low * high_sin, x_ptr)
    tl.store(low_ptr, new_low.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(low_ptr + HALF, new_high.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_kernel(
    gate_up_ptr,  # [N, 2 M]
    out_ptr,  # [N, M]
    stride_gn,
    stride_on,
    M: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    gate = tl.load(gate_up_ptr + n * stride_gn + offs_m, mask=mask_m, other=0.0).to(tl.float32)  # [BLOCK_M]
    up = tl.load(gate_up_ptr + n * stride_gn + M + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    out = activated(gate, out_ptr, GELU) * up
    tl.store(out_ptr + n * stride_on + offs_m, out.to(out_ptr.dtype.element_ty), mask=mask_m)


# With TRITON_INTERPRET=1 at import, triton.jit gives another class, which runs on the CPU.
INTERPRETED = not isinstance(_gated_kernel, triton.runtime.JITFunction)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm of rows.

    Args:
        x: [N, D], bfloat16, float16 or float32, rows of any stride, D at most 65,536.
        weight: [D]. plus_one: 1 is added to it, as in Gemma.
        out: [N, D], rows of any stride; may be x. Its dtype, that of the weight or float32, is rounded to. By default a
            new contiguous tensor in x's dtype.
    Returns:
        out.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit. RuntimeError: the tensors are not on a GPU.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _launch_norm("rms_norm", x, weight, eps, plus_one, out, add=False)
    return out


def add_rms_norm_(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False
) -> torch.Tensor:
    """x += rms_norm(y), in place; both [N, D], x in y's dtype or in float32, otherwise as in `rms_norm`. Returns x."""
    _launch_norm("add_rms_norm_", y, weight, eps, plus_one, x, add=True)
    return x


def rope_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotary embedding (rotate-half convention) in place, of heads with their own RMSNorm before it where there is one.

    Args:
        x: [B, T, H, D], bfloat16, float16 or float32, D even, any strides with a contiguous last dimension.
        cos, sin: [T, D], contiguous.
        weight: [D], contiguous: every head is normalised and multiplied by it first, as in Qwen 3. eps: of that norm.
    Returns:
        x.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit. RuntimeError: the tensors are not on a GPU.
    """
    require(
        x.dim() == 4 and x.shape[3] % 2 == 0 and x.stride(3) == 1,
        "rope_",
        "x [B, T, H, D], D even and contiguous",
    )
    rows, tokens, heads, size = x.shape
    for each in (cos, sin):
        require(
            each.shape == (tokens, size) and each.is_contiguous(), "rope_", "cos and sin [T, D], contiguous"
        )
    require(weight is None or weight.shape == (size,) and weight.is_contiguous(), "rope_", "weight [D]")
    check_kind("rope_", x, cos, sin, *(() if weight is None else (weight,)))
    if x.numel() == 0:
        return x
    block_heads, block_half, warps = rope_launch(heads, size)
    with torch.cuda.device_of(x):
        _rope_kernel[(rows * tokens, triton.cdiv(heads, block_heads))](
            x, cos, sin, weight, x.stride(0), x.stride(1), x.stride(2), tokens, eps,
            H=heads, HALF=size // 2, HAS_NORM=weight is not None, BLOCK_H=block_heads, BLOCK_HALF=block_half,
            num_warps=warps, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return x


def gated(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate_up: [N, 2 M], the gates before the ups; bfloat16, float16 or float32, rows of any stride.
        activation: "silu" or "gelu" (by tanh).
        out: [N, M] in gate_up's dtype, rows of any stride; by default a new contiguous tensor.
    Returns:
        out.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit, or another activation. RuntimeError: not on a GPU.
    """
    require(activation in ("silu", "gelu"), "gated", "activation 'silu' or 'gelu'")
    require(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1,
        "gated",
        "gate_up [N, 2 M]",
    )
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    require(
        out.shape == (rows, width) and out.stride(1) == 1 and out.dtype == gate_up.dtype,
        "gated",
        "out [N, M] in one dtype",
    )
    check_kind("gated", gate_up, out)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(gate_up):
        _gated_kernel[(rows, triton.cdiv(width, GATED_BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), M=width, GELU=activation == "gelu", BLOCK_M=GATED_BLOCK,
            num_warps=GATED_WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out


def norm_launch(width: int) -> tuple[int, int, int]:
    """(rows of a program, padded columns, warps) for rows of `width` numbers."""
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8 if block <= 4096 else 16 if block <= 16384 else 32
    return max(1, NORM_TILE // block), block, warps


def rope_launch(heads: int, size: int) -> tuple[int, int, int]:
    """(heads of a program, padded half of a head, warps) for heads of `size` numbers."""
    half = triton.next_power_of_2(size // 2)
    block = min(triton.next_power_of_2(heads), max(1, ROPE_TILE // half))
    # 8 numbers of each half to a thread: 16 bytes.
    return block, half, min(8, max(1, block * half // (8 * 32)))


def _launch_norm(name: str, x, weight, eps: float, plus_one: bool, out, add: bool) -> None:
    require(x.dim() == 2 and x.stride(1) == 1 and 0 < x.shape[1] <= MOST_COLUMNS, name, "rows [N, D]")
    require(out.shape == x.shape and out.stride(1) == 1, name, "both of one shape")
    require(weight.shape == x.shape[1:] and weight.is_contiguous(), name, "weight [D]")
    one = {x.dtype, out.dtype} - {torch.float32}
    require(len(one) < 2, name, "both of one dtype, or one in float32")
    check_kind(name, x, out, weight)
    if x.numel() == 0:
        return
    rows, block, warps = norm_launch(x.shape[1])
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(len(x), rows),)](
            x, weight, out, x.stride(0), out.stride(0), len(x), eps,
            D=x.shape[1], PLUS_ONE=plus_one, ADD=add, ROWS=rows, BLOCK_D=block, num_warps=warps,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip


def require(condition: bool, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}")


def check_kind(name: str, *tensors: torch.Tensor) -> None:
    device = tensors[0].device
    require(all(x.dtype in DTYPES for x in tensors), name, "bfloat16, float16 or float32")
    require(all(x.device == device for x in tensors), name, "all tensors on one device")
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"{name}: the Triton kernel needs a CUDA device and its input is on {device}: use layers='model', "
            "or set TRITON_INTERPRET=1 before the import to run it slowly on the CPU"
        )
