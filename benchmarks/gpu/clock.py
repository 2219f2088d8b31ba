"""Times of work on a device: CUDA events around each run with a cold L2 cache, host clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

L2_BYTES = 256 << 20  # written between runs: more than any L2 cache


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    times: tuple[float, ...]

    @property
    def p20(self) -> float:
        return float(np.quantile(self.times, 0.2))

    @property
    def median(self) -> float:
        return float(np.median(self.times))

    @property
    def p80(self) -> float:
        return float(np.quantile(self.times, 0.8))

    def figures(self) -> dict:
        """For a row: seconds where a run takes that long, else milliseconds."""
        unit, scale = ("s", 1.0) if self.median >= 0.5 else ("ms", 1e3)
        found = {"median": self.median, "p20": self.p20, "p80": self.p80}
        return {f"{name}_{unit}": float(f"{x * scale:.5g}") for name, x in found.items()} | {
            "runs": len(self.times)
        }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable, device: torch.device) -> tuple[float, object]:
    """How long a run takes until the device is done, and what it returns."""
    wait(device)
    start = time.perf_counter()
    out = run()
    wait(device)
    return time.perf_counter() - start, out


def timed(
    run: Callable[[], object], device: torch.device, *, budget_s: float, warmup: int = 3, most: int = 100
) -> Timing:
    """Times of a short piece of device work, as many as fit into `budget_s`, three at least."""
    for _ in range(warmup):
        run()
    wait(device)
    flush = None
    if device.type == "cuda":
        flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    once, _ = seconds(run, device)
    repeats = int(max(3, min(most, budget_s / max(once, 1e-7))))
    if flush is None:
        return Timing(tuple(seconds(run, device)[0] for _ in range(repeats)))
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    wait(device)
    return Timing(tuple(start.elapsed_time(stop) / 1e3 for start, stop in events))


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, from where a peak is counted. 0 on a CPU, where nothing is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_mib(device: torch.device, before: int) -> float | None:
    if device.type != "cuda":
        return None
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
