"""Times of work on a device: CUDA events around each run with a cold L2 cache, host clock on a CPU.

Where a kernel is shorter than what the host takes to launch it, events around the call measure the host. So launches
are on the device's queue before it reaches them: a run is captured as a CUDA graph and replayed (`graph`), or, where that
cannot be, several runs are launched behind a kernel that only spins (`queued`). Where neither works, as with a run that
waits for the device, events are around the call as it is (`launched`), and the host's time may count. Rows say which.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

L2_BYTES = 256 << 20  # written between runs: more than any L2 cache
LONG_S = 5e-3  # from here on a launch does not count, and a graph would only hold memory
BATCH = 8  # runs behind one spin: with their flushes fewer launches than a queue holds
SPIN_MOST_S = 0.1
CYCLES_PER_S = 2.0e9  # of a GPU at its fastest: elsewhere a spin takes longer, which does no harm


@dataclass(frozen=True)
class Timing:
    """Seconds. way: "graph", "queued" or "launched" on a GPU, "host" on a CPU."""

    times: tuple[float, ...]
    way: str = "host"

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
            "runs": len(self.times),
            "timed_by": self.way,
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
    once, _ = seconds(run, device)
    repeats = int(max(3, min(most, budget_s / max(once, 1e-7))))
    if device.type != "cuda":
        return Timing(tuple(seconds(run, device)[0] for _ in range(repeats)))
    return timed_on(Gpu(device), run, once, repeats)


class Gpu:
    """What timing needs of a CUDA device; tests have a clockwork in its place."""

    graphs = True  # of this process: a capture that failed may leave something behind, and is not tried again

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    now = staticmethod(time.perf_counter)

    def flush(self) -> None:
        self._flush.zero_()

    def event(self) -> torch.cuda.Event:
        """Recorded now, on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_S))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def captured(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """A replay of what `run` does on the device, None where it cannot be captured."""
        if not Gpu.graphs:
            return None
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a run that waits is found here, where nothing breaks
        try:
            run()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self.wait()
        stream, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except Exception:  # noqa: BLE001 (there is another way)
            Gpu.graphs = False
            torch.cuda.set_stream(stream)  # where a capture fails at its end, torch stays on its stream
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            with contextlib.suppress(RuntimeError):
                generator.graphsafe_set_state(generator.clone_state())  # a state that is in no capture
            return None
        graph.replay()
        self.wait()
        return graph.replay


def timed_on(gpu: Gpu, run: Callable[[], object], once: float, repeats: int) -> Timing:
    """once: seconds that a run takes, its launch included."""
    replay = gpu.captured(run) if once < LONG_S else None
    if replay is not None:
        return Timing(tuple(_queued(gpu, replay, repeats)[0]), "graph")
    times, ahead = _queued(gpu, run, repeats)
    return Timing(tuple(times), "queued" if ahead else "launched")


def _queued(gpu: Gpu, run: Callable[[], object], repeats: int) -> tuple[list[float], bool]:
    """Seconds of each run, and whether all had been launched before the device reached them."""
    start = gpu.now()
    _launch(gpu, run, min(BATCH, repeats))
    spin_s = 2 * (gpu.now() - start) + 1e-4
    gpu.wait()
    times, always = [], True
    while len(times) < repeats:
        gpu.spin(min(spin_s, SPIN_MOST_S))
        events = _launch(gpu, run, min(BATCH, repeats - len(times)))
        always = always and not events[0][0].query()
        gpu.wait()
        times += [start.elapsed_time(stop) / 1e3 for start, stop in events]
    return times, always


def _launch(gpu: Gpu, run: Callable[[], object], count: int) -> list[tuple]:
    events = []
    for _ in range(count):
        gpu.flush()
        start = gpu.event()
        run()
        events.append((start, gpu.event()))
    return events


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
