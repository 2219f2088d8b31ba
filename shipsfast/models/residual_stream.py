"""The residual stream between decoder layers, read by forward hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from .decoder_layers import Block

Take = Callable[[int, torch.Tensor], None]


class Left(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


@contextlib.contextmanager
def leaving(blocks: Sequence[Block], take: Take, after: Collection[int] | None = None) -> Iterator[None]:
    """take(layer, hidden [B, T, hidden]) sees what leaves each decoder layer, or those in `after`, counted as the model counts
    them. It may raise Left.

    What other hooks on a layer add to its output is in it.
    """
    with contextlib.ExitStack() as undo:
        for index in range(len(blocks)) if after is None else sorted(after):
            block = blocks[index]
            hook = functools.partial(_show, take, index)
            undo.callback(block.module.register_forward_hook(hook).remove)
        yield


def _show(take: Take, index: int, _module, _args, out) -> None:
    take(index, out[0] if isinstance(out, tuple) else out)
