"""The residual stream after each decoder layer, by forward hooks and one prompt per pass: what directions, projections and
probes are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from tests.support import family_oracle


def decoder_layers(model) -> torch.nn.ModuleList:
    """Of a tiny model: its outermost list of modules."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    return lists[min(lists, key=lambda name: (name.count("."), name))]


@torch.no_grad()
def streams(model, ids: Sequence[int], heads: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """float64 [decoder layers, T, hidden] with these heads off, (attention call, head) pairs."""
    found: list[torch.Tensor] = []

    def hook(_module, _args, out):
        found.append((out[0] if isinstance(out, tuple) else out)[0].double())

    with contextlib.ExitStack() as undo:
        for layer in decoder_layers(model):
            undo.callback(layer.register_forward_hook(hook).remove)
        family_oracle.next_log_probs(model, ids, heads)
    return torch.stack(found)
