"""Rows that fork in a layer of fused_layer.py, by what their heads have changed.

Such a row differs from the base row by the output of its heads, d_i [T, R], which reaches the residual stream through their
slice of the output projection, W_i [R, hidden]:

    x_i = x + d_i W_i

and then the MLP. The norm before it scales rows by r = 1 / rms(x) and columns by its weight w, and what follows is linear:

    gate_up(norm(x_i)) = s_i (gate_up(norm(x)) + r d_i M_i),    s_i = r_i / r,  M_i = gate_up(w W_i)

which is a product over R numbers a token in the place of one over `hidden`; M_i costs as much as R tokens in full. Gemma 2
has a norm of weight v between the output projection and the residual stream, so that x_i = x_0 + r'_i v (y + d_i W_i), and

    gate_up(norm(x_i)) = s_i (gate_up(norm(x)) + r r'_i d_i M_i + (s'_i - 1) B),
    s'_i = r'_i / r',  M_i = gate_up(w v W_i),  B = gate_up(r r' w v y)

Where a head makes most of the stream and is switched off, the terms nearly cancel, and s_i is large: it scales up what was
rounded before. Chunks with a row that the norms scale up by more than LARGEST_SCALE are computed in full, as by the layer's own
forward. Heads of SmolLM2-135M come to 1.24 at most.

The norms of transformers round to float32 on the way. In a float64 model only their own order repeats that, so there gate and up
are computed in full (`pays`); tests take the short way in float64 with norms that do not round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.layer_ops import numbers
from .memory_plan import even_slices

if TYPE_CHECKING:
    from .fused_layer import FusedLayer

LARGEST_SCALE = 1.5


def pays(tokens: int, hidden: int, rank: int, forks: int, *, second_norm: bool, dtype: torch.dtype) -> bool:
    """Whether gate and up by rank are less work for `forks` rows of `tokens` tokens, and as exact as the dtype allows.

    second_norm: B is computed, as many products as one row's.
    """
    saved = forks * (tokens * hidden - rank * (hidden + tokens)) - second_norm * tokens * hidden
    return saved > 0 and dtype != torch.float64


class ForkedRows:
    """The rows that fork in one layer, and the base row, from where attention is done. Use inside `FusedLayer.loaded`.

    Args:
        start: the base row as it enters the layer, [1, T, hidden], not changed.
        own, other: its heads' outputs [1, T, H, D], and those of every head switched off [W, T, H, D], in W ways.
        heads: what each row has off here beyond the base row, the same number for all; ways: which of the W it is.
    """

    def __init__(
        self,
        layer: FusedLayer,
        start: torch.Tensor,
        own: torch.Tensor,
        other: torch.Tensor,
        heads: list[list[int]],
        ways: list[int],
    ) -> None:
        self.layer, self._start, self._own, self._other, self._heads = layer, start, own, other, heads
        self._delta = (other - own).transpose(1, 2).flatten(0, 1).to(layer.products)  # [W H, T, D]
        self._projection = layer.out.weight.t().unflatten(0, (layer.heads, -1))  # [H, D, hidden]
        # A copy of a few numbers that no earlier work waits for: one for all chunks.
        self._index, self._ways = (
            torch.tensor(each).to(start.device, non_blocking=True) for each in (heads, ways)
        )  # [rows, heads of each], [rows]
        self.base, self._added = start.clone(), None  # the base row as it enters the MLP, and y
        if layer.after_attention is None:
            layer.add(layer.out, self.base, own.flatten(2).flatten(0, 1), None)
        else:
            self._added = layer.out(own.flatten(2).flatten(0, 1).to(layer.products)).view_as(start)
            layer.ops.add_rms_norm_(self.base.flatten(0, 1), self._added.flatten(0, 1), layer.after_attention)
            self._r_between = _inverse_rms(self._added, layer.after_attention)  # [1, T]
        self._r = _inverse_rms(self.base, layer.before_mlp)  # [1, T]
        self.tokens = start.shape[1]
        rank = len(heads[0]) * own.shape[3]
        self._gate_up = None
        if layer.by_rank(self.tokens, rank, len(heads)):
            self._gate_up = _GateUp(self)

    def write(self, out: torch.Tensor, most: int) -> torch.Tensor:
        """The rows as they leave the layer, to out [rows, T, hidden]; returns the base row, [1, T, hidden].

        most: rows that pass the MLP together, at most.
        """
        layer, tokens = self.layer, self.tokens
        # The base row joins the last chunk: alone it would be a small, slow product.
        *chunks, final = even_slices(len(self._heads) + 1, most)
        for rows in chunks:
            inner = self._inner(rows.stop - rows.start)
            layer.mlp(out[rows], inner if self._attended(out, rows, inner) else None)
        final = slice(final.start, len(self._heads))
        inner = self._inner(final.stop - final.start + 1)
        if final.start < final.stop and not self._attended(
            out, final, None if inner is None else inner[:-tokens]
        ):
            inner = None
        if inner is not None:
            self._gate_up.base_row(inner[-tokens:])
        joined = torch.cat([out[final], self.base])
        layer.mlp(joined, inner)
        out[final] = joined[:-1]
        return joined[-1:]

    def _inner(self, rows: int) -> torch.Tensor | None:
        """Room for what enters down_proj, [rows * T, M], where gate and up go by rank."""
        if self._gate_up is None:
            return None
        shape = rows * self.tokens, self.layer.gate_up.width // 2
        return self._own.new_empty(shape, dtype=self.layer.products)

    def _attended(self, out: torch.Tensor, rows: slice, inner: torch.Tensor | None) -> bool:
        """These rows up to the MLP, to out[rows]. Whether `inner` has what enters down_proj."""
        layer, into, chosen, ways = self.layer, out[rows], self._index[rows], self._ways[rows]
        places = ways[:, None] * layer.heads + chosen
        change = self._delta[places].transpose(1, 2).flatten(2)  # [rows, T, R]
        projection = self._projection[chosen].flatten(1, 2)  # [rows, R, hidden]
        between = None
        if self._added is None:
            layer.add_batched(self.base.expand(len(chosen), -1, -1), change, projection, into)
        else:
            into[:] = self._start
            y = torch.baddbmm(self._added.expand(len(chosen), -1, -1), change, projection)
            layer.ops.add_rms_norm_(into.flatten(0, 1), y.flatten(0, 1), layer.after_attention)
            between = _inverse_rms(y, layer.after_attention) / self._r_between  # [rows, T]
            del y
        scale = _inverse_rms(into, layer.before_mlp) / self._r  # [rows, T]
        largest = scale if between is None else scale * between.clamp(min=1)
        if (largest > LARGEST_SCALE).any():  # waits for the device
            self._in_full(into, chosen, ways)
            return False
        if inner is None:
            return False
        self._gate_up.rows(scale, between, change, projection, inner)
        return True

    def _in_full(self, into: torch.Tensor, chosen: torch.Tensor, ways: torch.Tensor) -> None:
        """The same by all heads' outputs."""
        off = torch.zeros(len(chosen), self.layer.heads, dtype=torch.bool, device=into.device)
        off.scatter_(1, chosen, True)
        heads = torch.where(off[:, None, :, None], self._other[ways], self._own)  # [rows, T, H, D]
        into[:] = self._start
        self.layer.add(self.layer.out, into, heads.flatten(2).flatten(0, 1), self.layer.after_attention)


