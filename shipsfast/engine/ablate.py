"""The model driven by anyone, with heads switched off: the `ablate` context manager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from ..memory import is_out_of_memory
from ..models.ambient import set_aside, without_autocast
from ..models.anatomy import MODEL_ERRORS, Anatomy, inspect_model
from ..models.attention_hook import ATTRIBUTE, DENSE, DenseCall, installed
from ..models.forward import alarm, plain_pass, rounded_to, softcap_left_out
from ..models.int8_products import check_int8_products
from ..models.own_attention import check_own_attention
from ..models.wrappers import base_model, check_one_device
from ..ops.divergences import kl_rows
from ..prompts.wrapping import DATE, TemplateArgs, Wrapping
from .ablation import DEFAULT_SCALE, SOURCED, Ablation, as_ablation
from .head_mask import HeadMask
from .heads import check_heads, check_unit, unit_heads

FEW = 16  # tokens of `check_own_forward`


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
    output_attentions=True gives the weights of the ablated model, whatever attention it was loaded with; where an ablation
    replaces or scales outputs, those that the heads had before.

    Args:
        heads: (layer, head) pairs, from 0; (layer, None) for a whole layer; may be empty.
        ablation, scale: as in `scan`. `mean` and `resample` need an `Ablation` with prompts (token-id lists, or
            strings with a `tokenizer` and the `template` and the like around them, as in `scan`). `resample` then runs forward passes of exactly the length of its one
            prompt, without a cache, and refuses others: a decode step has no counterpart.
        unit: "head", or "kv_group" for (layer, key/value head) pairs with all query heads that share it.
    Raises:
        InputError: a head that does not exist, an unknown ablation.
        UnsupportedModelError: a model whose attention cannot be reached, or is not transformers' own.
    """
    how = as_ablation(ablation, scale)
    if how.at != "all":
        raise InputError(
            f"ablation {how.describe()}: inside ablate a head is off at every position; only scans of the next token take at='end'"
        )
    wrapping = Wrapping(template, system, prefix, TemplateArgs(template_args), template_date)
    with contextlib.ExitStack() as off:
        with set_aside(), without_autocast():
            check_one_device(model)
            model = base_model(model)
            anatomy = inspect_model(model, [0], 1)
            if not is_ablated(anatomy):  # else the outer one has looked
                check_own_forward(model, anatomy)
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
            setattr(layer.attention, ATTRIBUTE, DenseCall(here, mask.ablation.at == "end"))
        yield


def is_ablated(anatomy: Anatomy) -> bool:
    """Whether the model is inside `ablate`."""
    return any(ATTRIBUTE in layer.attention.__dict__ for layer in anatomy.layers)


@torch.inference_mode()
def check_own_forward(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Hold the model with shipsfast's attention in place, and no head off, against its own forward pass over a few tokens.

    Made anew in every call: what a model does may have changed since the last. Raises UnsupportedModelError for an attention
    function that is not transformers' own, and where the two are not the same model.
    """
    check_int8_products(model)
    check_own_attention(model, [layer.attention for layer in anatomy.layers])
    ids = _few_tokens(model)
    try:
        plain = plain_pass(model, [ids])[0]
    except (*MODEL_ERRORS, ImportError) as error:
        if is_out_of_memory(error):
            raise
        return  # known attention that runs elsewhere only (paged, flash): there is nothing it could have lost here
    with dense_rows(model, anatomy, HeadMask(((),), Ablation())):
        ours = plain_pass(model, [ids])[0].to(plain.device)
    # What is no number is refused where it is used; -inf are tokens that the model rules out.
    readable = (torch.isfinite(plain) | (plain == -torch.inf)).all(-1).nonzero().flatten()
    if not len(readable):
        return
    nats = kl_rows(plain[readable], ours[readable], torch.arange(len(readable), device=plain.device))
    # In half precision a router may send single tokens elsewhere.
    nats = float(nats.median() if rounded_to(model).itemsize < 4 else nats.max())
    if nats <= alarm(model)[0]:
        return
    capped = softcap_left_out(model)
    raise UnsupportedModelError(
        (capped and f"{capped} (KL {nats:.3g} nats)")
        or f"{type(model).__name__} gives other answers with shipsfast's attention in place of its own and no head off (KL "
        f"{nats:.3g} nats): something patched or hooked beside its attention function would be lost; take it off, or load the "
        "model anew with transformers' attn_implementation='eager'"
    )


def _few_tokens(model: PreTrainedModel) -> list[int]:
    """Different ones, so that it matters where attention looks, without those that stand for pictures and the like."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    special = {x for c in configs for name, x in vars(c).items() if name.endswith(("_token_id", "_token_index"))
               and isinstance(x, int)}  # fmt: skip
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or FEW
    vocabulary = model.get_input_embeddings().weight.shape[0]
    spread = [int(x) for x in torch.linspace(0, vocabulary - 1, 4 * FEW, dtype=torch.float64)]
    ids = [x for x in dict.fromkeys(spread) if x not in special] or spread
    return ids[:: max(1, len(ids) // FEW)][: min(FEW, context if context > 0 else FEW)]
