"""Models, prompts and answers of the tests of `at=` and `answers=`."""

from __future__ import annotations

import functools

from shipsfast import Ablation
from shipsfast.engine.ablation import KINDS
from tests.support.models import FAMILIES, build
from tests.support.reads_oracle import Reads, mean_values, resample_values, with_answers
from tests.support.tiny_configs import tiny_model

# Softcap and windows, learnt positions, sinks and experts, convolutions between the layers of attention.
MODELS = ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "gpt2", "gpt_oss", "lfm2"]
FUSED = ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window"]  # what goes through the fused layers too
CASES = [(kind, 0.3 if kind == "scale" else 1e-5) for kind in KINDS]
CUT = dict(chunk_tokens=7, rows_per_block=3, prompts_per_group=2)
TOLERANCE = 1e-12

SHARED = [5, 9, 17, 23]
# Other lengths, one beginning, one prompt twice, one that begins differently; some longer than the windows.
PROMPTS = [SHARED + [7, 8, 40], SHARED + [7], SHARED + [7], [30, 31]]
# The second goes on as the first prompt does, and stands behind the fourth too; the first is the longest.
ANSWERS = [[11, 12, 13, 14, 15], [8, 40], [8, 41, 9], [8, 40]]
# As long as the prompts, and of other lengths.
SOURCES = [[30, 31, 32, 4, 11, 40, 8], [30, 31, 32, 4, 4], [1, 31, 32, 4, 4], [5, 9]]
OTHERS = [SHARED + [50, 40], [44, 8], SHARED + [51, 52, 53, 7], [30, 33, 34, 31]]


@functools.cache
def model_of(name: str):
    return build(name) if name in FAMILIES else tiny_model(name)


def how(kind: str, eps: float = 1e-5, at: str = "end", align: str = "exact") -> Ablation:
    prompts = {"exact": SOURCES}.get(align, OTHERS) if kind == "resample" else None
    return Ablation(kind, eps, prompts, align, at=at)


@functools.cache
def expected(
    name: str, kind: str, eps: float = 1e-5, at: str = "end", align: str = "exact", unit: str = "head",
    answered: bool = False,
) -> Reads:  # fmt: skip
    """At each prompt's end, or at each token of its answer."""
    model, others = model_of(name), SOURCES if align == "exact" else OTHERS
    sequences, reads = PROMPTS, [[len(ids) - 1] for ids in PROMPTS]
    if answered:
        sequences, reads = with_answers(PROMPTS, ANSWERS)
        others, _ = with_answers(others, ANSWERS)  # the other prompt is followed by the same answer
    values = None
    if kind == "mean":
        values = [mean_values(model, sequences)] * len(sequences)
    elif kind == "resample":
        values = [resample_values(model, *pair, align) for pair in zip(sequences, others, strict=True)]
    return Reads(model, sequences, reads, kind, eps, at, values, unit)
