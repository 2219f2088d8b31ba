"""The transformers model inside of what others wrap around one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError

# Their forward is that of the model inside, which is whole.
_COPIES = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
INSIDE = ("module", "model", "_orig_mod", "base_model")  # where wrappers of any library keep it


def base_model(model):
    """The transformers model inside a PEFT wrapper, whose adapter acts in its modules, of torch.compile, DataParallel or
    DistributedDataParallel, in any order; any other model as it is.

    Raises UnsupportedModelError for an adapter that acts outside them (prompt learning), and for a model that is not
    whole in this process; InputError for another wrapper, naming the attribute that holds the model.
    """
    inner = _unwrapped(model)
    while inner is not model:
        model, inner = inner, _unwrapped(inner)
    _check_whole(model)
    if isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel):
        for name in INSIDE:
            if isinstance(getattr(model, name, None), PreTrainedModel):
                raise InputError(
                    f"expected a transformers causal language model, got {type(model).__name__}, which has one inside: pass "
                    f"its .{name}"
                )
    return model


def _unwrapped(model):
    """One wrapper less, or the model itself."""
    if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        return model._orig_mod
    if isinstance(model, _COPIES):
        return model.module
    if not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model
    learned = [
        name for name, config in model.peft_config.items() if getattr(config, "is_prompt_learning", False)
    ]
    if learned:
        raise UnsupportedModelError(
            f"adapter {learned[0]!r} puts learned tokens before the prompt, which is not a part of the model's layers: "
            "only adapters inside the layers, such as LoRA, can be scanned"
        )
    return model.get_base_model()


def check_one_device(model) -> None:
    """For a call that leaves the model to its caller. Raises InputError for a wrapper that copies the model to other devices
    in every call."""
    while isinstance(model, torch.nn.Module):
        if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
            raise InputError(
                f"DataParallel copies the model to {len(model.device_ids)} devices in every call, and heads are switched off on "
                "one: use its .module inside shipsfast.ablate"
            )
        inner = _unwrapped(model)
        if inner is model:
            return
        model = inner


def _check_whole(model) -> None:
    """Raises UnsupportedModelError where a process holds a part of each weight: heads would be counted among its own."""
    if not isinstance(model, torch.nn.Module):
        return
    for name, module in model.named_modules():
        # By their names: not every build of torch has them to import, and they are slow to.
        kinds = [type(module), *(type(p) for p in module._parameters.values() if p is not None)]
        if any(c.__name__ in ("FullyShardedDataParallel", "DTensor") for kind in kinds for c in kind.__mro__):
            where = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise UnsupportedModelError(
                f"the weights of {where} are spread over processes (FSDP, tensor parallelism), and a scan wants whole "
                "layers: save the full weights, and load them in one process with from_pretrained (device_map='auto' for "
                "several devices)"
            )
