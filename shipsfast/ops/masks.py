"""What happens to the heads of one layer, row by row: the mask vectors that attention takes.

    logit_scale, output_scale   factors on a head's attention logits and on its output
    replace                     what of a head comes from elsewhere (replacements.py): its q or k is the mean over all heads
                                of the layer, or it gives a fixed vector
    mean_out                    the head gives the mean over the outputs of all heads of the layer

Means are over heads of the same row and token: over all query heads for q and outputs, over all key/value
heads for k (under grouped-query attention too, where each counts once). They are taken of what the heads
have without any replacement. Queries and keys are those that enter attention: after rotary embedding and norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q


@dataclass(frozen=True)
class LayerMask:
    """B rows (1 for all rows alike), H query heads.

    logit_scale, output_scale: float [B, H], 1 leaves the head as it is;
    replace: int8 [B, H], sums of bits, None for no head; bits: those that some head has, known without looking;
    mean_out: bool [B, H], None for no head;
    value: what heads with REPLACE_OUT give, [H, T or 1, D]: per token of the call, or one vector for all;
    per_token: value belongs to the tokens of one sequence, and a call of another length is an error.
    """

    logit_scale: torch.Tensor
    output_scale: torch.Tensor
    replace: torch.Tensor | None = None
    bits: int = 0
    mean_out: torch.Tensor | None = None
    value: torch.Tensor | None = None
    per_token: bool = False

    @classmethod
    def untouched(cls, rows: int, heads: int, dtype: torch.dtype, device: torch.device | str) -> LayerMask:
        """dtype: of the model. Factors are in float32, or float64 for float64, where an eps rounded to float32 would show."""
        dtype = torch.promote_types(dtype, torch.float32)
        logit_scale, output_scale = (torch.ones(rows, heads, dtype=dtype, device=device) for _ in range(2))
        return cls(logit_scale, output_scale)

    def replacing(self, bit: int, heads: torch.Tensor, **value) -> LayerMask:
        """The same with this bit for `heads`, bool [B, H]."""
        return replace(self, replace=heads.to(torch.int8) * bit, bits=bit, **value)

    def flagged(self, bit: int) -> torch.Tensor | None:
        """bool [B, H]: the heads with this bit; None where there are none."""
        return self.replace & bit != 0 if self.bits & bit else None

    def abreast(self, count: int) -> LayerMask:
        """Each row `count` times, one after the other. Not for vectors that belong to the tokens of one sequence."""
        if count == 1:
            return self
        assert not self.per_token, "sequences that go abreast have other tokens"
        of_rows = ("logit_scale", "output_scale", "replace", "mean_out")
        own = {name: x for name in of_rows if (x := getattr(self, name)) is not None}
        return replace(self, **{name: x.repeat_interleave(count, 0) for name, x in own.items()})

    def at(self, nodes: torch.Tensor) -> LayerMask:
        """For a call with the queries `nodes` only."""
        if self.value is None or self.value.shape[1] == 1:
            return self
        return replace(self, value=self.value.index_select(1, nodes))

    def without_outputs(self) -> LayerMask:
        """What it does to queries, keys and logits alone."""
        bits = self.bits & ~REPLACE_OUT
        flags = self.replace & bits if bits else None
        return LayerMask(self.logit_scale, torch.ones_like(self.output_scale), flags, bits)

    def over(self, outer: LayerMask) -> LayerMask:
        """Both at once: the heads of either. Where both fix an output, this one's vector counts."""
        value = outer.value if self.value is None else self.value
        if outer.value is not None and self.value is not None:
            tokens = max(self.value.shape[1], outer.value.shape[1])
            own = self.flagged(REPLACE_OUT)[0][:, None, None]
            value = torch.where(own, *(x.expand(-1, tokens, -1) for x in (self.value, outer.value)))
        return LayerMask(
            self.logit_scale * outer.logit_scale,
            self.output_scale * outer.output_scale,
            _either(self.replace, outer.replace),
            self.bits | outer.bits,
            _either(self.mean_out, outer.mean_out),
            value,
            self.per_token or outer.per_token,
        )

    def replacements(self, q: torch.Tensor, k: torch.Tensor) -> dict:
        """The replacement arguments of `reference.tree_attention`; q [B, H, TQ, D], k [B, HKV, T, D]."""
        return self.replace_by(lambda: q.mean(1), lambda: k.mean(1), lambda: self.value)

    def replace_by(self, *make: Callable[[], torch.Tensor]) -> dict:
        """The same with these vectors in the place of a head's q, k and output, made where a head needs them."""
        if self.replace is None:
            return {}
        kinds = ((REPLACE_Q, "q_alt"), (REPLACE_K, "k_alt"), (REPLACE_OUT, "out_alt"))
        vectors = {name: made() for (bit, name), made in zip(kinds, make, strict=True) if self.bits & bit}
        return vectors | {"replace": self.replace}

    def finish(self, out: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Heads that give the mean over heads: out [B, T, H, D]; before: outputs without replacement, if others."""
        if self.mean_out is None:
            return out
        mean = (out if before is None else before).mean(2, keepdim=True)
        return torch.where(self.mean_out[:, None, :, None], mean, out)


def _either(mine: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return other if mine is None else mine if other is None else mine | other


def scaled(out: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """out x factor, which broadcasts; exactly 0 where the factor is, whatever the output was."""
    factor = factor.to(out.dtype)
    return (out * factor).masked_fill(factor == 0, 0)
