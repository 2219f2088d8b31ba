"""Which heads are off in which row of a batch."""

from __future__ import annotations

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
    """

    groups: tuple[tuple[Head, ...], ...]
    ablation: Ablation
    values: Sequence[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def fork_layer(self, row: int) -> int:
        """The lowest layer in which the row differs from row 0; 0 if it never does."""
        return first_layer(set(self.groups[row]) ^ set(self.groups[0]), 0)

    def layer(
        self,
        layer: int,
        num_heads: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        rows: slice = slice(None),
    ) -> LayerMask:
        """The mask of one layer for these rows.

        Factors are in float32, or float64 for a model in float64, where an eps rounded to float32 would show.
        """
        chosen = self.groups[rows]
        hits = [(r, head) for r, group in enumerate(chosen) for at, head in group if at == layer]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mask = LayerMask.untouched(len(chosen), num_heads, wide, device)
        if not hits:
            return mask
        off = torch.zeros(len(chosen), num_heads, dtype=torch.bool)
        off[tuple(torch.tensor(hits).unbind(1))] = True
        off = off.to(device)
        how = self.ablation
        bit = {"head_mean_q": REPLACE_Q, "head_mean_k": REPLACE_K}.get(how.kind)
        if bit:
            return mask.replacing(bit, off)
        if how.kind == "head_mean_v":
            return replace(mask, mean_out=off)
        if how.kind in SOURCED:
            value = self.values[layer].to(device=device, dtype=dtype)
            return mask.replacing(REPLACE_OUT, off, value=value, per_token=how.kind == "resample")
        # Through float64: a scale beyond float32 is infinity there, and the scan names the score that is not a number.
        factors = torch.tensor([how.logit_scale, how.output_scale], dtype=torch.float64, device=device).to(
            wide
        )
        return LayerMask(
            torch.where(off, factors[0], mask.logit_scale), torch.where(off, factors[1], mask.output_scale)
        )
