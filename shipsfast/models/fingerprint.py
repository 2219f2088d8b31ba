"""What tells models and prompts apart in run folders, without keeping them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator

import torch

from .weights import value_of

# Keys of a config.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
SAMPLES = 4096  # numbers of each tensor that enter the fingerprint


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the model: its config, and names, shapes, types and evenly spaced samples of every tensor.

    The same wherever the weights are, so that a run continues on a machine with more or less memory.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update("".join(_adapters(model)).encode())
    named = sorted(_named_tensors(model))
    for name, tensor in (part for each in named for part in _plain_parts(*each)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() == 0:
            continue
        if tensor.is_meta:  # streamed or offloaded
            tensor = value_of(model, name)
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _adapters(model: torch.nn.Module) -> Iterator[str]:
    """What PEFT's layers keep beside tensors: by how much an adapter counts, and whether it is in force."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    if layers is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, layers.BaseTunerLayer):
            scaling = sorted(getattr(module, "scaling", {}).items())
            in_force = [] if module.disable_adapters else list(module.active_adapters)
            yield f"{name} {scaling} {in_force} {module.merged_adapters}"


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is in a state dict, tied weights under each of their names, without making one: bitsandbytes' 4-bit layers
    repack their weights for that, and give other answers afterwards on some processors."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        kept = {k: x for k, x in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | kept).items():
            if tensor is not None:
                yield prefix + key, tensor


def _plain_parts(name: str, tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the tensors that a quantised one is made of, with their names."""
    if not isinstance(tensor, torch.Tensor):
        return
    data = tensor.data
    if type(data) is not torch.Tensor and hasattr(data, "__tensor_flatten__"):
        for inner in data.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{name}.{inner}", getattr(data, inner))
    else:
        yield name, tensor
