"""A decoder layer called with other rows or tokens than the model gave it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..errors import UnsupportedModelError


@dataclass(eq=False)
class LayerCall:
    """A decoder layer's forward with everything given but the hidden states it is to take.

    hidden: those the model gave it; tuples: of how many it returned a tuple, 0 for none, known after a call; abreast: of how many
    rows the model's input is.
    """

    forward: Callable
    hidden: torch.Tensor
    by_name: bool
    args: tuple
    kwargs: dict
    tuples: int = 0
    abreast: int = 1

    @classmethod
    def of(cls, forward: Callable, args: tuple, kwargs: dict, abreast: int = 1) -> LayerCall:
        if "hidden_states" in kwargs:
            rest = {k: x for k, x in kwargs.items() if k != "hidden_states"}
            return cls(forward, kwargs["hidden_states"], True, args, rest, abreast=abreast)
        return cls(forward, args[0], False, args[1:], kwargs, abreast=abreast)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        # What has the shape of one row's hidden states, such as the embeddings, belongs to every row.
        one_row, several = (1, *hidden.shape[1:]), (self.abreast, hidden.shape[1])

        def of_rows(x: torch.Tensor) -> torch.Tensor:
            if x.shape == one_row:
                return x.expand_as(hidden)
            if self.abreast > 1 and x.shape[:2] == several:
                return x.repeat(len(hidden) // self.abreast, *(1,) * (x.dim() - 1))
            return x

        call = self._cut(of_rows)
        if self.by_name:
            out = self.forward(*call.args, hidden_states=hidden, **call.kwargs)
        else:
            out = self.forward(hidden, *call.args, **call.kwargs)
        if not isinstance(out, tuple):
            return out
        self.tuples = len(out)
        if any(isinstance(x, torch.Tensor) for x in out[1:]):
            raise UnsupportedModelError(
                "the model's layers hand on more than their hidden states to the next layer: it cannot be scanned"
            )
        return out[0]

    def result(self, hidden: torch.Tensor):
        """`hidden` in the form in which the layer returns it."""
        return (hidden, *(None,) * (self.tuples - 1)) if self.tuples else hidden

    def at(self, nodes: torch.Tensor, num_tokens: int) -> LayerCall:
        """The same call for the tokens `nodes` only: positions, rotary tables and the like are cut to them."""

        def cut(x: torch.Tensor) -> torch.Tensor:
            if x.dim() >= 2 and x.shape[1] == num_tokens:
                return x.index_select(1, nodes)
            if x.dim() >= 3 and x.shape[2] == num_tokens:
                return x.index_select(2, nodes)
            if x.dim() == 1 and x.shape[0] == num_tokens:
                return x.index_select(0, nodes)
            return x

        return self._cut(cut)

    def to(self, device: torch.device) -> LayerCall:
        """The same call on another device."""
        moved = self._cut(lambda x: x.to(device))
        moved.hidden = self.hidden.to(device)
        return moved

    def first(self, rows: int, of: int) -> LayerCall:
        """The same call for the first of the batch's rows only."""
        return self._cut(lambda x: x[:rows] if x.dim() >= 1 and x.shape[0] == of else x)

    def _cut(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> LayerCall:
        return LayerCall(
            self.forward, self.hidden, self.by_name, _each(cut, self.args), _each(cut, self.kwargs),
            abreast=self.abreast,
        )  # fmt: skip


def _each(cut: Callable[[torch.Tensor], torch.Tensor], value):
    """`value` with `cut` applied to every tensor in it. No inner function that calls itself: such a one is a cycle, and
    would keep what `cut` knows, hidden states of whole chunks, until the garbage collector comes."""
    if isinstance(value, torch.Tensor):
        return cut(value)
    if isinstance(value, dict):
        return {k: _each(cut, x) for k, x in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_each(cut, x) for x in value)
    return value


@contextlib.contextmanager
def forward_replaced(module: torch.nn.Module, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """`module.forward` replaced on this instance; a forward set on the instance before (offloading) is kept."""
    own = module.__dict__.get("forward")
    module.forward = make(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def no_queries(attention: torch.nn.Module) -> Iterator[None]:
    """An attention module that gives zeros for queries, where a plain linear layer of its own makes them: for calls
    that want its keys and values alone."""
    layer = getattr(attention, "q_proj", None)
    if (
        type(layer) is not torch.nn.Linear
        or "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
    ):
        yield
        return

    def make(_forward):
        return lambda hidden: hidden.new_zeros(*hidden.shape[:-1], layer.out_features)

    with forward_replaced(layer, make):
        yield
