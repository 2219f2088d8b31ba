"""Gate and up of the rows that fork in a layer, by what their heads have changed.

Such a row enters the layer's MLP as x_i = x + d_i W_i: x [T, hidden] is the base row's, d_i [T, R] the change of its heads'
outputs, W_i [R, hidden] their slice of the output projection. The norm before the MLP scales rows by r = 1 / rms(x) and
columns by its weight w, and what follows is linear:

    gate_up(norm(x_i)) = s_i (gate_up(norm(x)) + r d_i M_i),    s_i = r_i / r,  M_i = gate_up(w W_i)

which is a product over R numbers a token in the place of one over `hidden`. M_i takes R more rows. Gemma 2 has a norm of
weight v between the output projection and the residual stream, so that x_i = x_0 + r'_i v (y + d_i W_i), and

    gate_up(norm(x_i)) = s_i (gate_up(norm(x)) + r r'_i d_i M_i + (r'_i / r' - 1) B),
    M_i = gate_up(w v W_i),  B = gate_up(r r' w v y)

The norms of transformers round to float32 on the way. In a float64 model only their own order repeats that, so such a model
takes the long way (`pays`); tests take this one in float64 with norms that do not round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.layer_ops import numbers

if TYPE_CHECKING:
    from .fused_layer import FusedLayer


def pays(tokens: int, hidden: int, rank: int, forks: int, *, second_norm: bool, dtype: torch.dtype) -> bool:
    """Whether this way is less work for `forks` rows of `tokens` tokens, and as exact as the dtype allows.

    rank: R; second_norm: B is computed, as many products as one row's.
    """
    saved = forks * (tokens * hidden - rank * (hidden + tokens)) - second_norm * tokens * hidden
    return saved > 0 and dtype != torch.float64


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of rows x [N, hidden]: [N], float64 of float64, else float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.linalg.vector_norm(x, dim=-1, dtype=wide).square() / x.shape[-1] + eps).rsqrt()


class ForkedGateUp:
    """For the rows that fork in one layer, from one base row.

    Args:
        layer: whose MLP it is; inside `FusedLayer.loaded`.
        base: x [T, hidden]; added: y [T, hidden] where a norm stands before it is added, else None.
    """

    def __init__(self, layer: FusedLayer, base: torch.Tensor, added: torch.Tensor | None) -> None:
        self._layer, self._between = layer, layer.after_attention
        self._weight, self._eps, offset = numbers(layer.before_mlp)
        self._weight = self._weight + offset  # [hidden]: w, or w v
        self._r = inverse_rms(base, self._eps)  # [T]
        # [T, 2 M]
        self._base = layer.gate_up.without_bias(layer.ops.rms_norm(base, layer.before_mlp))
        self._other = self._r_between = None
        if added is not None:
            between, self._between_eps, offset = numbers(self._between)
            self._weight = self._weight * (between + offset)
            self._r_between = inverse_rms(added, self._between_eps)
            both = (self._r * self._r_between)[:, None] * added * self._weight
            self._other = layer.gate_up.without_bias(both.to(added.dtype))

    def base_row(self, out: torch.Tensor) -> None:
        """act(gate) * up of the base row, to out [T, M]."""
        bias = self._layer.gate_up.bias
        gate_up = self._base if bias is None else self._base + bias
        self._layer.ops.gated(gate_up, self._layer.activation, out)

    def forks(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None,
        change: torch.Tensor,
        projection: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """act(gate) * up of n rows, to out [n * T, M].

        x [n, T, hidden]: the rows as they enter the MLP; added [n, T, hidden]: what of them went through the norm
        between, None without; change [n, T, R]: d; projection [n, R, hidden]: W.
        """
        n = len(x)
        products = self._layer.gate_up.without_bias((projection * self._weight).flatten(0, 1))
        scale = inverse_rms(x, self._eps) / self._r  # [n, T]
        factor, drift = self._r.expand(n, -1), None
        if added is not None:
            between = inverse_rms(added, self._between_eps)
            factor, drift = factor * between, between / self._r_between - 1
        self._layer.ops.forked_gated(
            (change * factor[..., None]).to(change.dtype),
            products.view(n, -1, products.shape[1]),
            self._base,
            scale,
            drift,
            self._other,
            self._layer.gate_up.bias,
            self._layer.activation,
            out,
        )
