"""Out of memory at any operator call of a scan: halved and gone on with, the same numbers, the model as before."""

import importlib
import random
import traceback
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shipsfast
from shipsfast.memory import OutOfMemory, once_more
from shipsfast.runs.verify import verify
from tests.support.faults import PROMPTS, SIZES, found, scan
from tests.support.model_state import assert_same, state
from tests.support.models import build

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(TorchDispatchMode):
    """Counts operator calls; number `at` (and the `times` - 1 after it) run out of memory."""

    def __init__(self, at: int = 0, times: int = 1, error: type = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.at, self.times, self.error, self.count = at, times, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.at <= self.count < self.at + self.times:
            text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"
            raise self.error("injected" if self.error is not RuntimeError else f"[enforce fail] {text}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return build()  # float64: blocks of other sizes round at 1e-16 or so


def searched(out, model, **more):
    return shipsfast.sahara(
        model, PROMPTS[:2], out=out, group_size=2, progress=False, **SIZES | dict(prompts_per_group=1), **more
    )


def controlled(out, model):
    return searched(out, model, control=PROMPTS[1:3], penalty=5)


def top(out, model):
    how = SIZES | dict(k=2, screen="float32", progress=False)
    return shipsfast.top_heads(model, PROMPTS, out=out, **how)


RUNS = {
    "scan": (scan, lambda r: r.scores, 24),
    "callable metric": (
        lambda out, model: scan(out, model, metric=["kl", all_prompts]), lambda r: r.also[METRIC].scores, 8,
    ),
    "fused off": (lambda out, model: scan(out, model, layers="model", ablation="mean"), lambda r: r.scores, 8),
    "top": (top, lambda r: r.per_prompt, 12),
    "sahara": (searched, lambda r: r.angle_deg, 8),
    "sahara with a control": (controlled, lambda r: r.control_by_prompt, 8),
}  # fmt: skip
METRIC = "tests.faults.test_fault_memory.all_prompts"


def all_prompts(base_logits, ablated_logits, prompt_index):
    return (ablated_logits - base_logits[prompt_index]).abs().amax(-1)


@pytest.mark.parametrize("name", RUNS)
def test_out_of_memory_at_any_operator(tmp_path, monkeypatch, model, name):
    run, what, points = RUNS[name]
    checked = []  # the checks that a run makes once are made again if they run out of memory
    for place in ("ships.packing_noise_nats", "angles.check_hidden"):
        module, name_of_check = place.split(".")
        real = getattr(importlib.import_module(f"shipsfast.scans.{module}"), name_of_check)
        monkeypatch.setattr(
            f"shipsfast.scans.{place}", lambda *a, real=real: (real(*a), checked.append(1))[0]
        )
    whole, before, draw = what(run(tmp_path / "whole", model)), state(model), random.Random(3)
    with Calls() as calls:
        run(tmp_path / "counted", model)
    errors, smaller = [torch.OutOfMemoryError, RuntimeError, MemoryError], 0
    for number in range(points):
        at = draw.randint(1, calls.count) if number else 1
        out = tmp_path / f"{number}"
        with Calls(at, error=errors[number % 3]):
            result = run(out, model)
        np.testing.assert_allclose(what(result), whole, rtol=0, atol=1e-11, err_msg=f"operator {at}")
        loaded = shipsfast.load(out)
        assert (
            np.array_equal(what(loaded), what(result), equal_nan=True) and verify(out)["verdict"] == "sound"
        )
        assert checked
        checked.clear()
        plans = [result.record[name] for name in ("plan", "control_plan") if name in result.record]
        plans += result.record.get("plans", {}).values()
        smaller += min(plan["chunk_tokens"] for plan in plans) < SIZES["chunk_tokens"]
        assert_same(dict(before), state(model))
    assert smaller > points / 3, smaller  # in most places it is a block that is done again
    found("out of memory", points)


def test_no_memory_at_all_says_so_and_keeps_what_is_there(tmp_path, model):
    before = state(model)
    with Calls() as calls:
        whole = scan(tmp_path / "whole", model, rescored=0)  # which goes on without memory
    for share in (0.0, 0.75, 0.999):  # looking at the model is a large part of so small a scan
        out = tmp_path / str(share)
        with (
            Calls(int(1 + share * calls.count), 10**9),
            pytest.raises(shipsfast.InputError, match="out of memory"),
        ):
            scan(out, model, rescored=0)
        assert_same(dict(before), state(model))
        assert share == 0.0 or (list(out.glob("scores/part-*")) and verify(out)["verdict"] == "unfinished")
        np.testing.assert_allclose(scan(out, model, rescored=0).kl, whole.kl, rtol=0, atol=1e-12)
    found("out of memory", 3)


def test_no_memory_to_write_a_part_loses_no_score(tmp_path, monkeypatch, model):
    """The scores of a block that could not be written are missing, and are computed and written again."""
    import pandas as pd

    real, calls = pd.DataFrame.to_parquet, []

    def write(self, *args, **kwargs):
        calls.append(len(self))
        if len(calls) == 3:
            raise MemoryError
        return real(self, *args, **kwargs)

    whole = scan(None, model)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", write)
    result = scan(tmp_path / "run", model)
    np.testing.assert_allclose(result.kl, whole.kl, rtol=0, atol=1e-12)
    assert np.array_equal(shipsfast.load(tmp_path / "run").kl, result.kl)
    assert verify(tmp_path / "run")["verdict"] == "sound"
    found("out of memory", 1)


def test_the_first_try_is_gone_before_the_caches_are_emptied(monkeypatch):
    """Else its tensors are still in use, and nothing goes back to the device."""
    alive = []

    def fails():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("injected")

    def empty_cache():
        alive.append(alive[0]() is not None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    with pytest.raises(OutOfMemory, match="while adding up") as caught:
        once_more("adding up", fails)
    assert alive[1] is False
    lines = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert lines[-1].name == "fails"  # where it happened is still known
