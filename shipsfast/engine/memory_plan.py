"""How a scan is cut to fit: prompts into groups, rows into blocks, blocks into chunks.

A group of prompts is one packed sequence. A block is a run of ablations that go through the model
together as one growing batch. A chunk is the rows that pass a layer at a time. Memory of a block:

    rows x U x hidden              the trimmed last layer, U distinct prompt ends
    + the larger of
        rows x T x hidden          the residual stream of every row, until the last layer is done,
        + chunk tokens x work width    and what a layer holds while it runs
      and
        head rows x (V x (logits and their copies) + hidden), and the base logits
    + rows x what is kept of a row + what is kept in all (resample: L rows' worth of outputs)

With an ablation at the end only a row has no T tokens, but the U that are read, and the unablated row passes each layer alone:

    rows x U x hidden
    + the larger of  T x (hidden + keys and values) + the larger of chunk tokens and T x work width
                         + what attention at the ends holds,  and the head's
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby, pairwise

import psutil
import torch

from ..errors import InputError
from ..models.anatomy import Anatomy
from ..ops.end_attention import scratch_bytes
from ..ops.prefix_tree import PackedPrompts, pack, side_by_side
from ..text import counted
from .measurement import ScanExecution

# Measured on two AVX-512 cores: larger chunks make the matrix products 3 % faster at most, and push activations
# out of the cache between the operations of a layer, which costs more. A GPU wants its products larger.
CPU_CHUNK_TOKENS = 768
CUDA_CHUNK_TOKENS = 16384
# Longer packs are split by prompts where one row alone would outgrow the chunk by this factor.
CPU_GROUP_FACTOR = 4
# As so many tokens a shorter sequence counts beside others: recurrences that work in chunks fill it up to 64 tokens and more.
LEAST_ABREAST = 32
HEAD_BYTES = 256 << 20  # logits of one head chunk
HEAD_WIDTH = 4  # of hidden states that enter the output head: the slice, its norm and what that takes


@dataclass(frozen=True)
class Plan:
    """prompt_groups: indices into the prompts; rows_per_block counts ablations, without the unablated row;
    steps_per_block: the most (row, layer) steps of a block, the unablated row's included, or one ablation's if that takes
    more; None where only rows count (work_plan.py)."""

    prompt_groups: tuple[tuple[int, ...], ...]
    rows_per_block: int
    chunk_tokens: int
    head_rows: int
    memory_limit_bytes: int
    predicted_bytes: int
    needs: Needs = field(repr=False, compare=False)
    steps_per_block: int | None = None

    def to_json(self) -> dict:
        out = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        out["prompt_groups"] = [len(g) for g in self.prompt_groups]
        if self.steps_per_block is None:
            del out["steps_per_block"]
        return out

    def blocks(self, units: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        """(layer, index) pairs in ascending order, cut into the fewest blocks that keep to the plan, as equal in work as
        can be."""
        layers = self.needs.held.depth or self.needs.anatomy.num_layers
        parts = [slice(0, len(units))]
        if self.steps_per_block is not None:
            done = [0, *accumulate(layers - layer for layer, _ in units)]
            count = max(1, -(-done[-1] // max(1, self.steps_per_block - layers)))
            # Where the steps so far pass a share of all: a block may be larger than the others by one row.
            ends = [bisect.bisect_left(done, done[-1] * i / count) for i in range(count + 1)]
            parts = [slice(a, b) for a, b in pairwise(ends) if b > a]
        cut = [units[part] for part in parts]
        return [block[rows] for block in cut for rows in even_slices(len(block), self.rows_per_block)]

    @classmethod
    def from_json(cls, body: dict, prompts: Sequence[Sequence[int]], needs: Needs) -> Plan:
        """The plan that gave `to_json`, for the same prompts. needs: of another plan for them; those of these groups
        take its place. Raises InputError for a plan of other prompts."""
        if sum(body["prompt_groups"]) != len(prompts):
            raise InputError(
                f"the plan is of {counted(sum(body['prompt_groups']), 'prompt')}, and there are {len(prompts)}: choose "
                "another output folder"
            )
        order, groups, start = needs.held.in_order(prompts), [], 0
        for size in body["prompt_groups"]:
            groups += needs.held.grouped(prompts, order[start : start + size], size)
            start += size
        return cls(**body, needs=needs).regrouped(groups, prompts)

    def regrouped(self, groups: Iterable[Sequence[int]], prompts: Sequence[Sequence[int]]) -> Plan:
        """The same for prompts in these groups."""
        groups = tuple(groups)
        return replace(self, prompt_groups=groups, needs=self.needs.of_groups(groups, prompts))._predicted()

    def of_rows(self, rows_per_block: int) -> Plan:
        """The same for blocks of at most so many ablations."""
        return replace(self, rows_per_block=rows_per_block)._predicted()

    def smaller(self) -> Plan | None:
        """The plan to retry with after running out of memory, None if there is nothing left to halve."""
        if max(self.chunk_tokens, self.rows_per_block) == 1:
            return None
        return replace(
            self,
            rows_per_block=max(1, self.rows_per_block // 2),
            chunk_tokens=max(1, self.chunk_tokens // 2),
            head_rows=max(1, self.head_rows // 2),
        )._predicted()

    def _predicted(self) -> Plan:
        """The same with its own prediction."""
        return replace(
            self, predicted_bytes=self.needs(self.rows_per_block, self.chunk_tokens, self.head_rows)
        )


def even_slices(total: int, most: int) -> list[slice]:
    """range(total) cut into the fewest slices of at most `most`, as equal as can be; none for a total of 0."""
    parts = max(1, -(-total // max(1, most)))
    return [slice(a, b) for a, b in pairwise(total * i // parts for i in range(parts + 1)) if b > a]


def free_bytes(device: torch.device) -> int:
    """What may be used on `device` without pushing anyone else out: nine tenths of what is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.9 * (free + held))
    return int(0.9 * psutil.virtual_memory().available)


