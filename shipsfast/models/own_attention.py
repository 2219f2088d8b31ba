"""The attention function and mask function that a model was given, before shipsfast puts its own in their place.

Theirs must be transformers' own, whose arithmetic is known: eager, sdpa, flash, flex attention, by whatever name. What
somebody else has registered or patched does something else, or why would it be there; and it would be lost.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError

LIBRARY = os.path.dirname(transformers.__file__) + os.sep
TORCH = os.path.dirname(torch.__file__) + os.sep
EAGER = "eager_attention_forward"  # of each modeling file


def is_patched(function: Callable | None, beside: str = LIBRARY) -> bool:
    """Whether a function of a model family's module has been replaced, for all its models. Where its code lies tells:
    names are what functools.wraps copies. beside: a folder beside transformers where the family's code may lie."""
    file = _file(function)
    while file.startswith(TORCH) and hasattr(function, "__wrapped__"):  # torch.compiler.disable and the like
        function = function.__wrapped__
        file = _file(function)
    return not file.startswith((LIBRARY, beside))


def _file(function: Callable | None) -> str:
    return getattr(getattr(function, "__code__", None), "co_filename", "")


def check_own_attention(model: PreTrainedModel, modules: list[torch.nn.Module]) -> None:
    """Raises UnsupportedModelError where the attention of `modules` is not a function of transformers or of the model's own
    code, naming it and what to do."""
    for module in modules:
        config = getattr(module, "config", None) or model.config.get_text_config()
        name = getattr(config, "_attn_implementation", None) or "eager"
        foreign = _foreign(module, name)
        if foreign is None:
            continue
        others = [each for each in _choices(model, config) if each != name and _foreign(module, each) is None]
        remedy = (
            f"call model.set_attn_implementation({others[0]!r}) to go without it"
            if others
            else "put transformers' own back to go without it"
        )
        raise UnsupportedModelError(
            f"the attention of {type(model).__name__} is {name!r}, for which {foreign}: it is not transformers' own, and its "
            f"results would be lost where shipsfast puts its attention in its place; {remedy}"
        )


def _choices(model: PreTrainedModel, config) -> list[str]:
    """Implementations that work everywhere, first the one that is transformers' default."""
    capped = getattr(config, "attn_logit_softcapping", None)  # which sdpa leaves out
    return ["sdpa", "eager"] if getattr(model, "_supports_sdpa", False) and not capped else ["eager"]


def _foreign(module: torch.nn.Module, name: str) -> str | None:
    """What of an implementation is not transformers' own, in words; None if nothing is."""
    forward = inspect.unwrap(type(module).forward)
    scope, beside = forward.__globals__, os.path.dirname(_file(forward)) + os.sep
    plain = name.removeprefix("paged|")
    functions = scope.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = functions.get(name, functions.get(plain, scope.get(EAGER) if plain == "eager" else None))
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    # Code for eager attention need not be a function of its own, and an implementation need not have a mask function.
    for what, found in (
        ("attention function", function),
        ("mask function", masks.get(name, masks.get(plain))),
    ):
        if found is not None and is_patched(found, beside):
            where = (
                f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
            )
            return f"{where} is in force as its {what}"
    return None
