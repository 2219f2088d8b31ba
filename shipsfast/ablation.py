"""What it means to switch a head off, and the mask vectors that say so.

Every ablation here is two numbers per batch row and head: `logit_scale` multiplies the head's attention
logits (after rotary embedding and any query/key norm, before softcap and mask), `output_scale` its output.
1 and 1 leave the head as it is.

    undifferentiated  logit_scale = eps     the head attends almost uniformly (arXiv 2410.13708, eq. 7)
    uniform           logit_scale = 0       its limit
    scale             output_scale = eps    the head's contribution is scaled down (eq. 8)
    zero              output_scale = 0      its limit, zero ablation
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

from .anatomy import Anatomy, inspect_model
from .attention import ATTRIBUTE, DENSE, DenseCall, installed
from .errors import InputError

Head = tuple[int, int]  # (layer, query head), both from 0

KINDS = ("undifferentiated", "uniform", "scale", "zero")
DEFAULT_SCALE = 1e-5


@dataclass(frozen=True)
class Ablation:
    """One way of switching a head off.

    kind: one of KINDS; scale: the eps of `undifferentiated` and `scale`, ignored by `uniform` and `zero`.
    Raises InputError for an unknown kind or a scale that is not a finite number.
    """

    kind: str = "undifferentiated"
    scale: float = DEFAULT_SCALE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown ablation {self.kind!r}: expected one of {', '.join(KINDS)}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, numbers.Real):
            raise InputError(f"scale must be a number, got {self.scale!r}")
        if not math.isfinite(self.scale):
            raise InputError(f"scale must be a finite number, got {self.scale}")

    @property
    def logit_scale(self) -> float:
        return {"undifferentiated": float(self.scale), "uniform": 0.0}.get(self.kind, 1.0)

    @property
    def output_scale(self) -> float:
        return {"scale": float(self.scale), "zero": 0.0}.get(self.kind, 1.0)

    def describe(self) -> str:
        return (
            f"{self.kind} (eps {self.scale:g})" if self.kind in ("undifferentiated", "scale") else self.kind
        )


def as_ablation(ablation: str | Ablation, scale: float = DEFAULT_SCALE) -> Ablation:
    return ablation if isinstance(ablation, Ablation) else Ablation(ablation, scale)


@dataclass(frozen=True)
class HeadMask:
    """R batch rows, each with its own set of ablated heads.

    groups: R tuples of heads; the empty tuple is the unablated model.
    """

    groups: tuple[tuple[Head, ...], ...]
    ablation: Ablation

    def __len__(self) -> int:
        return len(self.groups)

    def first_layer(self, row: int) -> int | None:
        """The lowest layer in which the row differs from the unablated model, None if it never does."""
        return min((layer for layer, _ in self.groups[row]), default=None)

    def vectors(
        self,
        layer: int,
        num_heads: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        rows: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logit_scale, output_scale) of one layer, each [rows, num_heads].

        In float32, or float64 for a model in float64, where an eps rounded to float32 would show.
        """
        chosen = self.groups[rows]
        hits = [(r, head) for r, group in enumerate(chosen) for at, head in group if at == layer]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logit_scale = torch.ones(len(chosen), num_heads, dtype=wide)
        output_scale = torch.ones(len(chosen), num_heads, dtype=wide)
        if hits:
            row_index, head_index = torch.tensor(hits).unbind(1)
            logit_scale[row_index, head_index] = self.ablation.logit_scale
            output_scale[row_index, head_index] = self.ablation.output_scale
        return logit_scale.to(device), output_scale.to(device)


def check_heads(heads: Iterable[Sequence[int | None]], num_layers: int, num_heads: int) -> list[Head]:
    """The heads as (layer, head) pairs, each once, in ascending order; (layer, None) stands for a whole layer.

    Raises InputError for a head that does not exist or an entry that is not a pair of integers.
    """
    out: set[Head] = set()
    for entry in heads:
        try:
            layer, head = entry
            layer, head = operator.index(layer), None if head is None else operator.index(head)
        except (TypeError, ValueError):
            raise InputError(f"head {entry!r} is not a (layer, head) pair of integers") from None
        if not (0 <= layer < num_layers and (head is None or 0 <= head < num_heads)):
            raise InputError(
                f"head {layer}-{head} does not exist: the model has layers 0 to {num_layers - 1} "
                f"with heads 0 to {num_heads - 1}"
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


@contextlib.contextmanager
def ablate(
    model: PreTrainedModel,
    heads: Iterable[Sequence[int | None]],
    *,
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
) -> Iterator[None]:
    """Context manager in which `model` runs with these heads switched off, in every forward pass by anyone.

    model(...), model.generate(...) and any library that drives the model see the ablation, in prefill and in
    every decode step; uniform attention is over visible tokens only. May be nested. The model is put back on
    leaving, also after an exception; inside, it is in evaluation mode.

    Args:
        heads: (layer, head) pairs, from 0; (layer, None) for a whole layer; may be empty.
        ablation, scale: as in `scan`.
    Raises:
        InputError: a head that does not exist, an unknown ablation.
        UnsupportedModelError: a model whose attention cannot be reached.
    """
    how = as_ablation(ablation, scale)
    anatomy = inspect_model(model, [0], 1)
    heads = list(heads)
    mask = HeadMask((tuple(check_heads(heads, anatomy.num_layers, anatomy.num_heads) if heads else ()),), how)
    with dense_rows(model, anatomy, mask):
        yield


@contextlib.contextmanager
def dense_rows(model: PreTrainedModel, anatomy: Anatomy, mask: HeadMask) -> Iterator[None]:
    """The model driven as usual, with the heads of `mask` switched off: one group for all rows of a batch, or
    one for each."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(installed(model, DENSE))
        for index, layer in enumerate(anatomy.layers):
            device = next(layer.attention.parameters()).device
            vectors = mask.vectors(index, anatomy.num_heads, device=device, dtype=model.dtype)
            logit_scale, output_scale = vectors
            outer = layer.attention.__dict__.get(ATTRIBUTE)
            if outer is not None:
                logit_scale, output_scale = logit_scale * outer.logit_scale, output_scale * outer.output_scale
            undo.callback(_restore, layer.attention, outer)
            setattr(layer.attention, ATTRIBUTE, DenseCall(logit_scale, output_scale))
        yield


def _restore(module: torch.nn.Module, call: DenseCall | None) -> None:
    if call is None:
        delattr(module, ATTRIBUTE)
    else:
        setattr(module, ATTRIBUTE, call)
