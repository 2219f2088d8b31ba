"""Numbers that are none: in which layer NaN or infinity first appears, in which head, and why.

Scans look only at what they read anyway, final logits and scores. When one is not finite, `first_bad` runs one plain
forward pass of that prompt with the same heads off and looks at every module's output, so that a run without such
numbers pays nothing. An ablation may overflow what the model itself keeps small; an unablated model that does is
refused whatever the options say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import InputError
from ..models.anatomy import Anatomy
from ..models.forward import plain_pass
from ..models.weights import value_of
from .ablate import dense_rows
from .head_mask import HeadMask


@dataclass(frozen=True)
class Place:
    """Where a number that is none first appears. layer, head: None where it is in no layer, or in no single head."""

    what: str  # NaN or infinity
    module: str  # its name in the model, or of its parameter
    layer: int | None
    head: int | None
    in_weights: bool
    dtype: str

    def __str__(self) -> str:
        where = "outside the layers" if self.layer is None else f"in layer {self.layer}"
        head = "" if self.head is None else f", head {self.head}"
        why = (
            "in the weights as they were loaded"
            if self.in_weights
            else f"where numbers overflow {self.dtype}"
        )
        return f"{self.what} first appears {where}{head} ({self.module}), {why}"

    def to_json(self) -> dict:
        return {
            "what": self.what, "layer": self.layer, "head": self.head, "module": self.module,
            "cause": "weights" if self.in_weights else "overflow",
        }  # fmt: skip


def bad_logits(logits: torch.Tensor) -> torch.Tensor:
    """bool [...]: rows of logits [..., V] that are no distribution: with NaN or +inf, or nothing but -inf. Single -inf are
    tokens that a model rules out."""
    return ~torch.isfinite(logits.amax(-1))  # the largest is NaN if one is


def first_bad(model, anatomy: Anatomy, ids: Sequence[int], mask: HeadMask) -> Place | None:
    """The first place, in the order in which the model computes, of the first row of `mask` on one prompt.

    None where a plain forward pass has finite numbers everywhere.
    """
    seen: list[Place] = []  # at most one
    dtype = str(model.dtype).removeprefix("torch.")
    with dense_rows(model, anatomy, mask), _watched(model, anatomy, seen, dtype):
        plain_pass(model, [ids] * len(mask))
    return seen[0] if seen else None


@contextlib.contextmanager
def _watched(model, anatomy: Anatomy, seen: list[Place], dtype: str) -> Iterator[None]:
    """Append the first module whose input or output is not finite in row 0: the weights are to blame if its own are not
    finite, which are looked at while they are there."""
    layer_of = {name: i for i, layer in enumerate(anatomy.layers) for name in _names(model, layer.module)}
    heads_in = {id(m) for layer in anatomy.layers for m in layer.attention.modules() if not _children(m)}
    width = anatomy.num_heads * anatomy.head_dim
    output = model.get_output_embeddings()
    gives_logits = set() if output is None else set(map(id, output.modules()))

    def place(name: str, tensor: torch.Tensor, head: int | None, of_logits: bool = False) -> Place:
        layer = layer_of.get(name)
        found = _bad_weight(model, anatomy, name, layer, of_logits)
        if found is not None:
            return found
        what = "NaN" if torch.isnan(tensor).any() else "infinity"
        return Place(what, name, layer, head, False, dtype)

    def before(name: str, module, args) -> None:
        """What attention hands to its output projection: its functions are no modules."""
        if seen or id(module) not in heads_in or not args or not _is_real(args[0]):
            return
        tensor = args[0][:1]
        if tensor.shape[-1] == width and not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(0, -2).any(0).nonzero()[:, 0] // anatomy.head_dim
            heads = bad.unique().tolist()
            attention = name.rpartition(".")[0] or name
            seen.append(place(attention, tensor, heads[0] if len(heads) == 1 else None))

    def after(name: str, module, _args, out) -> None:
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if seen or not _is_real(tensor):
                continue
            of_logits = id(module) in gives_logits
            bad = bad_logits(tensor[:1]) if of_logits else ~torch.isfinite(tensor[:1])
            if bad.any():
                seen.append(place(name, tensor[:1], None, of_logits))

    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            if not _children(module):
                undo.enter_context(module.register_forward_pre_hook(partial(before, name)))
            # The modules around others too: what they compute themselves, with weights of their own, is in no other.
            undo.enter_context(module.register_forward_hook(partial(after, name)))
        yield


def _children(module: torch.nn.Module) -> bool:
    return next(module.children(), None) is not None


def _names(model, inside: torch.nn.Module) -> list[str]:
    members = set(map(id, inside.modules()))
    return [name for name, module in model.named_modules() if id(module) in members]


def _is_real(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 0


def _bad_weight(
    model, anatomy: Anatomy, module: str, layer: int | None, of_logits: bool = False
) -> Place | None:
    """The first parameter of a module, or else of those around it, that is not finite.

    of_logits: -inf in a bias is a token that the model rules out.
    """
    parts = module.split(".")
    for owner in (".".join(parts[:n]) for n in range(len(parts), -1, -1)):
        for key, parameter in model.get_submodule(owner).named_parameters(recurse=False):
            name = f"{owner}.{key}" if owner else key
            if not parameter.is_floating_point():
                continue
            value = parameter.detach()
            if value.is_meta:  # brought in for its own module only
                try:
                    value = value_of(model, name)
                except InputError:
                    continue
            value = value.float() if value.element_size() == 1 else value  # float8 has no isfinite
            bad = ~torch.isfinite(value)
            if of_logits and value.dim() == 1:
                bad &= value != -torch.inf
            if bad.any():
                what = "NaN" if torch.isnan(value).any() else "infinity"
                head = _head_of(name, bad, anatomy)
                return Place(what, name, layer, head, True, str(value.dtype))
    return None


def _head_of(name: str, bad: torch.Tensor, anatomy: Anatomy) -> int | None:
    """The query head whose weights they are, where the projection of one head can be told by its name."""
    width, flat = anatomy.num_heads * anatomy.head_dim, None
    if ".q_proj." in name and bad.shape[0] == width:
        flat = bad.reshape(width, -1).any(1)
    elif ".o_proj.weight" in name and bad.dim() == 2 and bad.shape[1] == width:
        flat = bad.any(0)
    if flat is None:
        return None
    heads = (flat.nonzero()[:, 0] // anatomy.head_dim).unique().tolist()
    return heads[0] if len(heads) == 1 else None
