"""After how many prompts a search for the top heads may drop heads, where that saves work.

Prompts that are packed together share the tokens that they begin with. A round is packed on its own and so computes those anew: what is
dropped has to be worth more. Before anything is known of the scores, KEPT of the heads are expected to stay after each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..engine.flops import ModelFlops, scan_flops
from ..results.race import round_ends
from .prepare import Prepared, work_of

KEPT = 0.7
LEAST = 0.05  # of the work, or it is not worth a chance of an error


def chosen_ends(prepared: Prepared, k: int, order: Sequence[int]) -> list[int]:
    """Rising numbers of prompts, the last of them all; that alone where a race would save nothing. order: of the prompts."""
    ends = list(map(int, round_ends(len(order))))
    work = work_of(
        prepared.model, prepared.anatomy, prepared.measurement, prepared.device, fused=prepared.fused
    )
    if work.streamed_bytes:  # every round would read all weights again
        return ends[-1:]
    without = _expected(prepared, work.costs, k, order, ends[-1:])
    found = [
        (_expected(prepared, work.costs, k, order, ends[start:]), ends[start:])
        for start in range(len(ends) - 1)
    ]
    best, rounds = min(found, key=lambda each: each[0], default=(without, ends[-1:]))
    return rounds if best <= (1 - LEAST) * without else ends[-1:]


def _expected(
    prepared: Prepared, costs: ModelFlops, k: int, order: Sequence[int], ends: Sequence[int]
) -> int:
    """FLOPs of such rounds."""
    units, held, ids = prepared.counting(prepared.units), prepared.plan.needs.held, prepared.sequences.ids
    most, total, every = max(map(len, prepared.plan.prompt_groups)), 0, held.in_order(ids)
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        prompts = set(order[start:end])
        groups = held.grouped(ids, [prompt for prompt in every if prompt in prompts], most)
        packs = [held.pack(ids, group) for group in groups]
        left = min(len(units), max(k, round(len(units) * KEPT**number)))
        some = [units[len(units) * at // left] for at in range(left)]
        total += scan_flops(costs, packs, some, ends_alone=prepared.ends_alone)
    return total
