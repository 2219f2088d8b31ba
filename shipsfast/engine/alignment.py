"""Which position of another prompt stands in for a position of a prompt: the alignments of `resample`.

Own prompt of T tokens, other prompt of S. Position t takes the head's output from the other prompt's position

    exact     t: both prompts have the same number of tokens, or are refused
    end       t + S - T: both end together, so that the last positions, of which the scores are, stand for each other
    template  t in the tokens with which both begin, t + S - T in those with which both end; between them the m own and n other
              positions are matched by their relative place: the i-th takes the floor((i + 1/2) n / m)-th

A position without a counterpart (t + S - T < 0, or n = 0) keeps what the head gives there on the prompt itself, in the
unablated model. Positions count tokens of the template too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..ops.prefix_tree import PackedPrompts, pack

NONE = -1


def counterparts(own: Sequence[int], other: Sequence[int], align: str) -> np.ndarray:
    """The other prompt's position for every position of the prompt, int64 [T]; NONE where there is none."""
    at, shift = np.arange(len(own)), len(other) - len(own)
    if align != "template":
        return np.maximum(at + shift, NONE)
    shorter = min(len(own), len(other))
    first = _alike(own, other, shorter)
    last = _alike(own[::-1], other[::-1], shorter - first)
    between, theirs = len(own) - first - last, len(other) - first - last
    out = np.where(at < first, at, at + shift)
    place = np.arange(between)
    middle = first + (2 * place + 1) * theirs // (2 * between) if between else place
    out[first : first + between] = middle if theirs else NONE
    return out


def _alike(own: Sequence[int], other: Sequence[int], most: int) -> int:
    """With how many tokens both begin alike."""
    return next((i for i in range(most) if own[i] != other[i]), most)


def pair_ids(
    prompts: Sequence[Sequence[int]], others: Sequence[Sequence[int]], align: str
) -> tuple[list[list[int]], np.ndarray]:
    """The prompts with every (token, place in the other prompt) numbered, and the token of each number, int64 [N].

    Packed by these numbers, two prompts share a node only where one and the same output stands in for both: a place is
    a node of the tree of the other prompts, so that it says all that the other prompt has before it.
    """
    tree = pack(others)
    numbers: dict[tuple[int, int], int] = {}
    paired = []
    for i, (own, other) in enumerate(zip(prompts, others, strict=True)):
        nodes = np.append(tree.path_nodes(i), NONE)[counterparts(own, other, align)]
        paired.append(
            [numbers.setdefault(pair, len(numbers)) for pair in zip(own, nodes.tolist(), strict=True)]
        )
    return paired, np.asarray([token for token, _ in numbers], dtype=np.int64)


def unpair(tree: PackedPrompts, tokens: np.ndarray) -> PackedPrompts:
    """A pack of numbers from `pair_ids` as the pack of the prompts themselves."""
    return replace(tree, token_ids=tokens[tree.token_ids])


def sources(
    tree: PackedPrompts,
    prompts: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    align: str,
    some: Sequence[int],
) -> tuple[PackedPrompts, np.ndarray]:
    """Some of the other prompts as a pack of their own, and of which of its nodes each node of `tree`, the pack of all
    `prompts`, takes the output: int64 [T], NONE where it takes none of these."""
    other_tree = pack([others[i] for i in some])
    index = np.full(tree.num_tokens, NONE)
    for place, i in enumerate(some):
        nodes, path = np.append(other_tree.path_nodes(place), NONE), tree.path_nodes(i)
        # The tree may have a prompt up to where it is read.
        index[path] = nodes[counterparts(prompts[i], others[i], align)[: len(path)]]
    return other_tree, index
