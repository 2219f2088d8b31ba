"""A model's decoder layers, by what ran and what called attention, and those whose attention is out of reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from ..errors import UnsupportedModelError
from .probing import ProbeCall
from .weights import execution_device


@dataclass(frozen=True)
class Layer:
    name: str
    module: torch.nn.Module  # the decoder layer
    attention: torch.nn.Module  # the module in it that calls attention
    window: int | None  # sliding window in tokens, None if it hides nothing in the prompts at hand
    device: torch.device  # where it computes

    @property
    def attention_path(self) -> str:
        """Of the attention module, in the layer."""
        return next(name for name, module in self.module.named_modules() if module is self.attention)


@dataclass(frozen=True)
class Block:
    """A decoder layer of any kind. layer: its place among those that have attention heads, None if it has none."""

    module: torch.nn.Module
    layer: int | None
    device: torch.device  # where it computes


def decoder_layers(
    model, ran: list[tuple[str, torch.nn.Module]], calls: list[ProbeCall]
) -> tuple[tuple[Layer, ...], tuple[Block, ...]]:
    """The layers that have attention heads, and all.

    ran: what ran of every ModuleList, with its name, in order. Raises UnsupportedModelError for a model whose layers cannot
    be told, or one of whose layers has heads that are out of reach.
    """
    family = type(model).__name__
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
    layers, blocks, without = [], [], []
    for name, module in ran:
        if name.rsplit(".", 1)[0] != outermost:
            continue
        inside = [c for c in calls if names[c.module].startswith(name + ".") or c.module is module]
        if not inside:
            without.append((name, module))
            blocks.append(Block(module, None, execution_device(model, module)))
            continue
        if len(inside) != 1:
            raise UnsupportedModelError(
                f"{family} calls attention {len(inside)} times in {name}: only layers with exactly one softmax "
                "attention can be scanned"
            )
        device = execution_device(model, module)
        blocks.append(Block(module, len(layers), device))
        layers.append(Layer(name, module, inside[0].module, inside[0].window, device))
    if len(layers) != len(calls) or len({id(x.module) for x in blocks}) != len(blocks):
        raise UnsupportedModelError(
            f"{family} calls attention outside {outermost}, or runs a layer more than once"
        )
    last = max(int(layer.name.rsplit(".", 1)[1]) for layer in layers)
    started = {name for name, _ in ran}
    for index, module in enumerate(model.get_submodule(outermost)):
        name = f"{outermost}.{index}"
        if index < last and name not in started and type(module) in {type(layer.module) for layer in layers}:
            _out_of_reach(family, name, name, "does not run, and")
    for name, module in without:
        _check_has_no_heads(family, name, module, layers)
    return tuple(layers), tuple(blocks)


def _check_has_no_heads(family: str, name: str, block: torch.nn.Module, layers: list[Layer]) -> None:
    """Raises UnsupportedModelError if a layer that made no call of attention looks as if it should have: it holds an
    attention module like the others', or something that is not of the model's family stands in its place."""
    own = {type(_bare(layer.module)).__module__ for layer in layers}
    classes = {type(layer.attention) for layer in layers}
    for inner, module in block.named_modules():
        if type(module) in classes:
            _out_of_reach(family, name, f"{name}.{inner}" if inner else name)
    places = {""} | {layer.attention_path for layer in layers if type(layer.module) is type(block)}
    for inner, module in block.named_modules():
        if inner in places and not _of_family(type(_bare(module)), own):
            what = f"is {type(module).__name__}, which is no part of the model's own code, and"
            _out_of_reach(family, name, f"{name}.{inner}" if inner else name, what)


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile or PEFT wrapped."""
    for name in ("_orig_mod", "base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def _of_family(kind: type, own: set[str]) -> bool:
    """Whether a class comes from transformers, or from a file beside those of the model's layers."""
    packages = {module.rpartition(".")[0] or module for module in own}
    here = kind.__module__
    return here.startswith("transformers.") or here in own or here.rpartition(".")[0] in packages


def _out_of_reach(family: str, layer: str, module: str, what: str = "") -> NoReturn:
    raise UnsupportedModelError(
        f"{family}: {module} {what + ' ' if what else ''}makes no call of transformers' attention, unlike other layers, so the "
        f"heads of {layer} are out of reach, and layers behind it would be counted wrongly: take off what replaces it (a "
        "forward of its own, another module), or have it call the attention function of transformers' AttentionInterface"
    )
