"""The memory model: plans of true shapes within 80 and 24 GB, peaks of real scans beside their prediction, and what
happens when there is less memory than was promised."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shipsfast
from benchmarks.gpu.scans import SCANS
from shipsfast.engine.measurement import ScanExecution
from shipsfast.engine.memory_plan import CUDA_CHUNK_TOKENS, Held, block_parts, make_plan, peak_bytes
from shipsfast.models.anatomy import LOGIT_COPIES, Anatomy, Block, Layer, inspect_model
from tests.support import memory_child
from tests.support.models import build
from tests.support.places import ROOT

GIB = 1 << 30
HELD = Held(torch.device("cuda"), torch.bfloat16)


def child(*cases: str) -> list[dict]:
    # Memory that is freed goes back at once: how much of it glibc keeps for later differs by 15 MiB from run to run.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_child", *cases], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(cases) :]]


def anatomy(shape) -> Anatomy:
    """Of a model that nobody has to hold in memory."""
    width = sum(outputs for _, outputs in shape.costs().products) + 8 * shape.hidden
    layer = Layer("layer", torch.nn.Identity(), torch.nn.Identity(), None, torch.device("cuda"))
    return Anatomy(
        layers=(layer,) * shape.layers, num_heads=shape.heads, num_kv_heads=shape.kv_heads, uniform_kv_heads=True,
        head_dim=shape.head_dim, hidden_size=shape.hidden, vocab_size=shape.vocabulary, work_width=width,
        logit_copies=LOGIT_COPIES if shape.family == "gemma2" else 1, value_dim=shape.head_dim,
        blocks=(Block(layer.module, 0, layer.device),) * shape.layers, looks_beyond=False, index_limit=None, longest=200,
    )  # fmt: skip


@pytest.mark.parametrize("case", SCANS.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("memory_gb", [80, 24])
def test_true_shapes_fit(case, memory_gb):
    shape = case.shape
    weights = sum(x.keys_values + x.rest for x in shape.costs().layers) + 2 * shape.costs().head
    limit = int(0.9 * (memory_gb * 1e9 - weights))
    ids = case.prompts.token_ids(shape.vocabulary)
    heads = shape.layers * shape.heads
    limited = ScanExecution(max_memory=limit)
    plan = make_plan(anatomy(shape), ids, heads, limited, HELD)
    assert plan.predicted_bytes <= limit
    assert sorted(i for group in plan.prompt_groups for i in group) == list(range(len(ids)))
    if memory_gb == 80:
        assert plan.chunk_tokens == CUDA_CHUNK_TOKENS and len(plan.prompt_groups) == 1
        assert plan.rows_per_block == heads, "one block, so that no base row runs twice"
    else:
        assert plan.rows_per_block >= 64, "blocks are still large enough to share the base row"


def test_more_memory_never_makes_blocks_smaller():
    shape = SCANS["llama2-7b-short"].shape
    ids = SCANS["llama2-7b-short"].prompts.token_ids(shape.vocabulary)
    rows = []
    for limit in (2, 4, 8, 16, 32, 64):
        limited = ScanExecution(max_memory=limit * GIB)
        plan = make_plan(anatomy(shape), ids, 1024, limited, HELD)
        assert plan.predicted_bytes <= limit * GIB
        more = peak_bytes(
            block_parts(
                anatomy(shape), plan.rows_per_block + 2, 1777, 100, plan.chunk_tokens, plan.head_rows, 2, 2
            )
        )
        if len(plan.prompt_groups) == 1 and plan.rows_per_block < 1024:
            assert more > limit * GIB, "the block is as large as fits"
        rows.append(plan.rows_per_block / len(plan.prompt_groups))
    assert rows == sorted(rows) and rows[-1] == 1024


@pytest.mark.parametrize(
    ("family", "copies"), [("llama-gqa", 1), ("gpt2", 1), ("gemma2-softcap-window", LOGIT_COPIES)]
)
def test_what_a_model_does_to_its_logits_is_seen(family, copies):
    model = build(family)
    if family.startswith("gemma2"):
        model.config.final_logit_softcapping = 5.0
    assert inspect_model(model, [1, 2, 3], 8).logit_copies == copies


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peaks are read from Linux's /proc, and its limits hold",
)
def test_peaks_are_near_their_prediction_and_too_little_memory_is_survived():
    """To a tenth, and 5 MiB for the scan's checks of itself. What the allocator keeps of freed memory comes on top."""
    cases = ("peak wide 0", "peak vocabulary 0", "peak wide 60")
    *peaks, starved = child(*cases, "starved")
    for case, found in zip(cases, peaks, strict=True):
        predicted = found["plan"]["predicted_bytes"] / 2**20
        assert predicted > 50, f"{case}: too small to tell"
        assert 0.75 * predicted <= found["peak_mib"] <= 1.1 * predicted + 5, case
    assert starved["second"]["rows_per_block"] < starved["first"]["rows_per_block"]
    assert starved["second"]["chunk_tokens"] < starved["first"]["chunk_tokens"]
    assert starved["difference"] < 1e-6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_peaks_of_heads_off_at_the_end_only_are_no_higher_than_predicted():
    """What their attention gathers and makes is bounded, and the plan knows it: it does not grow with the prompts."""
    cases = [f"ends {shape}" for shape in memory_child.ENDS]
    for case, found in zip(cases, child(*cases), strict=True):
        predicted = found["plan"]["predicted_bytes"] / 2**20
        assert predicted / 3 <= found["peak_mib"] <= 1.1 * predicted + 5, f"{case}: {found}"


def test_no_tensor_waits_for_the_garbage_collector():
    """A cycle that holds hidden states keeps a whole block alive while the next one runs."""
    subject = memory_child.model("tiny")
    ids = memory_child.prompts(4, 3, 5)
    how = dict(progress=False, layers="model", rows_per_block=2)
    shipsfast.scan(subject, ids, **how)
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        shipsfast.scan(subject, ids, **how)
        gc.collect()
        held = [tuple(x.shape) for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not held
