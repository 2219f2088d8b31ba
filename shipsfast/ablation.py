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
is in layer_mask.py; where the vectors of `mean` and `resample` come from, in sources.py.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .anatomy import Anatomy, base_model, inspect_model
from .attention import ATTRIBUTE, DENSE, DenseCall, installed
from .errors import InputError
from .layer_mask import LayerMask

Head = tuple[int, int]  # (layer, query head), both from 0

SCALED = ("undifferentiated", "scale")
SOURCED = ("mean", "resample")
KINDS = (
    "undifferentiated", "uniform", "scale", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean", "resample",
)  # fmt: skip
UNITS = ("head", "kv_group")
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
        [H, T or 1, D] (sources.py).
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


def check_unit(unit: str, anatomy: Anatomy) -> int:
    """How many units a layer has: query heads, or key/value groups. Raises InputError for another unit."""
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: expected one of {', '.join(UNITS)}")
    if unit == "kv_group" and not anatomy.uniform_kv_heads:
        raise InputError("the model's layers differ in their key/value heads: use unit 'head'")
    return anatomy.num_heads if unit == "head" else anatomy.num_kv_heads


def unit_heads(chosen: Head, unit: str, anatomy: Anatomy) -> tuple[Head, ...]:
    """The query heads of a unit: itself, or all that share the key/value head (layer, index)."""
    if unit == "head":
        return (chosen,)
    layer, index = chosen
    size = anatomy.num_heads // anatomy.num_kv_heads
    return tuple((layer, head) for head in range(index * size, (index + 1) * size))


def check_heads(
    heads: Iterable[Sequence[int | None]], num_layers: int, num_heads: int, unit: str = "head"
) -> list[Head]:
    """The heads as (layer, head) pairs, each once, in ascending order; (layer, None) stands for a whole layer.

    Raises InputError for a head that does not exist or an entry that is not a pair of integers.
    """
    out: set[Head] = set()
    if not isinstance(heads, Iterable):
        raise InputError(f"heads must be a list of (layer, head) pairs, got {heads!r}")
    for entry in heads:
        try:
            layer, head = entry[:2] if hasattr(entry, "score") else entry  # a HeadScore is as good as a pair
            layer, head = operator.index(layer), None if head is None else operator.index(head)
        except (TypeError, ValueError):
            raise InputError(f"head {entry!r} is not a (layer, head) pair of integers") from None
        if not (0 <= layer < num_layers and (head is None or 0 <= head < num_heads)):
            raise InputError(
                f"{unit} {layer}-{head} does not exist: the model has layers 0 to {num_layers - 1} "
                f"with {unit}s 0 to {num_heads - 1}"
                if head is not None
                else f"layer {layer} does not exist: the model has layers 0 to {num_layers - 1}"
            )
        out.update((layer, h) for h in (range(num_heads) if head is None else [head]))
    if not out:
        raise InputError("the list of heads is empty: give at least one (layer, head), or None for all")
    return sorted(out)


def parse_heads(text: str) -> list[tuple[int, int | None]]:
    """Heads from the command line, for `check_heads`: "2-26", "2-26,3-1", or a whole layer, "5"."""
    out: list[tuple[int, int | None]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        layer, dash, head = part.partition("-")
        if not layer.isdecimal() or (dash and not head.isdecimal()):
            raise InputError(
                f"cannot read head {part!r}: write LAYER-HEAD, such as 2-26, or LAYER for a whole layer"
            )
        out.append((int(layer), int(head) if dash else None))
    if not out:
        raise InputError("the list of heads is empty: write LAYER-HEAD, such as 2-26")
    return out


def parse_groups(text: str) -> list[list[tuple[int, int | None]]]:
    """Groups of heads from the command line: "2-26; 2-26,3-1"; "none" is the unablated model."""
    parts = [part.strip() for part in text.split(";")]
    if not all(parts):
        raise InputError(
            f"cannot read the groups {text!r}: write heads such as 2-26,3-1, with ; between groups"
        )
    return [[] if part == "none" else parse_heads(part) for part in parts]


@contextlib.contextmanager
def ablate(
    model: PreTrainedModel,
    heads: Iterable[Sequence[int | None]],
    *,
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    unit: str = "head",
    tokenizer=None,
    template: str = "none",
) -> Iterator[None]:
    """Context manager in which `model` runs with these heads switched off, in every forward pass by anyone.

    model(...), model.generate(...) and any library that drives the model see the ablation, in prefill and in
    every decode step; uniform attention is over visible tokens only. May be nested: then the heads of both are
    off. The model is put back on leaving, also after an exception; inside, it is in evaluation mode.

    Args:
        heads: (layer, head) pairs, from 0; (layer, None) for a whole layer; may be empty.
        ablation, scale: as in `scan`. `mean` and `resample` need an `Ablation` with prompts (token-id lists, or
            strings with a `tokenizer` and the `template` around them). `resample` then runs forward passes of exactly the length of its one
            prompt, without a cache, and refuses others: a decode step has no counterpart.
        unit: "head", or "kv_group" for (layer, key/value head) pairs with all query heads that share it.
    Raises:
        InputError: a head that does not exist, an unknown ablation.
        UnsupportedModelError: a model whose attention cannot be reached.
    """
    how = as_ablation(ablation, scale)
    model = base_model(model)
    anatomy = inspect_model(model, [0], 1)
    heads = list(heads) if isinstance(heads, Iterable) else heads
    chosen = check_heads(heads, anatomy.num_layers, check_unit(unit, anatomy), unit) if heads else []
    group = tuple(head for each in chosen for head in unit_heads(each, unit, anatomy))
    values = None
    if how.kind in SOURCED and group:
        from .sources import values_for_ablate  # it runs the model, and imports this file

        values = values_for_ablate(model, anatomy, how, tokenizer, template)
    with dense_rows(model, anatomy, HeadMask((group,), how, values)):
        yield


@contextlib.contextmanager
def dense_rows(model: PreTrainedModel, anatomy: Anatomy, mask: HeadMask) -> Iterator[None]:
    """The model driven as usual, with the heads of `mask` switched off: one group for all rows of a batch, or
    one for each."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(installed(model, DENSE))
        for index, layer in enumerate(anatomy.layers):
            here = mask.layer(index, anatomy.num_heads, device=layer.device, dtype=model.dtype)
            outer = layer.attention.__dict__.get(ATTRIBUTE)
            if outer is not None:
                here = here.over(outer.mask)
            undo.callback(_restore, layer.attention, outer)
            setattr(layer.attention, ATTRIBUTE, DenseCall(here))
        yield


def _restore(module: torch.nn.Module, call: DenseCall | None) -> None:
    if call is None:
        delattr(module, ATTRIBUTE)
    else:
        setattr(module, ATTRIBUTE, call)