class _GateUp:
    """act(gate) * up, by rank."""

    def __init__(self, forked: ForkedRows) -> None:
        layer = self._layer = forked.layer
        self._weight, self._r = _weight(layer.before_mlp), forked._r  # [hidden]: w, or w v
        base = layer.ops.rms_norm(forked.base[0], layer.before_mlp)
        self._base = layer.gate_up.without_bias(base)  # [T, 2 M]
        self._other = None  # B [T, 2 M]
        if forked._added is not None:
            self._weight = self._weight * _weight(layer.after_attention)
            self._r_both = self._r * forked._r_between  # [1, T]
            added = forked._added[0]
            both = self._r_both[0][:, None] * added * self._weight
            self._other = layer.gate_up.without_bias(both.to(added.dtype))

    def base_row(self, out: torch.Tensor) -> None:
        """Of the base row, to out [T, M]."""
        bias = self._layer.gate_up.bias
        gate_up = self._base if bias is None else self._base + bias
        self._layer.ops.gated(gate_up, self._layer.activation, out)

    def rows(
        self,
        scale: torch.Tensor,
        between: torch.Tensor | None,
        change: torch.Tensor,
        projection: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Of n rows, to out [n * T, M]. scale, between [n, T]: s and s'; change [n, T, R]: d; projection [n, R, hidden]: W."""
        weighted = (projection * self._weight).to(projection.dtype).flatten(0, 1)
        products = self._layer.gate_up.without_bias(weighted)  # M
        if between is None:
            factor, drift = self._r.expand_as(scale).contiguous(), None
        else:
            factor, drift = self._r_both * between, between - 1
        self._layer.ops.forked_gated(
            change, products.view(len(scale), -1, products.shape[1]), factor, self._base, scale, drift, self._other,
            self._layer.gate_up.bias, self._layer.activation, out,
        )  # fmt: skip


def _inverse_rms(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of rows x [..., hidden], in float32, or float64 of float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    return (size.square() / x.shape[-1] + numbers(norm)[1]).rsqrt()


def _weight(norm: torch.nn.Module) -> torch.Tensor:
    """What a norm multiplies its columns by, in float32 at least: half precision would round 1 + weight."""
    weight, _, offset = numbers(norm)
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
