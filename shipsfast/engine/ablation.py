"""What it means to switch a head off.

    undifferentiated  attention logits x eps     the head attends almost uniformly (arXiv 2410.13708, eq. 7)
    uniform           attention logits x 0       its limit
    scale             output x eps               the head's contribution is scaled down (eq. 8)
    zero              output x 0                 its limit, zero ablation
    head_mean_q, _k   q or k := mean over heads  (appendix A of the paper; k: over the key/value heads)
    head_mean_v       output := mean over heads
    mean              output := its mean over prompts and positions (mean ablation)
    resample          output := the one it has on another prompt (resample ablation)

Logits are scaled after rotary embedding and any query/key norm, before softcap and mask. Which heads are off in which
row says head_mask.py, what the kernels are told ops/masks.py; where the vectors of `mean` and `resample` come from, in replacement_values.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from ..prompts.tokens import as_prompts
from ..text import counted

ALIGNMENTS = ("exact", "end", "template")  # alignment.py
ALIGNED = {"end": "aligned at the end", "template": "aligned by template"}
SCALED = ("undifferentiated", "scale")
SOURCED = ("mean", "resample")
AT = ("all", "end")
KINDS = (
    "undifferentiated", "uniform", "scale", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean", "resample",
)  # fmt: skip
DEFAULT_SCALE = 1e-5


@dataclass(frozen=True)
class Ablation:
    """One way of switching a head off.

    kind: one of KINDS; scale: the eps of `undifferentiated` and `scale`, ignored by the others;
    prompts: what `mean` averages over, None for the scanned prompts themselves; the prompts that `resample`
        takes outputs from, one for each scanned prompt or one for all. Strings, token-id lists or chat messages; what
        is text gets the template and tokenizer of the scan.
    align: which of the other prompt's positions stands in for which (alignment.py): "exact", for `resample` prompts with
        as many tokens as those they stand in for; "end", both end together; "template", what both begin and end with is
        matched, and what lies between by its relative place.
    at: "all", the head is off at every position; "end", only at the position whose next-token distribution is read: what it
        gives at earlier positions, and so their keys and values in later layers, are the unablated model's.
    Raises InputError for an unknown kind, a scale that is not a finite number, or prompts where none belong.
    """

    kind: str = "undifferentiated"
    scale: float = DEFAULT_SCALE
    prompts: tuple | None = None
    align: str = "exact"
    at: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(self.kind).replace("-", "_"))
        if self.kind not in KINDS:
            raise InputError(f"unknown ablation {self.kind!r}: expected one of {', '.join(KINDS)}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, numbers.Real):
            raise InputError(f"scale must be a number, got {self.scale!r}")
        if not math.isfinite(self.scale):
            raise InputError(f"scale must be a finite number, got {self.scale}")
        object.__setattr__(self, "scale", float(self.scale))
        if self.align not in ALIGNMENTS:
            raise InputError(
                f"unknown align {self.align!r} (--align): expected one of {', '.join(ALIGNMENTS)}"
            )
        if self.at not in AT:
            raise InputError(f"unknown at {self.at!r} (--at): an ablation is at one of {', '.join(AT)}")
        if self.align != "exact" and self.kind != "resample":
            raise InputError(
                f"ablation {self.kind} aligns no prompts, and align={self.align!r} was given (--align)"
            )
        if self.prompts is not None:
            if self.kind not in SOURCED:
                raise InputError(f"ablation {self.kind} takes no prompts: only mean and resample do")
            try:
                prompts = as_prompts(self.prompts)
            except (InputError, TypeError) as error:
                raise InputError(
                    f"the prompts of ablation {self.kind} must be a list of at least one prompt, as those that are scanned: "
                    f"{error}"
                ) from error
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
        about = [
            f"eps {self.scale:g}" if self.kind in SCALED else ALIGNED.get(self.align),
            "at the end only" if self.at == "end" else None,
        ]
        said = ", ".join(filter(None, about))
        return f"{self.kind} ({said})" if said else self.kind


def as_ablation(ablation: str | Ablation, scale: float = DEFAULT_SCALE) -> Ablation:
    """Raises InputError for several."""
    if isinstance(ablation, (list, tuple)):
        if len(ablation) != 1:
            raise InputError(
                f"{counted(len(ablation), 'ablation')} were given (--ablation, --scale): only scans of the next token take several"
            )
        (ablation,) = ablation
    if not isinstance(ablation, Ablation):
        return Ablation(ablation, scale)
    if scale not in (DEFAULT_SCALE, ablation.scale):
        raise InputError(
            f"the ablation has scale {ablation.scale:g}, and scale={scale} is given as well: give one"
        )
    return ablation


def as_ablations(ablation, scale=DEFAULT_SCALE) -> tuple[Ablation, ...]:
    """One or several of `ablation`, each at one or several of `scale` where its kind has an eps: all different."""
    asked, scales = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (ablation, scale))
    if not asked or not scales:
        raise InputError(
            "there are no ablations or no scales: give at least one of each (--ablation, --scale)"
        )
    found: list[Ablation] = []
    for each in asked:
        own = each if isinstance(each, Ablation) else Ablation(each)
        if own.kind not in SCALED and len(asked) + len(scales) > 2:
            found.append(own)
        elif len(scales) == 1:
            found.append(as_ablation(each, scales[0]))
        elif own.scale != DEFAULT_SCALE:
            raise InputError(
                f"the ablation has scale {own.scale:g}, and several scales are given as well: give one or the other"
            )
        else:
            found += [replace(own, scale=each) for each in scales]
    if len(scales) > 1 and not any(how.kind in SCALED for how in found):
        raise InputError(
            f"{len(scales)} scales were given (--scale), and {' and '.join(how.kind for how in found)} have no eps: only "
            f"{' and '.join(SCALED)} do"
        )
    for number, how in enumerate(found):
        if how in found[:number]:
            raise InputError(f"ablation {how.describe()} is given twice (--ablation, --scale)")
    return tuple(found)


def passes_of(ablations: Sequence[Ablation]) -> list[list[int]]:
    """Which of them, by their numbers, may be rows of one batch.

    Their heads are off at the same positions, and outputs are replaced by one set of vectors at most. `resample` cuts the prompts'
    tree in a way of its own, and so goes alone.
    """
    passes: list[list[int]] = []
    for number, how in enumerate(ablations):
        for together in passes:
            others = [ablations[at] for at in together]
            clash = how.kind in SOURCED and any(other.kind in SOURCED for other in others)
            alone = "resample" in (how.kind, *(other.kind for other in others))
            if not clash and not alone and others[0].at == how.at:
                together.append(number)
                break
        else:
            passes.append([number])
    return passes
