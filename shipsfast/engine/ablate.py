"""The model driven by anyone, with heads switched off: the `ablate` context manager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from transformers import PreTrainedModel

from ..models.ambient import set_aside, without_autocast
from ..models.anatomy import Anatomy, base_model, inspect_model
from ..models.attention_hook import ATTRIBUTE, DENSE, DenseCall, installed
from ..prompts.wrapping import DATE, TemplateArgs, Wrapping
from .ablation import DEFAULT_SCALE, SOURCED, Ablation, as_ablation
from .head_mask import HeadMask
from .heads import check_heads, check_unit, unit_heads


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
    system: str | None = None,
    prefix: str = "",
    template_args: Mapping | None = None,
    template_date: str = DATE,
) -> Iterator[None]:
    """Context manager in which `model` runs with these heads switched off, in every forward pass by anyone.

    model(...), model.generate(...) and any library that drives the model see the ablation, in prefill and in
    every decode step; uniform attention is over visible tokens only. May be nested: then the heads of both are
    off. The model is put back on leaving, also after an exception; inside, it is in evaluation mode. What runs inside is the
    caller's: torch.autocast, the precision of matrix products and torch.compile act on it as on any call of the model.

    Args:
        heads: (layer, head) pairs, from 0; (layer, None) for a whole layer; may be empty.
        ablation, scale: as in `scan`. `mean` and `resample` need an `Ablation` with prompts (token-id lists, or
            strings with a `tokenizer` and the `template` and the like around them, as in `scan`). `resample` then runs forward passes of exactly the length of its one
            prompt, without a cache, and refuses others: a decode step has no counterpart.
        unit: "head", or "kv_group" for (layer, key/value head) pairs with all query heads that share it.
    Raises:
        InputError: a head that does not exist, an unknown ablation.
        UnsupportedModelError: a model whose attention cannot be reached.
    """
    how = as_ablation(ablation, scale)
    wrapping = Wrapping(template, system, prefix, TemplateArgs(template_args), template_date)
    with contextlib.ExitStack() as off:
        with set_aside(), without_autocast():
            model = base_model(model)
            anatomy = inspect_model(model, [0], 1)
            heads = list(heads) if isinstance(heads, Iterable) else heads
            chosen = check_heads(heads, anatomy.num_layers, check_unit(unit, anatomy), unit) if heads else []
            group = tuple(head for each in chosen for head in unit_heads(each, unit, anatomy))
            values = None
            if how.kind in SOURCED and group:
                from .replacement_values import values_for_ablate  # it runs the model, and imports this file

                values = values_for_ablate(model, anatomy, how, tokenizer, wrapping)
            off.enter_context(dense_rows(model, anatomy, HeadMask((group,), how, values)))
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
            if outer is None:
                undo.callback(delattr, layer.attention, ATTRIBUTE)
            else:
                here = here.over(outer.mask)
                undo.callback(setattr, layer.attention, ATTRIBUTE, outer)
            setattr(layer.attention, ATTRIBUTE, DenseCall(here))
        yield
