"""Packs prompts into one token sequence that is a prefix tree (trie) in depth-first order.

Every token of the packed sequence is a node of the trie; prompts that start alike share the nodes of
their common prefix, so a shared template is computed once. In depth-first order the descendants of
node j are the contiguous range j + 1 .. subtree_end[j] - 1, hence

    token i sees token j   <=>   j <= i < subtree_end[j]            (j is i itself or an ancestor)

and the whole attention mask is one integer per token. With a sliding window of W tokens the condition
position[i] - position[j] < W is added; positions are depths, so along one path they are the usual ones.
Nothing is padded, and no T x T mask exists anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Segment:
    """A maximal run of nodes without a branch: packed indices start .. stop - 1, hanging off `parent`."""

    start: int
    stop: int
    parent: int  # index into PackedPrompts.segments, -1 for a root


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Prompts as one packed sequence of T tokens.

    token_ids    int64 [T]   the token of each node
    position     int32 [T]   its depth = its position id in every prompt that passes through it
    subtree_end  int32 [T]   one past the last descendant, in packed order
    last_index   int64 [P]   the node of each prompt's last token, in the caller's order of prompts
    read_index   int64 [M]   the nodes whose next-token distributions are read, prompt by prompt; last_index if nothing was said
    segments                 the trie with unbranched runs merged, parents before children
    abreast                  1 for a tree; else of how many sequences of T / abreast tokens each it is, one after the other, which
                             pass the model as rows of a batch (`side_by_side`)
    """

    token_ids: np.ndarray
    position: np.ndarray
    subtree_end: np.ndarray
    last_index: np.ndarray
    segments: tuple[Segment, ...]
    read_index: np.ndarray
    abreast: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens of one sequence, where several go abreast."""
        return self.num_tokens // self.abreast

    def first_sequence(self) -> PackedPrompts:
        """The first of sequences that go abreast, as a tree of its own: but for their tokens and reads the others are like it."""
        fields, reads = (self.token_ids, self.position, self.subtree_end), self.read_index
        own = (x[: self.length] for x in fields)
        return PackedPrompts(*own, self.last_index[:1], self.segments[:1], reads[reads < self.length])

    def path(self, segment: int) -> list[int]:
        """Segment indices from the root down to and including `segment`."""
        out = []
        while segment >= 0:
            out.append(segment)
            segment = self.segments[segment].parent
        return out[::-1]

    def path_nodes(self, prompt: int) -> np.ndarray:
        """The nodes of a prompt's tokens in their order, int64 [its length]."""
        end = self.last_index[prompt]
        before = np.arange(end + 1)
        return before[self.subtree_end[: end + 1] > end]

    def paths_of(self, ends: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Nodes by the paths from the root that they are on, each of them once: (which of them, nodes above the deepest).

        ends: int64, in ascending order, which is depth first. The nodes of a path are in ascending depth.
        """
        found, left = [], np.ones(len(ends), dtype=bool)
        for deepest in reversed(range(len(ends))):
            if not left[deepest]:
                continue
            above = np.arange(ends[deepest])
            above = above[self.subtree_end[: ends[deepest]] > ends[deepest]]
            places = np.flatnonzero(left & np.isin(ends, np.append(above, ends[deepest])))
            left[places] = False
            found.append((places, above))
        return found


def pack(prompts: Sequence[Sequence[int]], reads: Sequence[Sequence[int]] | None = None) -> PackedPrompts:
    """Pack token-id lists into a prefix tree.

    Args:
        prompts: P lists of token ids, each with at least one token. Duplicates share their nodes.
        reads: for each prompt, the positions that are read; None for the last of each.
    Raises:
        ValueError: no prompts, or an empty one (named by its index).
    """
    if len(prompts) == 0:
        raise ValueError("there are no prompts: expected at least one")
    for i, ids in enumerate(prompts):
        if len(ids) == 0:
            raise ValueError(f"prompt {i} has no tokens: remove it or give it text")

    # Sorting puts prompts with a common prefix next to each other, which is a depth-first order of the trie.
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    token_ids: list[int] = []
    position: list[int] = []
    subtree_end: list[int] = []
    last_index = np.empty(len(prompts), dtype=np.int64)
    path: list[int] = []  # packed indices of the current prompt's nodes
    previous: Sequence[int] = ()
    branches: set[int] = set()  # nodes after which a new segment must start
    for i in order:
        ids = prompts[i]
        shared = 0
        while shared < min(len(ids), len(previous)) and ids[shared] == previous[shared]:
            shared += 1
        for node in path[shared:]:
            subtree_end[node] = len(token_ids)
        if shared and (shared < len(path)):
            branches.add(path[shared - 1])
        path = path[:shared]
        for depth in range(shared, len(ids)):
            path.append(len(token_ids))
            token_ids.append(int(ids[depth]))
            position.append(depth)
            subtree_end.append(0)
        last_index[i] = path[-1]
        previous = ids
    for node in path:
        subtree_end[node] = len(token_ids)

    position_arr = np.asarray(position, dtype=np.int32)
    packed = PackedPrompts(
        token_ids=np.asarray(token_ids, dtype=np.int64),
        position=position_arr,
        subtree_end=np.asarray(subtree_end, dtype=np.int32),
        last_index=last_index,
        segments=_segments(position_arr, branches),
        read_index=last_index,
    )
    if reads is None:
        return packed
    nodes = [packed.path_nodes(i)[list(places)] for i, places in enumerate(reads)]
    return replace(packed, read_index=np.concatenate(nodes))


def side_by_side(
    prompts: Sequence[Sequence[int]], reads: Sequence[Sequence[int]] | None = None
) -> PackedPrompts:
    """Token-id lists of one length, of which no beginning is shared: for models in which a token's neighbours in the sequence
    must be those of its prompt. Arguments as of `pack`. Raises ValueError for lists of several lengths."""
    count, length = len(prompts), len(prompts[0])
    if any(len(ids) != length for ids in prompts):
        raise ValueError(f"prompts of {sorted({*map(len, prompts)})} tokens cannot go side by side")
    start = np.arange(count) * length
    last_index = read_index = start + length - 1
    if reads is not None:
        read_index = np.concatenate(
            [at + np.asarray(places) for at, places in zip(start, reads, strict=True)]
        )
    return PackedPrompts(
        token_ids=np.asarray(prompts, dtype=np.int64).ravel(),
        position=np.tile(np.arange(length, dtype=np.int32), count),
        subtree_end=np.repeat(start + length, length).astype(np.int32),
        last_index=last_index,
        segments=tuple(Segment(at, at + length, -1) for at in start.tolist()),
        read_index=read_index,
        abreast=count,
    )


def _segments(position: np.ndarray, branches: set[int]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    holder: dict[int, int] = {}  # depth -> segment that holds the node at that depth of the current path
    start = 0
    for node in range(1, len(position) + 1):
        ends = node == len(position) or position[node] != position[node - 1] + 1 or (node - 1) in branches
        if not ends:
            continue
        depth = int(position[start])
        parent = holder[depth - 1] if depth else -1
        segments.append(Segment(start, node, parent))
        for d in range(depth, depth + node - start):
            holder[d] = len(segments) - 1
        start = node
    return tuple(segments)
