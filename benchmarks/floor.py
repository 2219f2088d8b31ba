"""The least work a scan can be, and the rate at which this machine could do it: shipsfast/engine/flops.py for a case."""

from __future__ import annotations

from shipsfast.engine import flops
from shipsfast.engine.sequences import Sequences
from shipsfast.ops.prefix_tree import pack
from shipsfast.prompts.reads import with_answers

from .cases import AnswerCase, Case


def costs(case: Case) -> flops.ModelFlops:
    return flops.gated_model_flops(
        layers=case.layers, hidden=case.hidden, heads=case.heads, kv_heads=case.heads,
        head_dim=case.hidden // case.heads, intermediate=case.intermediate, vocabulary=case.vocabulary, fused=True,
    )  # fmt: skip


def floor_flops(case: Case) -> float:
    return float(flops.scan_flops(costs(case), [pack(case.token_ids())], case.units))


def answer_floor_flops(case: AnswerCase) -> float:
    """Of heads that are off at the newest token only, at every token of the answers."""
    shape = case.shape
    reads = with_answers(shape.token_ids(), case.answers(), None)
    sequences = Sequences.of(reads.ids, reads.places, each_alone=False)
    packed = pack(sequences.ids, sequences.places)
    return float(flops.scan_flops(costs(shape), [packed], shape.units, ends_alone=True))


def brute_force_flops(case: Case) -> float:
    """What one full forward pass per head, without sharing a prefix, has to do."""
    length = case.shared + case.own
    per_token = case.layers * 2 * (4 * case.hidden**2 + 3 * case.hidden * case.intermediate)
    attention = case.layers * 4 * case.hidden * length * (length + 1) / 2
    passes = (1 + case.layers * case.heads) * case.prompts
    return passes * (length * per_token + attention + 2 * case.hidden * case.vocabulary)


def gemm_flops_per_s(case: Case, chunk_tokens: int, device: str = "cpu", repeats: int = 4) -> float:
    """FLOP/s of one layer's seven matrix products, alone, at the chunk's shape: the median of `repeats`."""
    return flops.gemm_flops_per_s(
        costs(case).products, chunk_tokens, dtype=case.dtype, device=device, repeats=repeats
    )
