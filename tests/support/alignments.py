"""Which position of another prompt stands in for which of a prompt's own, by the definitions of `resample`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def by_definition(own: Sequence[int], other: Sequence[int], align: str) -> list[int | None]:
    """The other prompt's position of each own one, None where it keeps its own."""
    shift = len(other) - len(own)
    if align == "exact":
        assert not shift
    if align in ("exact", "end"):
        return [t + shift if t + shift >= 0 else None for t in range(len(own))]
    first = 0
    while first < min(len(own), len(other)) and own[first] == other[first]:
        first += 1
    last = 0
    while last < min(len(own), len(other)) - first and own[-1 - last] == other[-1 - last]:
        last += 1
    m, n = len(own) - first - last, len(other) - first - last
    middle = [first + int((i + 0.5) * n / m) if n else None for i in range(m)]
    return [*range(first), *middle, *(t + shift for t in range(len(own) - last, len(own)))]


def aligned(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], at: Sequence[int | None]) -> list:
    """Of each layer [T, H, D]: what stands in for every position's output, from the outputs on both prompts."""
    return [
        torch.stack([a[t] if s is None else b[s] for t, s in enumerate(at)])
        for a, b in zip(mine, theirs, strict=True)
    ]
