"""A growing batch of ablations at the end only (growing_batch.py): rows as wide as there are reads.

A head that is off at the token that is read, and nowhere else, changes nothing but that token. The unablated row passes all layers
by itself, and each token of a row stands at the node that it is read at: it sees the unablated row's keys and values above the
node, and its own there (ops/end_attention.py). Reads do not see each other, also where one is above another.

That takes layers which mix tokens in attention alone. Others (`Anatomy.ends_alone`) keep rows of the whole sequence, in which
the mask is for the one token that is read.
"""

from __future__ import annotations

import torch

from ..errors import UnsupportedModelError
from ..models.attention_hook import ATTRIBUTE, EndCall
from ..models.layer_call import LayerCall
from ..ops.end_attention import end_attention
from ..ops.tree_attention import tree_attention
from .growing_batch import GrowingBatch
from .head_mask import HeadMask
from .memory_plan import even_slices


class EndsBatch(GrowingBatch):
    """The same calls as those of `GrowingBatch`."""

    # The unablated row, [1, T, hidden], as the model was given it last.
    _base: torch.Tensor | None = None

    def run(self, mask: HeadMask, *args, **how) -> None:
        try:
            super().run(mask, *args, **how)
        finally:
            self._base = None

    def _width(self) -> int:
        return len(self.last_nodes)

    def _at_reads(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._buffer[rows]

    def _pass(self, index: int, call: LayerCall, last: bool) -> torch.Tensor:
        """The unablated row through a layer, and the rows, which are at the tree's ends alone. Returns what goes to the next."""
        hidden, nodes = call.hidden, self._last_nodes(call.hidden.device)
        same = self._base is None or hidden is self._base or hidden.device != self._base.device
        if not same and not torch.equal(hidden, self._base):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}, or a hook on its layers, changes hidden states between two layers: ablation at='end' "
                "(--at end) is not supported with that; take the hook off, or leave at='end' out"
            )
        # The first layer of the model, or of a device.
        if self._base is None or self._base.device != hidden.device:
            self._fork_ends(hidden.index_select(1, nodes))
        if self._fused:
            self._base = self._fused_ends(index, hidden, last, *call.kwargs["position_embeddings"])
            return self._base
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        if last:
            self._base = hidden
            kept.append(self._keys_values(index, call, hidden))
        else:
            keep = lambda k, v: kept.append((k, v))
            self._base = self._through(index, call, hidden, self._untouched(hidden), keep=keep)
        n = self._fork(index, self._buffer[: self._alive])
        ends, layer = call.at(nodes, self.packed.num_tokens), self.anatomy.layers[index]
        for rows in even_slices(n, self.rows_per_chunk):
            x = self._buffer[rows]
            mask = self._layer_mask(index, x, rows, nodes)
            setattr(layer.attention, ATTRIBUTE, EndCall(self._tree(x.device), layer.window, mask, kept[0]))
            self._buffer[rows] = ends(x)
            self.tick(rows.stop - rows.start)
        self._tuples = call.tuples = ends.tuples
        return self._base

    def _fork_ends(self, ends: torch.Tensor) -> None:
        """Begin with row 0 at the ends [1, U, hidden], or move the rows to the device of `ends`."""
        if self._buffer is None:
            dtype = self._residual_dtype or ends.dtype
            self._buffer = torch.empty(len(self._mask), *ends.shape[1:], dtype=dtype, device=ends.device)
            self._buffer[:1] = ends
        self._buffer = self._final = self._buffer.to(ends.device)

    def _fused_ends(
        self, index: int, hidden: torch.Tensor, last: bool, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """`_pass` by fused_layer.py."""
        layer, window, tree = self._fused[index], self.anatomy.layers[index].window, self._tree(hidden.device)
        how = {"scaling": layer.scaling, "softcap": layer.softcap, "window": window}
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def of_base(q, k, v, mask, _trimmed):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            kept.append((k, v))
            return tree_attention(tree, q, k, v, mask, tree.plan(window, False, q), **how)

        base, flat = hidden, (cos[0].contiguous(), sin[0].contiguous())
        if last:
            kept.append(tuple(x.transpose(1, 2) for x in layer.keys_values(hidden, *flat)))
        else:
            base = hidden.to(self._residual_dtype or hidden.dtype, copy=True)
            layer.rows(base, *flat, of_base, self._untouched(base))

        def of_ends(q, k, v, mask, _trimmed):
            return end_attention(tree, kept[0], *(x.transpose(1, 2) for x in (q, k, v)), mask, **how)

        nodes = self._last_nodes(hidden.device)
        self._fused_rows(index, self._buffer[:1], of_ends, *(x.index_select(0, nodes) for x in flat), nodes)
        return base
