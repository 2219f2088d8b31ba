"""A copy of a model in another dtype: a wider one, which scores are held against, to see how much of them is rounding; or a
narrower one, which passes faster, to see which heads are worth the model's own."""

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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_no_copy(model: PreTrainedModel) -> str:
    """Why the model cannot be had in a wider dtype, however much memory there is; "" where it can."""
    if model.dtype not in WIDER:
        return f"{name_of(model.dtype)} is the widest there is"
    return _why_no_other(model)


def why_no_narrower(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """The same of a narrower dtype."""
    if not dtype.itemsize < model.dtype.itemsize:
        return f"the model is in {name_of(model.dtype)}, and {name_of(dtype)} is no narrower"
    return _why_no_other(model)


def _why_no_other(model: PreTrainedModel) -> str:
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


def narrower_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What `narrower_copy` takes."""
    return sum(min(dtype.itemsize, p.dtype.itemsize) * p.numel() for p in model.parameters())


def wider_copy(model: PreTrainedModel, anatomy: Anatomy) -> tuple[PreTrainedModel, Anatomy]:
    """The model with all its numbers in the wider dtype, and the anatomy of that one. Weights that are tied stay tied."""
    dtype = WIDER[model.dtype]
    return _copy(
        model, anatomy, [(t, max(dtype, t.dtype, key=lambda each: each.itemsize)) for t in _floats(model)]
    )


def narrower_copy(
    model: PreTrainedModel, anatomy: Anatomy, dtype: torch.dtype
) -> tuple[PreTrainedModel, Anatomy]:
    """The same in a narrower dtype: its parameters, and the buffers that a checkpoint has. Others, such as the frequencies of
    rotary embeddings, stay as they are, as when a model is loaded in that dtype."""
    kept = {id(b) for b in model.buffers()} - {id(t) for t in model.state_dict(keep_vars=True).values()}
    some = (t for t in _floats(model) if id(t) not in kept)
    return _copy(model, anatomy, [(t, min(dtype, t.dtype, key=lambda each: each.itemsize)) for t in some])


def _copy(
    model: PreTrainedModel, anatomy: Anatomy, dtypes: list[tuple[torch.Tensor, torch.dtype]]
) -> tuple[PreTrainedModel, Anatomy]:
    """dtypes: of the tensors that get another one."""
    memo = {}
    for tensor, dtype in dtypes:  # what deepcopy then finds instead of making a copy first
        other = tensor.detach().to(dtype)
        parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(other, requires_grad=False) if parameter else other
    # A module has a dozen places for hooks, nearly all of them empty, and deepcopy is slow at each.
    for place in (
        x for module in model.modules() for x in vars(module).values() if type(x) is OrderedDict and not x
    ):
        memo[id(place)] = OrderedDict()
    return copy.deepcopy((model, anatomy), memo)


def _floats(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    return (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
