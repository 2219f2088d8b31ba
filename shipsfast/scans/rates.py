"""How fast this machine multiplies now, and how busy others keep it: short measurements, of which the best is nearest to what a
quiet machine does, and the median to what this one does now."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..engine.flops import gemm_flops_per_s

MEASUREMENTS = 9
LARGEST_BYTES = 64 << 20  # of a matrix whose rate is measured: larger ones are cut, their rate is the same
MOST_TOKENS = 16384  # more make no product faster
LOOK_S = 0.3  # to see what others do
BUSY = 0.25  # of the cores: others that take so much are worth a word


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a layer's matrix products in `count` measurements; others: the share of this machine's cores that were
    busy just before."""

    best: float
    median: float
    count: int
    others: float

    @property
    def warning(self) -> str | None:
        if self.others < BUSY:
            return None
        cores = psutil.cpu_count() or 1
        return (
            f"others keep {self.others * cores:.1f} of {cores} cores busy: what is measured now is slower than this machine "
            "is, and so would be a scan"
        )


def measure_rates(
    products: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> Rates:
    """products: (inputs, outputs) of a layer's matrix products; tokens: that pass it together."""
    others = busy_share()
    most = max(1, LARGEST_BYTES // dtype.itemsize)
    cut = list(dict.fromkeys((a, min(b, max(1, most // a))) for a, b in products))
    found = [
        gemm_flops_per_s(cut, min(tokens, MOST_TOKENS), dtype=dtype, device=device, repeats=1)
        for _ in range(MEASUREMENTS)
    ]
    return Rates(max(found), statistics.median(found), len(found), others)


def busy_share() -> float:
    """Of this machine's cores, while this process waits: what others take."""
    return psutil.cpu_percent(LOOK_S) / 100
