"""The growing batch: every ablation of a set of prompts in one forward pass of the model's own modules.

A head ablated in layer l changes nothing below l. So one unablated row enters the model; at layer l the
rows whose first ablated head is in l fork off as copies of row 0; all rows alive then pass the layer in
chunks, each row with its own mask vectors. The prompts are one packed prefix tree (ops/prefix_tree.py), so a row
is one sequence; where a model looks at neighbours outside attention, a row is several sequences side by side, which the
model gets as rows of its batch. The last layer computes keys and values of every token, but queries, output projection
and MLP only where the tree is read: where a prompt ends, or at the tokens that were asked for. Its rows then go through
the model's own final norm and head in chunks, and each chunk's logits are handed out at once: nothing of size [rows, V] is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Self

import numpy as np
import torch

from ..models.anatomy import Block
from ..models.attention_hook import ATTRIBUTE, TREE, Captured, TreeCall, installed
from ..models.forward import input_device, last_logits_only
from ..models.layer_call import LayerCall, forward_replaced, no_queries
from ..models.output_head import float32_head, head_input
from ..models.residual_stream import Left, leaving
from ..models.weights import on_demand
from ..ops.masks import LayerMask
from ..ops.prefix_tree import PackedPrompts
from ..ops.tree_attention import TreeContext, tree_attention
from .fused_layer import FusedLayer
from .head_mask import HeadMask
from .memory_plan import LEAST_ABREAST, Plan, even_slices
from .subject import Subject

Consume = Callable[[slice, torch.Tensor, torch.Tensor], None]
Keep = Callable[[int, slice, torch.Tensor, torch.Tensor], None]
See = Callable[[int, slice, torch.Tensor], None]


class GrowingBatch:
    """Runs blocks of ablations of one packed set of prompts.

    Args:
        subject: the model, what `inspect_model` said of it, and how it runs: backend, layers.
        packed: P prompts, T tokens.
        plan: of which chunk_tokens, the most tokens (rows x T) that pass a layer together, though at least one row does, and
            head_rows, the most (row, prompt) pairs that pass the model's head together, count here.
        tick: called with the number of (row, layer) steps done, for progress.
        keep: called in every layer as keep(layer, rows, k, v) with keys and values [n, HKV, T, D] of consecutive
            slices of rows, row 0's first. Rows that fork in a layer or later may come with none: theirs are row 0's.
        own_head: leave the output head as the model has it, half-precision logits included.
        after: decoder layers, counted as the model's, whose rows' hidden states are handed out.
        logits: whether they are wanted as well; else the pass ends behind the highest of `after`.
    Use as a context manager: the model is changed inside it and put back by it.
    """

    def __init__(
        self,
        subject: Subject,
        packed: PackedPrompts,
        plan: Plan,
        *,
        tick: Callable[[int], None] | None = None,
        keep: Keep | None = None,
        own_head: bool = False,
        after: Collection[int] = (),
        logits: bool = True,
    ) -> None:
        self.model, self.anatomy, self.packed = subject.model, subject.anatomy, packed
        # Prompts that are read at the same node are the same up to there.
        self.last_nodes, self.prompt_place = np.unique(packed.read_index, return_inverse=True)
        # Rows of the whole sequence, with a mask for the tokens that are read.
        self._only_ends = subject.at_end and not subject.ends_alone
        self._abreast = packed.abreast
        self.rows_per_chunk = max(1, plan.chunk_tokens // self._width())
        self._tree_of = packed.first_sequence() if packed.abreast > 1 and not subject.fused else packed
        self.rows_per_head_chunk = max(1, plan.head_rows // len(self.last_nodes))
        self.tick = tick or (lambda steps: None)
        self.keep = keep
        self.own_head = own_head
        self._after, self._logits = after, logits
        self._top = len(self.anatomy.blocks) - 1 if logits else max(after)  # the last decoder layer that runs
        self._see: See | None = None
        self._head_rows = slice(0)  # those of _head_chunk
        self._residual_dtype = torch.float32 if subject.fp32_residual else None
        self._backend = subject.backend
        self._trees: dict[torch.device, TreeContext] = {}
        self._nodes: dict[torch.device, torch.Tensor] = {}  # last_nodes, int64
        self._mask: HeadMask | None = None
        self._tuples = 0  # of how many the decoder layer returns a tuple
        self._forks: list[int] = []
        self._alive = 0
        self._buffer: torch.Tensor | None = None  # [rows, width, hidden]
        self._final: torch.Tensor | None = None  # [rows, last nodes, hidden]
        self._head_chunk: torch.Tensor | None = None  # while the head runs: what the last layer hands on
        self._undo = contextlib.ExitStack()
        self._fused = [
            FusedLayer(layer.module, self.anatomy.num_heads, self.anatomy.num_kv_heads, self._backend)
            for layer in self.anatomy.layers * subject.fused
        ]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(torch.inference_mode())
            undo.enter_context(installed(self.model, TREE))
            modules = [block.module for block in self.anatomy.blocks]
            self._weights = undo.enter_context(on_demand(self.model, modules))
            for layer in self.anatomy.layers:
                undo.callback(layer.attention.__dict__.pop, ATTRIBUTE, None)
            for number, block in enumerate(self.anatomy.blocks[: self._top + 1]):
                final = number == self._top
                undo.enter_context(
                    forward_replaced(
                        block.module, lambda fwd, block=block, final=final: self._layer(block, fwd, final)
                    )
                )
            undo.enter_context(leaving(self.anatomy.blocks, self._leaves, self._after))
            if self._logits and not self.own_head:
                undo.enter_context(float32_head(self.model))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self._buffer = self._final = self._head_chunk = None
        self._undo.close()

    def run(
        self,
        mask: HeadMask,
        consume: Consume | None = None,
        *,
        hidden_states: bool = False,
        see: See | None = None,
    ) -> None:
        """Run the rows of `mask` and hand out their next-token logits.

        mask: row 0 may have any heads ablated; the others follow in ascending order of the first layer in
            which they differ from it, which is where they fork.
        consume(rows, logits, first): called for consecutive slices of rows with their logits [n, U, V] and
            those of row 0 [U, V]; U are the distinct nodes that are read, `prompt_place` maps the reads (of prompts, as a rule
            their ends) to them.
        hidden_states: hand out what enters the output head instead, [n, U, hidden]: the hidden states after
            the final norm.
        see(layer, rows, states): called for each decoder layer in `after`, from the first, for consecutive slices of rows with
            what leaves it, [n, U, hidden]. Rows that fork later do not come: theirs are row 0's.
        """
        forks = [mask.fork_layer(r) for r in range(len(mask))]
        if forks != sorted(forks):
            raise ValueError("rows must be sorted by the first layer in which they differ from row 0")
        self._mask = mask
        self._forks = np.bincount(forks[1:], minlength=self.anatomy.num_layers).tolist()
        self._alive, self._see = 1, see
        device = input_device(self.model)
        token_ids = torch.as_tensor(self.packed.token_ids, device=device).view(self._abreast, -1)
        position_ids = torch.as_tensor(self.packed.position[: self.packed.length], device=device).long()[None]
        # The pass through the layers ends in the model's head, whose result there is not wanted.
        self._forward(token_ids, position_ids, **last_logits_only(self.model))
        self._buffer = None
        base = None
        seen_by = head_input(self.model) if hidden_states else contextlib.nullcontext([])
        with self._weights.idle(), seen_by as seen:
            for rows in even_slices(self._alive, self.rows_per_head_chunk):
                self._head_chunk, self._head_rows = self._final[rows], rows
                if self.own_head:  # which takes the model's own precision
                    self._head_chunk = self._head_chunk.to(self.model.dtype)
                if (
                    self.anatomy.plain_sequences
                ):  # each read is the last token of a row, which a hook may look for
                    self._head_chunk = self._head_chunk.flatten(0, 1)[:, None]
                # As many rows as come out of the layers: some models shape their states by their input.
                start = token_ids.new_zeros(self._head_chunk.shape[:2])
                logits = self._forward(start, start)
                if not self._logits:
                    continue
                out = seen.pop() if hidden_states else logits
                out = out.view(-1, len(self.last_nodes), out.shape[-1])
                base = out[0].clone() if base is None else base
                consume(rows, out, base)
                del out, logits  # before the next ones are made
        self._head_chunk = self._final = self._see = None

    def _forward(self, token_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs) -> torch.Tensor | None:
        with contextlib.suppress(Left):
            out = self.model(
                input_ids=token_ids, position_ids=position_ids, use_cache=False, return_dict=True, **kwargs
            )
            return out.logits
        return None

    def _leaves(self, number: int, hidden: torch.Tensor) -> None:
        """Hand out what leaves a decoder layer. The last one's rows come in the head's chunks."""
        last = number == self._top
        if self._head_chunk is not None:
            if last:
                self._see(number, self._head_rows, hidden.view(-1, len(self.last_nodes), hidden.shape[-1]))
        elif not last:
            hidden = self._joined(hidden)
            for rows in even_slices(self._alive, self.rows_per_head_chunk):
                self._see(number, rows, self._at_reads(hidden, rows))
        if last and not self._logits:
            raise Left

    def _width(self) -> int:
        """Tokens of a row, as a chunk counts them."""
        least = LEAST_ABREAST if self.anatomy.plain_sequences else 0
        return self._abreast * max(self.packed.length, least)

    def _at_reads(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Rows [n, U, hidden] of what the layers hand on, at the nodes that are read."""
        return hidden[rows].index_select(1, self._last_nodes(hidden.device))

    def _joined(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model has as rows of its batch, as rows of ours: [rows, T, hidden]."""
        return hidden if self._abreast == 1 else hidden.reshape(-1, self.packed.num_tokens, hidden.shape[-1])

    def _apart(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of ours as the model has them, [rows x abreast, length, hidden]."""
        return hidden if self._abreast == 1 else hidden.reshape(-1, self.packed.length, hidden.shape[-1])

    def _layer(self, block: Block, forward: Callable, last: bool) -> Callable:
        """last: the last decoder layer that runs, as a rule the model's."""
        index = block.layer

        def step(*args, **kwargs):
            call = LayerCall.of(forward, args, kwargs, self._abreast)
            if self._head_chunk is not None:
                out = self._head_chunk if last else call.hidden
                call.tuples = self._tuples
                return call.result(out)
            if call.hidden.device != block.device:
                call = call.to(block.device)
            return call.result(self._apart(self._pass(index, call, last)))

        return step

    def _pass(self, index: int | None, call: LayerCall, last: bool) -> torch.Tensor:
        """All rows alive through a layer. Returns what the model is to hand to the next one."""
        hidden = self._joined(call.hidden)
        trimmed = last and index is not None and not self.anatomy.plain_sequences
        if self._fused:
            self._fused_layer(index, hidden, last, *call.kwargs["position_embeddings"])
            if not last:
                return self._buffer[: self._alive]
            return hidden.new_zeros(1, *hidden.shape[1:], dtype=self.model.dtype)
        n = self._fork(index, hidden)
        for rows in even_slices(n, self.rows_per_chunk):
            x = self._buffer[rows]
            if trimmed:
                self._last_layer(index, call, x, rows)
            else:
                x = self._apart(x)
                out = self._joined(call(x) if index is None else self._attend(index, call, x, rows))
                self._buffer[rows] = out
                if last:
                    self._final[rows] = out.index_select(1, self._last_nodes(out.device))
                del out  # before the next chunk makes its own
            self.tick(0 if index is None else rows.stop - rows.start)
        self._tuples = call.tuples
        return hidden.new_zeros(1, *hidden.shape[1:]) if last else self._buffer[:n]

    def _fused_layer(
        self, index: int, hidden: torch.Tensor, last: bool, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """One layer by fused_layer.py, of rows over the whole tree."""
        layer, window, tree = self._fused[index], self.anatomy.layers[index].window, self._tree(hidden.device)

        def attention(q, k, v, mask, trimmed, kept=None):
            if kept is not None:
                self.keep(index, kept, *(x.to(self.model.dtype).transpose(1, 2) for x in (k, v)))
            plan = tree.plan(window, trimmed, q)
            return tree_attention(
                tree, *(x.transpose(1, 2) for x in (q, k, v)), mask, plan,
                scaling=layer.scaling, softcap=layer.softcap, window=window,
            )  # fmt: skip

        nodes = self._last_nodes(hidden.device) if last else None
        cos, sin = (x[0].repeat(self._abreast, 1) for x in (cos, sin))
        self._fused_rows(index, hidden, attention, cos, sin, nodes, last)

    def _fused_rows(
        self,
        index: int,
        hidden: torch.Tensor,
        attend: Callable,
        cos,
        sin,
        nodes: torch.Tensor | None,
        trim=False,
    ) -> None:
        """First the rows that fork here, from the base row, then the others in place.

        hidden: the rows that come in; nodes: where masks are cut to; trim: the layer cuts its rows there.
        """
        layer, ends = self._fused[index], nodes if trim else None
        before = self._alive
        parent = {head for at, head in self._mask.groups[0] if at == index}
        heads = [
            [head for at, head in group if at == index]
            for group in self._mask.groups[before : before + self._forks[index]]
        ]
        new = [sorted(set(chosen) - parent) for chosen in heads]
        # Forks that add the same number of heads to those that row 0 has off in this layer.
        simple = (
            len({len(added) for added in new}) == 1 and bool(new[0]) and all(parent <= set(c) for c in heads)
        )
        after = self._fork(index, hidden, copy=not simple)
        unkept: list[slice] = []  # the rows at hand, until their keys and values are handed out

        def attention(*args):
            return attend(*args, unkept.pop()) if self.keep is not None and unkept else attend(*args)

        into = self._final if trim else self._buffer
        per_chunk, width = self.rows_per_chunk, hidden.shape[1]
        # With the forks, the base row has passed this layer too, and only the others are left.
        old = range(1, before) if simple else range(after)
        chunks = [slice(old.start + r.start, old.start + r.stop) for r in even_slices(len(old), per_chunk)]
        sizes = [rows.stop - rows.start for rows in chunks]
        common = max(sizes, key=sizes.count, default=0)
        worth = common if sizes.count(common) > 1 else 0
        with layer.loaded(worth * width, worth * len(ends) if trim else None):
            if simple:
                unkept.append(slice(0, 1))
                base_row = layer.forks(
                    self._buffer[:1], new, list(self._mask.ways(before, before + self._forks[index])),
                    self._layer_mask(index, hidden, slice(0, 1), nodes), self._every(index, hidden, nodes),
                    cos, sin, attention, ends, per_chunk, into[before:after],
                )  # fmt: skip
                self.tick(len(new))
            for rows in chunks:
                x = self._buffer[rows]
                unkept.append(rows)
                out = layer.rows(x, cos, sin, attention, self._layer_mask(index, x, rows, nodes), ends)
                if trim:
                    into[rows] = out
                self.tick(rows.stop - rows.start)
            if simple:
                into[:1] = base_row
                self.tick(1)

    def _fork(self, index: int | None, hidden: torch.Tensor, copy: bool = True) -> int:
        """Bring the incoming rows into the buffer and add the copies that fork here. Returns the rows alive."""
        if self._buffer is None or self._buffer.device != hidden.device:
            rows = len(self._mask)
            dtype = self._residual_dtype or hidden.dtype
            moved = torch.empty(rows, *hidden.shape[1:], dtype=dtype, device=hidden.device)
            self._final = torch.empty(
                rows, len(self.last_nodes), *hidden.shape[2:], dtype=dtype, device=hidden.device
            )
            self._buffer = moved
        if hidden.data_ptr() != self._buffer.data_ptr():
            self._buffer[: self._alive] = hidden
        n = self._alive + (0 if index is None else self._forks[index])
        if copy:
            self._buffer[self._alive : n] = self._buffer[:1]
        self._alive = n
        return n

    def _every(self, index: int, like: torch.Tensor, nodes) -> LayerMask:
        """Every head of the layer off: one row for each ablation."""
        return self._layer_mask(
            index, like, slice(None), nodes, self._mask.every(index, self.anatomy.num_heads)
        )

    def _layer_mask(
        self, index: int, like: torch.Tensor, rows: slice, nodes=None, mask: HeadMask | None = None
    ) -> LayerMask:
        out = (mask or self._mask).layer(
            index, self.anatomy.num_heads, device=like.device, dtype=self._head_dtype(like), rows=rows
        )
        return out if nodes is None else out.at(nodes)

    def _attend(
        self, index: int, call: LayerCall, x: torch.Tensor, rows: slice, nodes=None, **how
    ) -> torch.Tensor:
        mask = self._layer_mask(index, x, rows, nodes).abreast(self._abreast)
        if self.keep is not None and not how:  # the last layer's are taken before
            how["keep"] = lambda k, v: self.keep(index, rows, k, v)
        if self._only_ends and nodes is None:
            # Sequences that go abreast end alike, and are read there.
            how["only"] = torch.as_tensor(self._tree(x.device).trimmed, device=x.device)
        return self._through(index, call, x, mask, **how)

    def _through(self, index: int, call: LayerCall, x: torch.Tensor, mask: LayerMask, **how) -> torch.Tensor:
        """Rows through a layer with this mask. how: as in TreeCall."""
        layer = self.anatomy.layers[index]
        setattr(layer.attention, ATTRIBUTE, TreeCall(self._tree(x.device), layer.window, mask, **how))
        return call(x)

    def _keys_values(self, index: int, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token, and nothing else of the layer."""
        try:
            with no_queries(self.anatomy.layers[index].attention):
                self._through(index, call, x, self._untouched(x), capture=True)
        except Captured as captured:
            return captured.kv
        raise AssertionError("the layer did not call attention")

    def _untouched(self, like: torch.Tensor) -> LayerMask:
        """Of the unablated row alone."""
        return LayerMask.untouched(1, self.anatomy.num_heads, self._head_dtype(like), like.device)

    def _head_dtype(self, like: torch.Tensor) -> torch.dtype:
        """What heads' outputs are in."""
        return self._fused[0].attention if self._fused else like.dtype

    def _last_layer(self, index: int, call: LayerCall, x: torch.Tensor, rows: slice) -> None:
        """Keys and values of every token; everything else only at the prompts' last tokens."""
        kv = self._keys_values(index, call, x)
        if self.keep is not None:
            self.keep(index, rows, *kv)
        nodes = self._last_nodes(x.device)
        trimmed = call.at(nodes, self.packed.num_tokens)
        self._final[rows] = self._attend(index, trimmed, x.index_select(1, nodes), rows, nodes, kv=kv)

    def _last_nodes(self, device: torch.device) -> torch.Tensor:
        if device not in self._nodes:
            self._nodes[device] = torch.as_tensor(self.last_nodes, device=device)
        return self._nodes[device]

    def _tree(self, device: torch.device) -> TreeContext:
        if device not in self._trees:
            reads = np.unique(self._tree_of.read_index)
            self._trees[device] = TreeContext(self._tree_of, self._backend, device, reads)
        return self._trees[device]
