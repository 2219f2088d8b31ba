"""The element-wise operations between a decoder layer's matrix products, by Triton where attention is Triton's, else
by C++ (csrc/fused_cpu.cpp, on a CPU).

Both are one pass over memory each, and give what the model's own modules give up to the order of sums. Norms of
float64 models go through their module: it rounds to float32 on the way, and only its own order repeats that exactly.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SmallOps(Protocol):
    """norm: an RMSNorm module of a model. Rows are [N, D], contiguous."""

    def rms_norm(self, x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        """norm(x), [N, D], in the dtype of matrix products; x may be in float32."""

    def add_rms_norm_(self, x: torch.Tensor, y: torch.Tensor, norm: torch.nn.Module) -> None:
        """x += norm(y), in place; x may be in float32."""

    def rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.nn.Module | None
    ) -> torch.Tensor:
        """x [B, T, H, D], a slice of wider rows, with rotary embedding; cos, sin [T, D]; norm: of each head, before it.

        May overwrite x.
        """

    def values(self, v: torch.Tensor) -> torch.Tensor:
        """v [B, T, HKV, D], a slice of wider rows, as attention likes it best."""

    def gated(self, gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """act(gate) * up of gate_up [N, 2 M], to out [N, M]; activation "silu" or "gelu" (by tanh)."""

    def forked_gated(
        self,
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
    ) -> None:
        """The same of scale (factor (change @ products) + base + drift other) + bias, for n rows, to out [n * T, M].

        change [n, T, R]; products [n, R, 2 M]; base, other [T, 2 M]; factor, scale, drift [n, T] in float32, or float64 of
        float64; bias [2 M]. All are contiguous.
        """


def small_ops(backend: str, products: torch.dtype, attention: torch.dtype) -> SmallOps:
    """backend: of attention, already resolved; products: the dtype of matrix products; attention: of what enters attention."""
    return TritonOps() if backend == "triton" else CppOps(products, attention)


class CppOps:
    """Sums, norms and the residual stream are in float32, in float64 for a float64 model."""

    def __init__(self, products: torch.dtype, attention: torch.dtype) -> None:
        self._products, self._attention = products, attention
        self._wide = torch.promote_types(products, torch.float32)

    def _numbers(self, norm):
        weight, eps, offset = numbers(norm)
        return weight.to(self._wide), eps, offset

    def rms_norm(self, x, norm):
        if x.dtype == torch.float64:
            return norm(x)
        out = torch.empty(x.shape, dtype=self._products)
        torch.ops.shipsfast.rms_norm(x.to(self._wide), *self._numbers(norm), out)
        return out

    def add_rms_norm_(self, x, y, norm):
        if x.dtype == torch.float64:
            x += norm(y)
        else:
            torch.ops.shipsfast.add_rms_norm_(x, y, *self._numbers(norm))

    def rope(self, x, cos, sin, norm):
        weight, eps = torch.empty(0, dtype=self._wide), 0.0
        if norm is not None and x.dtype == torch.float64:
            x = norm(x)
        elif norm is not None:
            weight, eps, _ = self._numbers(norm)
        out = torch.empty(x.shape, dtype=x.dtype if x.dtype == self._attention else self._wide)
        torch.ops.shipsfast.rope(x, cos.to(self._wide), sin.to(self._wide), weight, eps, out)
        return out.to(self._attention)

    def values(self, v):
        return v.to(self._attention).contiguous()

    def gated(self, gate_up, activation, out=None):
        if out is None:
            out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        op = torch.ops.shipsfast.gelu_mul if activation == "gelu" else torch.ops.shipsfast.silu_mul
        op(gate_up, out)
        return out

    def forked_gated(self, change, products, factor, base, scale, drift, other, bias, activation, out):
        none, wide = base.new_empty(0), torch.empty_like(base)
        other = none if other is None else other
        bias = none if bias is None else bias.to(self._wide)
        for i, part in enumerate(out.split(len(base))):  # what is of their width stays in the cache
            torch.mm(change[i], products[i], out=wide)
            moved = none if drift is None else drift[i]
            torch.ops.shipsfast.forked_gated(
                wide, factor[i], base, scale[i], moved, other, bias, activation == "gelu", part
            )


class TritonOps:
    """Queries and keys are turned where they lie, and values stay there: the kernels of attention take any strides."""

    def __init__(self) -> None:
        from ..kernels import forked_gated, small_ops  # need triton

        self._kernels, self._forked_gated = small_ops, forked_gated.forked_gated

    def rms_norm(self, x, norm):
        weight, eps, offset = numbers(norm)
        out = x.new_empty(x.shape, dtype=weight.dtype)
        return self._kernels.rms_norm(x, weight, eps, offset == 1, out=out)

    def add_rms_norm_(self, x, y, norm):
        weight, eps, offset = numbers(norm)
        self._kernels.add_rms_norm_(x, y, weight, eps, offset == 1)

    def rope(self, x, cos, sin, norm):
        weight, eps = (None, 0.0) if norm is None else numbers(norm)[:2]
        return self._kernels.rope_(x, cos, sin, weight, eps)

    def values(self, v):
        return v

    def gated(self, gate_up, activation, out=None):
        return self._kernels.gated(gate_up, activation, out)

    def forked_gated(self, change, products, factor, base, scale, drift, other, bias, activation, out):
        self._forked_gated(change, products, factor, base, scale, drift, other, bias, activation, out)


def numbers(norm: torch.nn.Module) -> tuple[torch.Tensor, float, float]:
    """Weight, eps, and what is added to the weight: 1 in Gemma's norms, which call their eps so."""
    if hasattr(norm, "variance_epsilon"):
        return norm.weight, norm.variance_epsilon, 0.0
    return norm.weight, norm.eps, 1.0
