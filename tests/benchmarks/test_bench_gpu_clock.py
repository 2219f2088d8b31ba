"""Times of kernels shorter than their launch, on a clockwork in the place of a GPU: host and device each have a time, and
the device takes work from a queue."""

from dataclasses import dataclass, field

import pytest
import torch

from benchmarks.gpu import clock

LAUNCH, FLUSH, KERNEL = 30e-6, 90e-6, 8e-6


@dataclass
class Event:
    gpu: "Clockwork"
    at: float

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


@dataclass
class Clockwork:
    """host, busy: seconds until when the host, and what it gave the device, are busy; capture: what becomes of one."""

    capture: bool = True
    host: float = 0.0
    busy: float = 0.0
    spins: list = field(default_factory=list)

    def launch(self, on_device: float, on_host: float = 1e-6) -> None:
        self.host += on_host
        self.busy = max(self.busy, self.host) + on_device

    def now(self) -> float:
        return self.host

    def flush(self) -> None:
        self.launch(FLUSH, 5e-6)

    def event(self) -> Event:
        self.launch(0.0)
        return Event(self, self.busy)

    def spin(self, seconds: float) -> None:
        self.spins.append(seconds)
        self.launch(seconds)

    def wait(self) -> None:
        self.host = max(self.host, self.busy)

    def captured(self, run):
        return (lambda: self.launch(KERNEL, 4e-6)) if self.capture else None


def slow_to_launch(gpu: Clockwork):
    """Ten small kernels, together KERNEL, whose host takes longer than the flush before them lasts."""

    def run() -> None:
        for _ in range(10):
            gpu.launch(KERNEL / 10, LAUNCH)

    return run


def test_events_around_a_call_would_measure_its_launch():
    """What the two ways below are for."""
    gpu = Clockwork()
    gpu.flush()
    start = gpu.event()
    slow_to_launch(gpu)()
    assert start.elapsed_time(gpu.event()) / 1e3 > 10 * KERNEL


@pytest.mark.parametrize(("capture", "way"), [(True, "graph"), (False, "queued")])
def test_a_launch_does_not_count(capture, way):
    gpu = Clockwork(capture)
    timing = clock.timed_on(gpu, slow_to_launch(gpu), 400e-6, 21)
    assert timing.way == way and len(timing.times) == 21
    assert timing.times == pytest.approx([KERNEL] * 21, rel=1e-6)
    assert max(gpu.spins) < 0.02, "spinning costs device time"
    assert timing.figures()["timed_by"] == way


def test_a_run_that_waits_says_that_its_host_counts():
    gpu = Clockwork(capture=False)

    def run() -> None:
        gpu.launch(KERNEL, LAUNCH)
        gpu.wait()

    timing = clock.timed_on(gpu, run, 400e-6, 9)
    assert timing.way == "launched" and len(timing.times) == 9


def test_long_work_is_not_captured():
    gpu = Clockwork()
    timing = clock.timed_on(gpu, lambda: gpu.launch(0.02, LAUNCH), 0.02, 5)
    assert timing.way == "queued" and timing.median == pytest.approx(0.02)
    gpu.captured = lambda run: pytest.fail("a capture")
    clock.timed_on(gpu, lambda: gpu.launch(0.02, LAUNCH), 0.02, 5)


def test_on_a_cpu_the_host_is_the_clock():
    timing = clock.timed(lambda: sum(range(1000)), torch.device("cpu"), budget_s=0.01)
    assert timing.way == timing.figures()["timed_by"] == "host" and len(timing.times) >= 3


class Fails:
    """A capture that fails at its end."""

    def __init__(self, graph) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("where", ["waits", "capture"])
def test_a_run_that_cannot_be_captured_leaves_torch_as_it_was(monkeypatch, where):
    calls, mode = [], [0]

    class Generator:
        def clone_state(self):
            return "free"

        def graphsafe_set_state(self, state):
            calls.append(state)

    def run() -> None:
        calls.append(f"run in mode {mode[0]}")
        if where == "waits" and mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    for name, value in {
        "get_sync_debug_mode": lambda: mode[0], "set_sync_debug_mode": lambda x: mode.__setitem__(0, x),
        "current_stream": lambda device: "main", "set_stream": calls.append, "CUDAGraph": object, "graph": Fails,
        "default_generators": [Generator()], "current_device": lambda: 0, "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(clock.torch.cuda, name, value)
    monkeypatch.setattr(clock.Gpu, "graphs", True)
    gpu = clock.Gpu.__new__(clock.Gpu)
    gpu.device = torch.device("cpu")
    assert gpu.captured(run) is None and mode == [0]
    if where == "waits":
        assert calls == ["run in mode error"] and clock.Gpu.graphs
    else:
        assert calls[-2:] == ["main", "free"] and not clock.Gpu.graphs
        calls.clear()
        assert gpu.captured(run) is None and calls == []
