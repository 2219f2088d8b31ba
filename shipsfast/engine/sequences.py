"""The sequences that a scan packs, and the reads that they have.

As a rule a sequence is a prompt up to its last read. Where a head is off at the read position only, and the model looks beyond a
token outside of attention, or where something in the model looks for the last token of a sequence, every read is a sequence of its
own, which ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """ids: N sequences; places: the positions of each that are read, None for the last of each; prompt: of which prompt each is;
    first: the number of its first read, among the M of all prompts in order."""

    ids: list[list[int]]
    places: list[tuple[int, ...]] | None
    prompt: list[int]
    first: list[int]

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], places: Sequence[tuple[int, ...]] | None, *, each_alone: bool
    ) -> Sequences:
        """ids, places: of the prompts."""
        if places is None:
            return cls(list(map(list, ids)), None, list(range(len(ids))), list(range(len(ids))))
        parts = [
            (i, part)
            for i, own in enumerate(places)
            for part in ([(place,) for place in own] if each_alone else [own])
        ]
        first = np.cumsum([0, *(len(part) for _, part in parts)])[:-1].tolist()
        whole = [list(ids[i][: max(part) + 1]) for i, part in parts]
        return cls(whole, [part for _, part in parts], [i for i, _ in parts], first)

    def reads(self, group: Sequence[int]) -> list[int]:
        """Numbers of the reads of these sequences, in their order."""
        if self.places is None:
            return list(group)
        return [self.first[i] + at for i in group for at in range(len(self.places[i]))]
