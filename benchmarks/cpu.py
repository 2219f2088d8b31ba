"""The exhaustive scan on the CPU against the best other ways of doing it, in one process, runs interleaved.

The scores of every timed run are held against the float64 oracle. Ratios are of neighbouring runs, and the floor
is taken at the GEMM rate measured around each run, so that a drift of the machine hits both sides.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console

import shipsfast

from . import peers
from .against import Oracle, floor_rows, show
from .cases import Case
from .floor import floor_flops, gemm_flops_per_s
from .provenance import append, provenance
from .timing import Paths

# What a path may differ from the float64 oracle by, in nats: float32 logits leave the peers' float32 KL
# with about 1e-6, and undifferentiated attention scaled in q_proj or in the logits are the same ablation.
TOLERANCE_NATS = 1e-4
RATE_TOKENS = 1536  # of the products that the floor's rate is taken from: larger ones are no faster
SAMPLED_HEADS = 1  # heads per layer of the one-at-a-time loop; its time is extrapolated to all of them


def ours(model, case: Case) -> shipsfast.ShipsResult:
    return shipsfast.scan(model, case.token_ids(), progress=False, rescored=0)


def _peer(function: Callable) -> Callable:
    def run(model, case: Case) -> np.ndarray:
        return function(model, torch.tensor(case.token_ids())).permute(2, 0, 1).numpy()

    return run


def _sampled(model, case: Case) -> np.ndarray:
    return peers.one_at_a_time(model, torch.tensor(case.token_ids()), SAMPLED_HEADS).permute(2, 0, 1).numpy()


OURS = "shipsfast"
PEERS: dict[str, Callable] = {
    "HF hooks, prompts batched": _peer(peers.hooks_batched),
    "heads x prompts as row masks": _peer(peers.row_masks),
    "layers >= l only, by hand": _peer(peers.skip_lower_layers),
}
LOOP = "one at a time (the paper's code)"


def run_case(case: Case, repeats: int, peaks: bool, console: Console) -> list[dict]:
    """Check, time and append the rows of one case; returns them."""
    model = case.model()
    record = ours(model, case).record  # and a warm-up
    backend = record["attention_backend"]
    oracle = Oracle(
        shipsfast.scan(case.model().double(), case.token_ids(), progress=False, rescored=0),
        _scores,
        TOLERANCE_NATS,
    )
    rates: list[float] = []
    paths = Paths(OURS, [*PEERS, LOOP])
    # The rate of the matrix products is taken right before and after each run of ours.
    for _ in range(repeats):
        for name, path in PEERS.items():
            before = gemm_flops_per_s(case, RATE_TOKENS)
            paths.timed(OURS, lambda: ours(model, case), oracle.check)
            rates.append((before + gemm_flops_per_s(case, RATE_TOKENS)) / 2)
            paths.timed(name, lambda path=path: path(model, case), oracle.check)
            paths.paired(name)
    paths.timed(LOOP, lambda: _sampled(model, case), oracle.check, case.heads / SAMPLED_HEADS)

    common = provenance("cpu") | {
        "bench": "cpu", "case": case.name, "dtype": str(case.dtype).removeprefix("torch."),
        "prompts": case.prompts, "shared_tokens": case.shared, "own_tokens": case.own, "scores": case.num_scores,
        "rescored": 0,
    }  # fmt: skip
    sampled = {LOOP: f"{case.layers * SAMPLED_HEADS} heads"}
    rows = floor_rows(
        common, paths, oracle, case.num_scores, floor_flops(case), rates, ours=OURS, extrapolated=sampled
    )
    for row in rows:
        if "failed" not in row:
            row["resolved_backend"] = backend if row["path"] == OURS else None
            if peaks:
                row["peak_mib"] = _peak_mib(case.name, row["path"])
    append("cpu", rows)
    show(case.name, case.num_scores, rows, console)
    return rows


def _scores(found) -> np.ndarray:
    return found.kl if isinstance(found, shipsfast.ShipsResult) else found


def _peak_mib(case: str, path: str) -> float:
    """Peak resident memory beyond the loaded model, in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks", "peak", case, path], capture_output=True, text=True, check=True
    )
    return float(out.stdout.split()[-1])


def peak(case: Case, path: str) -> float:
    """MiB that `path` adds at its peak to a process that holds the model (Linux)."""
    import gc
    import importlib
    from pathlib import Path

    import psutil

    importlib.import_module("shipsfast.scans.ships")  # the libraries it imports are not what a scan needs

    model = case.model()
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    {OURS: ours, **PEERS, LOOP: _sampled}[path](model, case)
    status = Path("/proc/self/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    return (peak_kib * 1024 - before) / 2**20
