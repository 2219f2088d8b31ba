"""The same command twice gives the same bits; what differs between plans is rounding, and bounded."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.ops.extension import extension_status
from tests.support.models import build
from tests.support.numerics import assert_close_abs
from tests.support.places import ROOT
from tests.support.rounding import kl_bound

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9], [11, 12, 13, 14], [5, 6, 7, 30]]


def digest() -> str:
    """Of a scan, a dataset-level scan and drawn texts in float32. The memory that is free does not come in: the chunks
    are given."""
    model, options = build("llama-gqa", torch.float32), dict(progress=False, chunk_tokens=40)
    scores = shipsfast.scan(model, PROMPTS, **options).kl
    angles = shipsfast.scan_dataset(model, PROMPTS, **options).angle_deg
    texts = shipsfast.generate(
        model, PROMPTS, groups=[[], [(0, 1)]], max_new_tokens=5, do_sample=True, progress=False
    )
    return f"{[hashlib.sha256(x.tobytes()).hexdigest() for x in (scores, angles)]} {texts}"


def test_two_processes_give_the_same_bits():
    threads = torch.get_num_threads()
    code = f"import torch; torch.set_num_threads({threads}); from tests.engine.test_determinism import digest; print(digest())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == digest() == digest()


@pytest.mark.parametrize("layers", ["fused", "model"])
def test_repeated_scans_and_resumed_ones_give_the_same_bits(tmp_path, layers):
    model = build(dtype=torch.float32)
    options = dict(progress=False, layers=layers, rows_per_block=4)
    if layers == "fused" and not extension_status()[0]:
        pytest.skip("needs the extension")
    digests = {
        hashlib.sha256(shipsfast.scan(model, PROMPTS, **options).kl.tobytes()).hexdigest() for _ in range(3)
    }
    shipsfast.scan(model, PROMPTS, out=tmp_path / "run", **options)
    parts = sorted((tmp_path / "run" / "scores").iterdir())
    stored = shipsfast.load(tmp_path / "run").kl
    digests.add(hashlib.sha256(stored.tobytes()).hexdigest())
    assert len(digests) == 1 and len(parts) == 3


def test_one_thread_and_two_agree_in_their_own_kernels():
    """A row of the C++ ops is one thread's work. Matrix products are the library's, which may split sums otherwise: at
    these sizes they do not, and the bound in docs/determinism.md holds elsewhere."""
    model, before = build(dtype=torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(shipsfast.scan(model, PROMPTS, progress=False, chunk_tokens=40).kl)
    finally:
        torch.set_num_threads(before)
    assert_close_abs(found[0], found[1], kl_bound(model, PROMPTS, found[1]))


def test_plans_backends_and_layers_differ_by_rounding_only():
    """Every way of cutting and computing the same scan, against the float64 scan: float64 to 1e-13 nats, float32 as far as
    the rounding of its sums goes."""
    exact = shipsfast.scan(build(dtype=torch.float64), PROMPTS, progress=False).kl
    ways = [
        dict(chunk_tokens=tokens, prompts_per_group=group, rows_per_block=rows)
        for tokens, group, rows in ((768, 4, 12), (10, 1, 3), (40, 2, 5))
    ]
    ways += [dict(backend=b, layers="model") for b in ("torch", "reference")]
    wide = [shipsfast.scan(build(dtype=torch.float64), PROMPTS, progress=False, **way).kl for way in ways]
    assert max(np.abs(other - exact).max() for other in wide) <= 1e-13
    model = build(dtype=torch.float64).float()  # float32 draws other weights
    for way in ways:
        found = shipsfast.scan(model, PROMPTS, progress=False, **way).kl
        assert_close_abs(found, exact, kl_bound(model, PROMPTS, exact), str(way))