def block_parts(
    anatomy: Anatomy,
    rows: int,
    tokens: int,
    ends: int,
    chunk_tokens: int,
    head_rows: int,
    size: int,
    row_size: int,
    ends_alone: bool = False,
    longest: int = 0,
) -> dict[str, int]:
    """What a block of `rows` rows holds beyond the model itself, in bytes; `size` bytes per number, `row_size` in the
    residual stream.

    ends: the trimmed last layer, or rows that are nothing else (ends_alone), with at most `longest` tokens above; rows: the residual streams; chunk: what a layer holds while it runs; head: logits, which
    come after the layers, when the residual streams are gone.
    """
    pairs = min(max(head_rows, ends), rows * ends)
    head = pairs * (
        anatomy.vocab_size * anatomy.logit_copies * max(size, 4) + HEAD_WIDTH * anatomy.hidden_size * 4
    )
    streams, at_once = (
        rows * tokens * anatomy.hidden_size * row_size,
        min(max(chunk_tokens, tokens), rows * tokens),
    )
    attention = 0
    if ends_alone:
        kept = 2 * anatomy.num_heads * max(anatomy.head_dim, anatomy.value_dim)
        streams = tokens * (2 * anatomy.hidden_size * row_size + kept * size)
        together = min(max(chunk_tokens, ends), rows * ends)
        at_once = max(tokens, together)
        attention = scratch_bytes(
            together // ends,
            ends,
            longest,
            anatomy.num_heads,
            anatomy.num_kv_heads if anatomy.uniform_kv_heads else anatomy.num_heads,
            anatomy.head_dim + anatomy.value_dim,
            size,
        )
    return {
        "ends": rows * ends * anatomy.hidden_size * row_size,
        "rows": streams,
        "chunk": at_once * anatomy.work_width * size + attention,
        "head": head + 2 * ends * anatomy.vocab_size * 8,
    }


def peak_bytes(parts: dict[str, int]) -> int:
    """Of what `block_parts` gives, at the worst moment."""
    return parts["ends"] + max(parts["rows"] + parts["chunk"], parts["head"])


