"""What happens to the heads of one layer, row by row: the mask vectors that attention takes.

    logit_scale, output_scale   factors on a head's attention logits and on its output
    mean_q, mean_k              the head uses the mean over all heads of the layer instead of its own q or k
    mean_out                    the head gives the mean over the outputs of all heads of the layer
    fixed                       the head gives a fixed vector

Means are over heads of the same row and token: over all query heads for q and outputs, over all key/value
heads for k (under grouped-query attention too, where each counts once). They are taken of what the heads
have without any replacement. Queries and keys are those that enter attention: after rotary embedding and norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q


@dataclass(frozen=True)
class LayerMask:
    """B rows (1 for all rows alike), H query heads.

    logit_scale, output_scale: float [B, H], 1 leaves the head as it is;
    mean_q, mean_k, mean_out, fixed: bool [B, H], None for no head;
    value: what `fixed` heads give, [H, T or 1, D]: per token of the call, or one vector for all;
    per_token: value belongs to the tokens of one sequence, and a call of another length is an error.
    """

    logit_scale: torch.Tensor
    output_scale: torch.Tensor
    mean_q: torch.Tensor | None = None
    mean_k: torch.Tensor | None = None
    mean_out: torch.Tensor | None = None
    fixed: torch.Tensor | None = None
    value: torch.Tensor | None = None
    per_token: bool = False

    @classmethod
    def untouched(cls, rows: int, heads: int, dtype: torch.dtype, device: torch.device | str) -> LayerMask:
        logit_scale, output_scale = (torch.ones(rows, heads, dtype=dtype, device=device) for _ in range(2))
        return cls(logit_scale, output_scale)

    def at(self, nodes: torch.Tensor) -> LayerMask:
        """For a call with the queries `nodes` only."""
        if self.value is None or self.value.shape[1] == 1:
            return self
        return replace(self, value=self.value.index_select(1, nodes))

    def over(self, outer: LayerMask) -> LayerMask:
        """Both at once: the heads of either. Where both fix an output, this one's vector counts."""
        flags = {}
        for name in ("mean_q", "mean_k", "mean_out", "fixed"):
            mine, other = getattr(self, name), getattr(outer, name)
            flags[name] = other if mine is None else mine if other is None else mine | other
        value = self.value
        if outer.value is not None and value is not None:
            tokens = max(value.shape[1], outer.value.shape[1])
            own = self.fixed[0][:, None, None]
            value = torch.where(own, value.expand(-1, tokens, -1), outer.value.expand(-1, tokens, -1))
        return LayerMask(
            self.logit_scale * outer.logit_scale,
            self.output_scale * outer.output_scale,
            **flags,
            value=outer.value if value is None else value,
            per_token=self.per_token or outer.per_token,
        )

    def replacements(self, q: torch.Tensor, k: torch.Tensor) -> dict:
        """The replacement arguments of `reference.tree_attention`; q [B, H, TQ, D], k [B, HKV, T, D]."""
        return self.replace_by(lambda: q.mean(1), lambda: k.mean(1), lambda: self.value)

    def replace_by(self, *make: Callable[[], torch.Tensor]) -> dict:
        """The same with these vectors in the place of a head's q, k and output, made where a head needs them."""
        flags, out = None, {}
        kinds = (
            ("mean_q", REPLACE_Q, "q_alt"),
            ("mean_k", REPLACE_K, "k_alt"),
            ("fixed", REPLACE_OUT, "out_alt"),
        )
        for (name, bit, alt), vectors in zip(kinds, make, strict=True):
            chosen = getattr(self, name)
            if chosen is not None:
                part = chosen.to(torch.int8) * bit
                flags = part if flags is None else flags | part
                out[alt] = vectors()
        return out if flags is None else out | {"replace": flags}

    def finish(self, out: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Heads that give the mean over heads: out [B, T, H, D]; before: outputs without replacement, if others."""
        if self.mean_out is None:
            return out
        mean = (out if before is None else before).mean(2, keepdim=True)
        return torch.where(self.mean_out[:, None, :, None], mean, out)
