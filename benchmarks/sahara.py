"""What a Sahara search costs beside a KL scan of the same prompts, in one process, runs interleaved.

The question is what stands between a step and a scan: hidden states instead of logits, angles instead of KL, a
group that is already off. Ratios are of neighbouring runs.
"""

from __future__ import annotations

import statistics
import time

from rich.console import Console

import shipsfast

from .cases import Case
from .provenance import append, provenance

STEPS = 3


def run_case(case: Case, repeats: int, console: Console) -> dict:
    """Time a KL scan, one dataset-level scan and a search of STEPS heads; append the row and return it."""
    model, prompts = case.model(), case.token_ids()
    paths = {
        "scan": lambda: shipsfast.scan(model, prompts, progress=False, rescored=0),
        "step": lambda: shipsfast.sahara(model, prompts, group_size=1, progress=False, rescored=0),
        "search": lambda: shipsfast.sahara(model, prompts, group_size=STEPS, progress=False, rescored=0),
    }
    paths["scan"]()
    times: dict[str, list[float]] = {name: [] for name in paths}
    ratios: dict[str, list[float]] = {"step": [], "search": []}
    for _ in range(repeats):
        for name, found in ratios.items():
            # A scan right before and right after: the speed of a shared machine drifts.
            around = [_timed(paths["scan"])]
            taken = _timed(paths[name])
            around.append(_timed(paths["scan"]))
            times["scan"] += around
            times[name].append(taken)
            found.append(taken / statistics.mean(around))
    row = provenance("cpu") | {
        "bench": "sahara", "case": case.name, "dtype": str(case.dtype).removeprefix("torch."),
        "prompts": case.prompts, "shared_tokens": case.shared, "own_tokens": case.own, "steps": STEPS, "runs": repeats, "rescored": 0,
        "scan_median_s": round(statistics.median(times["scan"]), 4),
        "step_median_s": round(statistics.median(times["step"]), 4),
        "search_median_s": round(statistics.median(times["search"]), 4),
        "step_to_scan": round(statistics.median(ratios["step"]), 3),
        "search_to_scan": round(statistics.median(ratios["search"]), 3),
    }  # fmt: skip
    append("sahara", [row])
    console.print(
        f"{case.name}: scan {row['scan_median_s']:.2f} s; one Sahara step {row['step_to_scan']:.2f} x, "
        f"{STEPS} steps {row['search_to_scan']:.2f} x a scan"
    )
    return row


def _timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
