"""In which dtype a half-precision model's matrix products run on this CPU.

Processors with units for it (AMX, AVX-512 BF16 or FP16) multiply half-precision numbers 2 to 8 times as fast as float32, and
add them up in float32; on others it is emulated, and slower than float32. So it is tried, and not read off a name.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch

LEAST_GAIN = 1.25  # units for it gain more, an emulation loses: what a busy machine adds decides nothing
SIZE = 512  # of the matrices that are multiplied: large enough for a processor's full rate, and done in milliseconds
TRIES = 6  # the first of them sets things up


def products_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself where products are faster in it than in float32 on this CPU, else float32. Any wider dtype is its own."""
    if dtype.itemsize >= 4 or _gain(dtype) >= LEAST_GAIN:
        return dtype
    return torch.float32


@functools.cache
def _gain(dtype: torch.dtype) -> float:
    """How many times as fast products are in half precision, measured once a process.

    One thread's own processor time: what else runs on the machine, and how threads wait for each other, do not count.
    """
    with torch.inference_mode(), _one_thread():
        pairs = {
            each: (torch.ones(SIZE, SIZE, dtype=each), torch.ones(SIZE, SIZE, dtype=each))
            for each in (dtype, torch.float32)
        }
        seconds = dict.fromkeys(pairs, float("inf"))
        # Where the system counts processor time in ticks, the time on the wall.
        fine = time.get_clock_info("thread_time").resolution < 1e-5
        clock = time.thread_time if fine else time.perf_counter
        for _ in range(TRIES):  # in turns: a busy machine is so for both
            for each, (x, weight) in pairs.items():
                start = clock()
                torch.nn.functional.linear(x, weight)
                seconds[each] = min(seconds[each], clock() - start)
    return seconds[torch.float32] / seconds[dtype]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