@dataclass(frozen=True)
class Held:
    """In what a scan is held, and what its caller holds beside the blocks.

    dtype: of the model; extra_rows: streams beside those of the block; per_row_bytes, bytes: kept of every row, and in all;
    coming_bytes: weights of the model that are brought into memory while it runs; per_token_bytes: held of the base row's tokens
    beside a chunk; row_size: bytes per number of the residual streams, by default those of the model's dtype; reads: the
    positions of each prompt that are read, None for its last; ends_alone: rows are as wide as there are reads; depth: layers
    with heads that a pass goes through, None for all; abreast: prompts go side by side, as rows of a batch, and share nothing.
    """

    device: torch.device
    dtype: torch.dtype
    extra_rows: int = 0
    per_row_bytes: int = 0
    bytes: int = 0
    coming_bytes: int = 0
    per_token_bytes: int = 0
    row_size: int | None = None
    reads: Sequence[Sequence[int]] | None = None
    ends_alone: bool = False
    depth: int | None = None
    gathers: bool = True  # what ends see is gathered for them, which C++ does without
    abreast: bool = False

    def pack(self, prompts: Sequence[Sequence[int]], group: Sequence[int]) -> PackedPrompts:
        """A group of the prompts, by their indices."""
        packed = side_by_side if self.abreast else pack
        return packed([prompts[i] for i in group], self.reads and [self.reads[i] for i in group])

    def in_order(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Indices of the prompts in which neighbours share the longest prefixes; of those that go side by side, the length."""
        return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) * self.abreast, *prompts[i]))

    def grouped(
        self,
        prompts: Sequence[Sequence[int]],
        order: Sequence[int],
        most: int,
        tokens: int | None = None,
    ) -> list[tuple[int, ...]]:
        """The prompts `order`, a part of what `in_order` gave, in groups of at most `most` that go together. tokens: that prompts
        side by side have together at most, unless there is one alone."""
        if not self.abreast:
            return [tuple(order[part]) for part in even_slices(len(order), most)]
        groups = []
        for length, alike in groupby(order, key=lambda i: len(prompts[i])):
            alike = tuple(alike)
            few = most if tokens is None else min(most, max(1, tokens // max(length, LEAST_ABREAST)))
            groups += [alike[part] for part in even_slices(len(alike), few)]
        return groups


@dataclass(frozen=True)
class Needs:
    """What blocks of a scan hold beyond the model, in bytes.

    held: in what, and beside what; tokens, ends: of the largest pack; longest: the most tokens above an end that are gathered.
    """

    anatomy: Anatomy
    held: Held
    tokens: int = 0
    ends: int = 0
    longest: int = 0

    def of_groups(self, groups: Iterable[Sequence[int]], prompts: Sequence[Sequence[int]]) -> Needs:
        """The same for prompts in these groups."""
        packs = [self.held.pack(prompts, group) for group in groups]
        longest = max(int(p.position[p.read_index].max()) for p in packs) if self.held.gathers else 0
        return replace(
            self, tokens=max(p.num_tokens for p in packs), ends=max(map(_ends, packs)), longest=longest
        )

    def __call__(self, ablations: int, chunk_tokens: int, head_rows: int) -> int:
        """At the worst moment of a block of so many ablations and the unablated row."""
        held, rows, size = self.held, ablations + 1, self.held.dtype.itemsize
        block = block_parts(
            self.anatomy,
            rows,
            self.tokens,
            self.ends,
            chunk_tokens,
            head_rows,
            size,
            held.row_size or size,
            held.ends_alone,
            self.longest,
        )
        more = held.extra_rows * (self.tokens + self.ends) * self.anatomy.hidden_size * size
        more += held.per_token_bytes * self.tokens
        return peak_bytes(block) + more + rows * held.per_row_bytes + held.bytes


def make_plan(
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    num_ablations: int,
    execution: ScanExecution,
    held: Held,
) -> Plan:
    """Choose groups, blocks and chunks for a scan of `num_ablations` ablations over token-id lists.

    execution: its max_memory, by default what is free on the device, and the parts of the plan that it sets.
    Raises InputError if not even one ablation of one prompt fits.
    """
    device, size = held.device, held.dtype.itemsize
    prompts_per_group = execution.prompts_per_group
    if anatomy.plain_sequences and not held.abreast:
        prompts_per_group = 1
    limit = execution.max_memory
    if limit is None:
        limit = max(0, free_bytes(device) - held.coming_bytes)
    on_cpu = device.type == "cpu"
    chunk = execution.chunk_tokens or (CPU_CHUNK_TOKENS if on_cpu else CUDA_CHUNK_TOKENS)
    # Neither the head nor a layer at work gets more than a quarter of the memory: the rest is for rows.
    head_rows = max(
        1, min(HEAD_BYTES, limit // 4 // anatomy.logit_copies) // (anatomy.vocab_size * max(size, 4))
    )
    if execution.chunk_tokens is None:
        chunk = max(64, min(chunk, limit // 4 // (anatomy.work_width * size)))
    order = held.in_order(prompts)
    most = min(execution.rows_per_block or num_ablations, num_ablations)
    per_group = prompts_per_group or len(prompts)
    needs = Needs(anatomy, held)

    def need(rows: int) -> int:
        return needs(rows, chunk, head_rows)

    while True:
        groups = held.grouped(prompts, order, per_group, None if prompts_per_group else chunk)
        needs = needs.of_groups(groups, prompts)
        too_long = on_cpu and prompts_per_group is None and needs.tokens > CPU_GROUP_FACTOR * chunk
        too_long |= anatomy.index_limit is not None and needs.tokens >= anatomy.index_limit
        too_long &= not held.abreast
        # Side by side, prompts share nothing that blocks of fewer rows would do again.
        if (need(most if held.abreast else 1) <= limit and not too_long) or per_group == 1:
            break
        per_group = (per_group + 1) // 2
    while need(1) > limit and (chunk > 1 or head_rows > 1):
        chunk, head_rows = max(1, chunk // 2), max(1, head_rows // 2)
    if need(1) > limit:
        raise InputError(
            f"a scan of a single ablation needs {_mib(need(1))} beyond the model, and {_mib(limit)} may be used: "
            "raise --max-memory or shorten the longest prompt"
        )
    # What more rows need grows with them, though not evenly: a chunk fills up first.
    rows = max(1, bisect.bisect_right(range(1, most + 1), limit, key=need))
    return Plan(tuple(groups), int(rows), chunk, head_rows, limit, need(rows), needs)


def _ends(packed: PackedPrompts) -> int:
    return len(set(packed.read_index.tolist()))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
