"""What it means to switch a head off, and which heads are off in which row of a batch.

    undifferentiated  attention logits x eps     the head attends almost uniformly (arXiv 2410.13708, eq. 7)
    uniform           attention logits x 0       its limit
    scale             output x eps               the head's contribution is scaled down (eq. 8)
    zero              output x 0                 its limit, zero ablation
    head_mean_q, _k   q or k := mean over heads  (appendix A of the paper; k: over the key/value heads)
    head_mean_v       output := mean over heads
    mean              output := its mean over prompts and positions (mean ablation)
    resample          output := the one it has on another prompt (resample ablation)

Logits are scaled after rotary embedding and any query/key norm, before softcap and mask. How the kernels are told
is in ops/masks.py; where the vectors of `mean` and `resample` come from, in replacement_values.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..ops.masks import LayerMask
from .heads import Head

SCALED = ("undifferentiated", "scale")
SOURCED = ("mean", "resample")
KINDS = (
    "undifferentiated", "uniform", "scale", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean", "resample",
)  # fmt: skip
DEFAULT_SCALE = 1e-5


@dataclass(frozen=True)
class Ablation:
    """One way of switching a head off.

    kind: one of KINDS; scale: the eps of `undifferentiated` and `scale`, ignored by the others;
    prompts: what `mean` averages over, None for the scanned prompts themselves; the prompts that `resample`
        takes outputs from, one for each scanned prompt or one for all, each with as many tokens as the prompt it
        stands in for: the output at position t is replaced by the other prompt's at position t. Strings or
        token-id lists; strings get the template and tokenizer of the scan.
    Raises InputError for an unknown kind, a scale that is not a finite number, or prompts where none belong.
    """

    kind: str = "undifferentiated"
    scale: float = DEFAULT_SCALE
    prompts: tuple | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(self.kind).replace("-", "_"))
        if self.kind not in KINDS:
            raise InputError(f"unknown ablation {self.kind!r}: expected one of {', '.join(KINDS)}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, numbers.Real):
            raise InputError(f"scale must be a number, got {self.scale!r}")
        if not math.isfinite(self.scale):
            raise InputError(f"scale must be a finite number, got {self.scale}")
        if self.prompts is not None:
            if self.kind not in SOURCED:
                raise InputError(f"ablation {self.kind} takes no prompts: only mean and resample do")
            try:
                prompts = () if isinstance(self.prompts, str) else tuple(self.prompts)
                prompts = tuple(p if isinstance(p, str) else tuple(p) for p in prompts)
            except TypeError:
                prompts = ()
            if not prompts:
                raise InputError(
                    f"the prompts of ablation {self.kind} must be a list of at least one prompt, strings or token-id lists"
                )
            object.__setattr__(self, "prompts", prompts)
        elif self.kind == "resample":
            raise InputError(
                "ablation resample needs prompts to take outputs from: Ablation('resample', prompts=[...])"
            )

    @property
    def logit_scale(self) -> float:
        return {"undifferentiated": float(self.scale), "uniform": 0.0}.get(self.kind, 1.0)

    @property
    def output_scale(self) -> float:
        return {"scale": float(self.scale), "zero": 0.0}.get(self.kind, 1.0)

    def describe(self) -> str:
        return f"{self.kind} (eps {self.scale:g})" if self.kind in SCALED else self.kind


def as_ablation(ablation: str | Ablation, scale: float = DEFAULT_SCALE) -> Ablation:
    if not isinstance(ablation, Ablation):
        return Ablation(ablation, scale)
    if scale not in (DEFAULT_SCALE, ablation.scale):
        raise InputError(
            f"the ablation has scale {ablation.scale:g}, and scale={scale} is given as well: give one"
        )
    return ablation


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
        return min((layer for layer, _ in set(self.groups[row]) ^ set(self.groups[0])), default=0)

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
        flag = {"head_mean_q": "mean_q", "head_mean_k": "mean_k", "head_mean_v": "mean_out"}.get(how.kind)
        if flag:
            return LayerMask(mask.logit_scale, mask.output_scale, **{flag: off})
        if how.kind in SOURCED:
            value = self.values[layer].to(device=device, dtype=dtype)
            return LayerMask(
                mask.logit_scale, mask.output_scale, fixed=off, value=value, per_token=how.kind == "resample"
            )
        # Through float64: a scale beyond float32 is infinity there, and the scan names the score that is not a number.
        factors = torch.tensor([how.logit_scale, how.output_scale], dtype=torch.float64, device=device).to(
            wide
        )
        return LayerMask(
            torch.where(off, factors[0], mask.logit_scale), torch.where(off, factors[1], mask.output_scale)
        )
