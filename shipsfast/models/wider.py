"""A copy of a model in a wider dtype: what scores are held against, to see how much of them is rounding."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from .anatomy import Anatomy
from .weights import where_weights_are

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def why_no_copy(model: PreTrainedModel) -> str:
    """Why the model cannot be had in a wider dtype, however much memory there is; "" where it can."""
    if model.dtype not in WIDER:
        return f"{str(model.dtype).removeprefix('torch.')} is the widest there is"
    where = where_weights_are(model)
    if where != "memory":
        return f"its weights are {where}"
    return "its layers are quantised" if _is_quantised(model) else ""


def _is_quantised(model: PreTrainedModel) -> bool:
    """Are weights anything but plain numbers? A checkpoint that was quantised may have been loaded as such."""
    if not all(map(_plain, model.parameters())):
        return True
    weights = (b for b in model.buffers() if b.dim() > 1 and b.numel() > 1)
    return getattr(model, "is_quantized", False) and not all(map(_plain, weights))


def _plain(tensor: torch.Tensor) -> bool:
    kind = tensor.dtype
    return type(tensor.data) is torch.Tensor and kind.is_floating_point and kind.itemsize > 1  # not float8


def copy_bytes(model: PreTrainedModel) -> int:
    """What `wider_copy` takes."""
    size = WIDER[model.dtype].itemsize
    return sum(size * t.numel() for t in _floats(model) if t.dtype.itemsize < size)


def wider_copy(model: PreTrainedModel, anatomy: Anatomy) -> tuple[PreTrainedModel, Anatomy]:
    """The model with all its numbers in the wider dtype, and the anatomy of that one. Weights that are tied stay tied."""
    dtype, memo = WIDER[model.dtype], {}
    for tensor in _floats(model):  # what deepcopy then finds instead of making a copy first
        wide = tensor.detach().to(max(dtype, tensor.dtype, key=lambda each: each.itemsize))
        parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(wide, requires_grad=False) if parameter else wide
    # A module has a dozen places for hooks, nearly all of them empty, and deepcopy is slow at each.
    for place in (
        x for module in model.modules() for x in vars(module).values() if type(x) is OrderedDict and not x
    ):
        memo[id(place)] = OrderedDict()
    return copy.deepcopy((model, anatomy), memo)


def _floats(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    return (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
