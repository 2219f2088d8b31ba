"""Which heads are off in which row of a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ops.masks import LayerMask
from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from .ablation import SOURCED, Ablation
from .heads import Head, first_layer


@dataclass(frozen=True)
class HeadMask:
    """R batch rows, each with its own set of ablated heads.

    groups: R tuples of heads; the empty tuple is the unablated model. Rows of a growing batch fork from row 0.
    values: for `mean` and `resample`, per layer the vectors that stand in for the heads' outputs,
        [H, T or 1, D] (replacement_values.py).
    others: further ablations with their values. One of all is `mean` or `resample`, at most: a layer has room for one set of
        vectors.
    which: of each row, 0 for `ablation` and i + 1 for others[i]; None where all rows are of the first.
    """

    groups: tuple[tuple[Head, ...], ...]
    ablation: Ablation
    values: Sequence[torch.Tensor] | None = None
    others: tuple[tuple[Ablation, Sequence[torch.Tensor] | None], ...] = ()
    which: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sourced = [how for how, _ in ((self.ablation, None), *self.others) if how.kind in SOURCED]
        if len(sourced) > 1:
            raise ValueError(f"{' and '.join(how.kind for how in sourced)} replace outputs in one batch")

    def __len__(self) -> int:
        return len(self.groups)

    def fork_layer(self, row: int) -> int:
        """The lowest layer in which the row differs from row 0; 0 if it never does."""
        return first_layer(set(self.groups[row]) ^ set(self.groups[0]), 0)

    def ways(self, start: int, stop: int) -> tuple[int, ...]:
        """By which ablation these rows are."""
        return (0,) * (stop - start) if self.which is None else self.which[start:stop]

    def every(self, layer: int, num_heads: int) -> HeadMask:
        """A row for each ablation, with all heads of the layer off."""
        ways = range(1 + len(self.others))
        heads = tuple((layer, head) for head in range(num_heads))
        return replace(self, groups=(heads,) * len(ways), which=tuple(ways))

    def layer(
        self,
        layer: int,
        num_heads: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        rows: slice = slice(None),
    ) -> LayerMask:
        """The mask of one layer for these rows. dtype: of the model."""
        chosen = self.groups[rows]
        start, stop, _ = rows.indices(len(self))
        hits: dict[int, list[tuple[int, int]]] = {}  # by ablation: rows, and their heads in this layer
        for row, (group, way) in enumerate(zip(chosen, self.ways(start, stop), strict=True)):
            hits.setdefault(way, []).extend((row, head) for at, head in group if at == layer)
        ways, masks = ((self.ablation, self.values), *self.others), []
        for way, places in sorted(hits.items()):
            if places:
                off = torch.zeros(len(chosen), num_heads, dtype=torch.bool)
                off[tuple(torch.tensor(places).unbind(1))] = True
                masks.append(_off(*ways[way], layer, off.to(device), dtype))
        if not masks:
            return LayerMask.untouched(len(chosen), num_heads, dtype, device)
        # No row is of two ablations: where one has a factor, the others have 1.
        return functools.reduce(LayerMask.over, masks)


def _off(
    how: Ablation,
    values: Sequence[torch.Tensor] | None,
    layer: int,
    off: torch.Tensor,
    dtype: torch.dtype,
) -> LayerMask:
    """The mask of one layer in which the heads `off`, bool [B, H], are switched off in this way."""
    mask = LayerMask.untouched(*off.shape, dtype, off.device)
    bit = {"head_mean_q": REPLACE_Q, "head_mean_k": REPLACE_K}.get(how.kind)
    if bit:
        return mask.replacing(bit, off)
    if how.kind == "head_mean_v":
        return replace(mask, mean_out=off)
    if how.kind in SOURCED:
        value = values[layer].to(device=off.device, dtype=dtype)
        return mask.replacing(REPLACE_OUT, off, value=value, per_token=how.kind == "resample")
    # Through float64: a scale beyond float32 is infinity there, and the scan names the score that is not a number.
    factors = torch.tensor([how.logit_scale, how.output_scale], dtype=torch.float64, device=off.device)
    factors = factors.to(mask.logit_scale.dtype)
    return LayerMask(
        torch.where(off, factors[0], mask.logit_scale), torch.where(off, factors[1], mask.output_scale)
    )
