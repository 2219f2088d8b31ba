"""Finds out how a transformers model is built by running it once on a few tokens: its decoder layers, which
module of each calls attention, with how many heads, and what each layer's mask hides. No code per family.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, masking_utils

from .attention import TREE, Probe, ProbeCall, installed, probe
from .errors import InputError, UnsupportedModelError
from .weights import STREAM, check_weights, execution_device

PROBE_TOKENS = 3


@dataclass(frozen=True)
class Layer:
    name: str
    module: torch.nn.Module  # the decoder layer
    attention: torch.nn.Module  # the module in it that calls attention
    window: int | None  # sliding window in tokens, None if it hides nothing in the prompts at hand
    device: torch.device  # where it computes


@dataclass(frozen=True)
class Anatomy:
    layers: tuple[Layer, ...]
    num_heads: int
    num_kv_heads: int  # the fewest of any layer
    uniform_kv_heads: bool
    head_dim: int
    hidden_size: int
    vocab_size: int
    work_width: int  # numbers per token that a layer holds at a time, roughly: for the memory plan

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def input_device(model: PreTrainedModel) -> torch.device:
    return execution_device(model, model.get_input_embeddings())


def last_logits_only(model: PreTrainedModel) -> dict:
    """The argument that keeps a forward pass from computing logits nobody reads, where the model takes it."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def check_model(model, token_ids: list[list[int]], new_tokens: int = 0, weights: bool = True) -> None:
    """weights: it must have them. Raises InputError for an object that is no model, and for prompts that do not fit it with what follows them."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers causal language model, got {type(model).__name__}: "
            "load one with AutoModelForCausalLM.from_pretrained"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM"
        )
    if weights:
        check_weights(model)
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__} shares keys and values between layers: it cannot be scanned"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for i, ids in enumerate(token_ids):
        if context is not None and len(ids) > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the model's context is {context}: shorten or remove it"
            )
        if context is not None and len(ids) + new_tokens > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the model's context is {context}: that leaves no room for "
                f"{new_tokens} new tokens; shorten the prompt or lower max_new_tokens"
            )
        if not (0 <= min(ids) and max(ids) < vocabulary):
            raise InputError(f"prompt {i} has token ids outside the model's vocabulary of {vocabulary}")


def inspect_model(model: PreTrainedModel, token_ids: Sequence[int], longest: int) -> Anatomy:
    """Run the model once on the first few of `token_ids` and record what calls attention.

    longest: the longest prompt in tokens; masks are checked up to there. A streamed model's layers are found without
    their weights, where its family allows that: reading them takes as long as a pass of a scan.
    Raises UnsupportedModelError, naming what stands in the way, if the model cannot be scanned exactly.
    """
    if STREAM in getattr(model, "__dict__", {}):
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
            return _inspect_without_weights(model, token_ids, longest)
    return _inspect(model, token_ids, longest)


def _inspect_without_weights(model: PreTrainedModel, token_ids: Sequence[int], longest: int) -> Anatomy:
    """The same from a copy of the model on the meta device."""
    from .hollow import hollow

    copied = hollow(model.config, model.dtype)
    if type(copied) is not type(model):
        raise TypeError(f"{type(model).__name__} is not what its config says")
    names = {module: name for name, module in copied.named_modules()}
    anatomy = _inspect(copied, token_ids, longest)
    layers = []
    for layer in anatomy.layers:
        module, attention = (model.get_submodule(names[m]) for m in (layer.module, layer.attention))
        layers.append(Layer(layer.name, module, attention, layer.window, execution_device(model, module)))
    return replace(anatomy, layers=tuple(layers))


@torch.inference_mode()
def _inspect(model: PreTrainedModel, token_ids: Sequence[int], longest: int) -> Anatomy:
    family = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{family} is not a transformers model: load it with AutoModelForCausalLM"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{family} does not take position_ids, so prompts cannot be packed into one sequence"
        )
    _check_rope(model, longest)

    ran: list[tuple[str, torch.nn.Module]] = []
    handles = []
    recorder = Probe(longest)
    without = input_device(model).type == "meta"
    ids = torch.tensor([list(token_ids[:PROBE_TOKENS])], device=input_device(model))
    token = probe.set(recorder)
    try:
        for list_name, container in model.named_modules():
            if isinstance(container, torch.nn.ModuleList):
                for index, child in enumerate(container):
                    name = f"{list_name}.{index}"
                    handles.append(
                        child.register_forward_pre_hook(lambda m, _a, name=name: ran.append((name, m)))
                    )
        with installed(model, TREE), _no_values_asked() if without else contextlib.nullcontext():
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
            logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    finally:
        probe.reset(token)
        for handle in handles:
            handle.remove()
    if not recorder.calls:
        raise UnsupportedModelError(
            f"{family} has no attention heads that shipsfast can reach: its attention does not go through "
            "transformers' AttentionInterface"
        )
    layers = _layers(model, family, ran, recorder.calls)
    shapes = {(c.num_heads, c.num_kv_heads, c.head_dim) for c in recorder.calls}
    if len({s[0] for s in shapes}) > 1:
        raise UnsupportedModelError(f"{family} has layers with different numbers of heads: {sorted(shapes)}")
    first = recorder.calls[0]
    hidden = model.get_input_embeddings().weight.shape[1]
    return Anatomy(
        layers=layers,
        num_heads=first.num_heads,
        num_kv_heads=min(s[1] for s in shapes),
        uniform_kv_heads=len({s[1] for s in shapes}) == 1,
        head_dim=max(s[2] for s in shapes),
        hidden_size=hidden,
        vocab_size=logits.shape[-1],
        work_width=_work_width(layers[0].module, hidden),
    )


@contextlib.contextmanager
def _no_values_asked() -> Iterator[None]:
    """For a model without weights: transformers looks at positions to see whether sequences are packed, which it is
    not told of here, and a tensor on the meta device has no values."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _layers(model, family: str, ran, calls: list[ProbeCall]) -> tuple[Layer, ...]:
    names = {module: name for name, module in model.named_modules()}
    lists = {
        name.rsplit(".", 1)[0]
        for name, module in ran
        for c in calls
        if names[c.module].startswith(name + ".")
    }
    outermost = min(lists, key=len, default=None)
    if outermost is None:
        raise UnsupportedModelError(f"{family} does not keep its decoder layers in a ModuleList")
    layers = []
    for name, module in ran:
        if name.rsplit(".", 1)[0] != outermost:
            continue
        inside = [c for c in calls if names[c.module].startswith(name + ".") or c.module is module]
        if len(inside) != 1:
            raise UnsupportedModelError(
                f"{family} calls attention {len(inside)} times in {name}: only layers with exactly one softmax "
                "attention can be scanned"
            )
        device = execution_device(model, module)
        layers.append(Layer(name, module, inside[0].module, inside[0].window, device))
    if len(layers) != len(calls) or len({id(x.module) for x in layers}) != len(layers):
        raise UnsupportedModelError(
            f"{family} calls attention outside {outermost}, or runs a layer more than once"
        )
    return tuple(layers)


def _check_rope(model: PreTrainedModel, longest: int) -> None:
    """Rotary embeddings that change with the sequence's length would change when prompts are packed."""
    for config in {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }.values():
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
            kind = part.get("rope_type", part.get("type"))
            limit = part.get("original_max_position_embeddings") or getattr(
                config, "max_position_embeddings", longest
            )
            if kind in ("dynamic", "longrope") and longest > limit:
                raise UnsupportedModelError(
                    f"{type(model).__name__} changes its rotary embedding ({kind}) for prompts of over {limit} tokens, "
                    f"and the longest has {longest}: scan shorter prompts"
                )


def _work_width(layer: torch.nn.Module, hidden: int) -> int:
    wide = sum(m.out_features for m in layer.modules() if isinstance(m, torch.nn.Linear))
    if not wide:  # Conv1D and other layouts: what a weight matrix has beyond the hidden size is its output
        wide = sum(max(p.shape) for p in layer.parameters() if p.dim() == 2)
    return wide + 8 * hidden
