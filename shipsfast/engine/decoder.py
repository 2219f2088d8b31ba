"""Rows that generate together, each with its own ablated heads, through the model's own modules.

Prefill is the growing batch (growing_batch.py): the prompts are one prefix tree, all rows of a prompt share what lies below
their first ablated layer, and the keys and values of every layer go into the cache.

A step grows in the same way. Rows that have the same tokens behind them, prompt and text, differ only from their
first ablated layer upwards. One of them, the leader, is the one that is touched last; it passes the lower layers for
all, and each of the others joins at the layer where its own ablation begins, as a copy of the leader. Its keys and
values of the layers below are the leader's. Once texts part, every row is its own leader, and nothing is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from ..models.attention_hook import ATTRIBUTE, TREE, DecodeCall, installed
from ..models.forward import input_device
from ..models.layer_call import LayerCall, forward_replaced
from ..ops.decode_attention import decode_attention
from ..ops.kv_cache import KVCache
from ..ops.masks import LayerMask
from ..ops.prefix_tree import pack
from .fused_layer import FusedLayer
from .growing_batch import GrowingBatch
from .head_mask import HeadMask
from .heads import Group, first_layer
from .memory_plan import Plan
from .subject import Subject

# choose(slots int64 [n], logits [n, V]): takes the next-token logits of rows
Choose = Callable[[np.ndarray, torch.Tensor], None]


@dataclass
class _Plan:
    """How the rows of a step pass the layers, as long as the same rows share the same histories.

    Rows stand in the plan's order: leaders first, then the others by the layer they join at.
    """

    order: np.ndarray  # [R], the caller's number of each row
    alive: list[int]  # rows that pass each layer
    leader: torch.Tensor  # int64 [R], each row's leader
    source: list[torch.Tensor]  # int64 [R] per layer, whose keys and values a row takes
    masks: list[LayerMask]  # per layer, of the rows alive
    slot: torch.Tensor  # int64 [R]
    slot_int: torch.Tensor  # int32 [R]


@dataclass(frozen=True)
class Decoded:
    """A finished row. tokens: the new ones, without the end-of-sequence token; finished: it ended by that."""

    group: int
    prompt: int
    tokens: list[int]
    finished: bool


class Decoder:
    """Slots of a cache, and the rows in them.

    Args:
        subject: the model, its ablation and how it runs; values: the ablation's vectors, as in `HeadMask`.
        slots, capacity: how many rows at a time, of how many tokens with prompt and text.
        prefill: how prompts are cut when they enter, as in `GrowingBatch`.
        joined: keep the weights of all fused layers loaded.
    Use as a context manager; the model itself is changed only during `prefill` and inside `stepping`.
    """

    def __init__(
        self,
        subject: Subject,
        values: Sequence[torch.Tensor] | None,
        *,
        slots: int,
        capacity: int,
        prefill: Plan,
        joined: bool = False,
    ) -> None:
        self.subject, self.values, self.plan, self._joined = subject, values, prefill, joined
        self.model, self.anatomy, self.how = subject.model, subject.anatomy, subject.how
        self.backend, self.fused = subject.backend, subject.fused
        anatomy, how, backend = self.anatomy, self.how, self.backend
        self.cache = KVCache(
            anatomy.num_layers, slots, capacity, mean_keys=how.kind == "head_mean_k", native=backend == "cpp"
        )
        self.groups: list[Group] = [()] * slots
        self.length = np.zeros(slots, dtype=np.int64)  # tokens in the cache
        self._history = np.zeros(slots, dtype=np.int64)  # equal numbers: equal tokens so far
        self._histories = 0  # numbers given out
        self._plan: tuple[tuple, _Plan] | None = None
        self._buffer: torch.Tensor | None = None  # [R, 1, hidden]
        self._position: torch.Tensor | None = None  # int64 [R], of the tokens of this step
        self._layers: list[FusedLayer] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            if self.fused:
                sizes = (self.anatomy.num_heads, self.anatomy.num_kv_heads)
                for layer in self.anatomy.layers:
                    fused = FusedLayer(
                        layer.module, *sizes, self.backend, self.model.dtype
                    )  # as the cache is
                    self._layers.append(fused)
                    if self._joined:
                        undo.enter_context(self._layers[-1].loaded(0, None))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self._undo.close()

    def prefill(
        self, prompts: Sequence[Sequence[int]], groups: Sequence[Group], slots: np.ndarray, choose: Choose
    ) -> None:
        """Put groups x prompts rows into the slots int64 [G, P], and hand out their next-token logits."""
        layers = self.anatomy.num_layers
        fork = np.array([first_layer(group, layers) for group in groups])
        order = [g for g in np.argsort(fork, kind="stable") if groups[g]]  # rows 1, 2, ... of the batch
        place = np.array([0, *order])  # of a row: its group; row 0 is the unablated model
        takers_of = [[g for g in range(len(groups)) if not groups[g]], *([g] for g in order)]
        packed = pack(prompts)
        lengths = np.array([len(ids) for ids in prompts])
        prompt = np.repeat(np.arange(len(prompts)), lengths)
        path = np.concatenate([packed.path_nodes(p) for p in range(len(prompts))])
        device = input_device(self.model)
        nodes, position = (torch.as_tensor(x, device=device).long() for x in (path, packed.position[path]))

        def keep(layer: int, rows: slice, key: torch.Tensor, value: torch.Tensor) -> None:
            own = range(max(rows.start, 1), rows.stop)
            takers, row = [place[r] for r in own], [r - rows.start for r in own]
            if rows.start == 0:  # rows that are still the unablated one; some overwrite that in this layer
                shared = np.setdiff1d(np.nonzero(fork >= layer)[0], takers).tolist()
                takers, row = shared + takers, [0] * len(shared) + row
            if not takers:
                return
            to = key.device
            slot = torch.as_tensor(slots[np.asarray(takers)][:, prompt], device=to)  # [n, M]
            source = torch.as_tensor(row, device=to)[:, None] * key.shape[2] + nodes.to(to)
            self.cache.write(
                layer, slot.flatten(), position.to(to).expand_as(slot).flatten(),
                *(x.transpose(1, 2).flatten(0, 1) for x in (key, value)), source.flatten(),
            )  # fmt: skip

        def consume(rows: slice, logits: torch.Tensor, _base: torch.Tensor) -> None:
            at = torch.as_tensor(batch.prompt_place, device=logits.device)
            taken = [(r - rows.start, g) for r in range(rows.start, rows.stop) for g in takers_of[r]]
            if not taken:
                return
            row, group = np.array(taken).T
            own = logits.index_select(0, torch.as_tensor(row, device=logits.device)).index_select(1, at)
            choose(slots[group].ravel(), own.flatten(0, 1))

        with GrowingBatch(self.subject, packed, self.plan, keep=keep, own_head=True) as batch:
            batch.run(HeadMask(((), *(groups[g] for g in order)), self.how, self.values), consume)
        for g, row in enumerate(slots):
            self.length[row] = lengths
            for slot in row:
                self.groups[slot] = groups[g]
        self._plan = None

    def started(self, slots: np.ndarray, prompts: np.ndarray) -> None:
        """Rows prefilled since the last step, int64 [n] each: those with one number in `prompts` share a history."""
        _, same = np.unique(prompts, return_inverse=True)
        self._history[slots] = self._histories + same
        self._histories += len(slots)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """The model ready for `step`. No prefill inside."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(torch.inference_mode())
            undo.enter_context(installed(self.model, TREE))
            for index, layer in enumerate(self.anatomy.layers):
                undo.callback(layer.attention.__dict__.pop, ATTRIBUTE, None)
                undo.enter_context(forward_replaced(layer.module, lambda fwd, i=index: self._layer(i, fwd)))
            yield

    def step(self, slots: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
        """Give each row its next token; returns the logits of the one after, [R, V] in the order of `slots`."""
        plan = self._planned(slots, tokens)
        device = input_device(self.model)
        self._now = plan
        self._position = torch.as_tensor(self.length[slots][plan.order], device=device)
        ids = torch.as_tensor(tokens[plan.order], device=device)
        out = self.model(
            input_ids=ids[:, None], position_ids=self._position[:, None], use_cache=False, return_dict=True
        )
        self._buffer = None
        self.length[slots] += 1
        back = np.empty(len(slots), dtype=np.int64)
        back[plan.order] = np.arange(len(slots))
        return out.logits[:, -1].index_select(0, torch.as_tensor(back, device=out.logits.device))

    def _planned(self, slots: np.ndarray, tokens: np.ndarray) -> _Plan:
        pairs = np.stack([self._history[slots], tokens])
        _, same = np.unique(pairs, axis=1, return_inverse=True)
        same = same.reshape(-1)
        self._history[slots] = self._histories + same
        self._histories += len(slots)
        key = (slots.tobytes(), same.tobytes())
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, self._make_plan(slots, same))
        return self._plan[1]

    def _make_plan(self, slots: np.ndarray, history: np.ndarray) -> _Plan:
        layers = self.anatomy.num_layers
        groups = [self.groups[s] for s in slots]
        fork = np.array([first_layer(group, layers) for group in groups])
        latest_first = np.lexsort((-fork, history))
        leaders = latest_first[np.unique(history[latest_first], return_index=True)[1]]  # by history
        others = np.setdiff1d(np.arange(len(slots)), leaders)
        order = np.concatenate([leaders, others[np.argsort(fork[others], kind="stable")]])
        joins = fork[order]
        joins[: len(leaders)] = 0
        alive = [int((joins <= layer).sum()) for layer in range(layers)]
        device = input_device(self.model)
        leader = history[order]  # leaders stand in the order of histories
        mask = HeadMask(tuple(groups[i] for i in order), self.how, self.values)
        slot = torch.as_tensor(slots[order], device=device)
        source = [torch.as_tensor(np.concatenate([np.arange(n), leader[n:]]), device=device) for n in alive]
        masks = [
            mask.layer(index, self.anatomy.num_heads, device=device, dtype=self.model.dtype, rows=slice(0, n))
            for index, n in enumerate(alive)
        ]
        return _Plan(order, alive, torch.as_tensor(leader, device=device), source, masks, slot, slot.int())

    def _layer(self, index: int, forward: Callable) -> Callable:
        last = index == self.anatomy.num_layers - 1

        def step(*args, **kwargs):
            call = LayerCall.of(forward, args, kwargs)
            plan, hidden = self._now, call.hidden
            before = plan.alive[index - 1] if index else len(plan.order)
            n = plan.alive[index]
            if self._buffer is None:
                dtype = torch.float32 if self.subject.fp32_residual else hidden.dtype
                self._buffer = torch.empty(
                    len(plan.order), *hidden.shape[1:], dtype=dtype, device=hidden.device
                )
            if hidden.data_ptr() != self._buffer.data_ptr():
                self._buffer[:before] = hidden
            if index and n > before:
                self._buffer[before:n] = self._buffer.index_select(0, plan.leader[before:n])
            if self._layers:
                self._fused_layer(index, *call.kwargs["position_embeddings"])
            else:
                module = self.anatomy.layers[index].attention
                setattr(module, ATTRIBUTE, DecodeCall(self._attend(index)))
                call = call.first(n, len(plan.order))
                self._buffer[:n] = call(self._buffer[:n])
            if last:
                self._buffer[n:] = self._buffer.index_select(0, plan.leader[n:])
                return call.result(self._buffer.to(self.model.dtype))
            return call.result(self._buffer[:n])

        return step

    def _fused_layer(self, index: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The rows alive as one sequence: they do not see each other, attention being told which slot is whose."""
        n = self._now.alive[index]
        attend, layer = self._attend(index), self._layers[index]

        def attention(q, k, v, _mask, _trimmed):
            return attend(q[0], k[0], v[0], layer.scaling, layer.softcap, None)[None]

        cos, sin = (
            x[:n, 0].contiguous() if len(x) > 1 else x[:, 0].expand(n, -1).contiguous() for x in (cos, sin)
        )
        layer.rows(self._buffer[:n, 0][None], cos, sin, attention, None)

    def _attend(self, index: int) -> Callable:
        """attention(q [n, H, D], k, v [n, HKV, D], scaling, softcap, sink) -> [n, H, DV], which also fills the cache."""
        plan, cache = self._now, self.cache
        n, source = plan.alive[index], plan.source[index]

        def attend(q, k, v, scaling, softcap, sink):
            cache.write(index, plan.slot, self._position, k, v, source)
            return decode_attention(
                self.backend, q, cache.key[index], cache.value[index], cache.mean_key[index], plan.slot_int[:n],
                (self._position[:n] + 1).int(), plan.masks[index],
                scaling=scaling, softcap=softcap, window=self.anatomy.layers[index].window, sink=sink,
            )  # fmt: skip

        return attend
