"""The memory plan keeps to its limit, and says so when it cannot."""

from dataclasses import replace

import pytest
import torch

import shipsfast
from shipsfast.engine.measurement import ScanExecution
from shipsfast.engine.memory_plan import Held, Plan, make_plan
from shipsfast.errors import parse_bytes
from shipsfast.models.anatomy import inspect_model
from shipsfast.runs.folder import RunFolder
from tests.support.evaluations import scan_asr
from tests.support.models import build

PROMPTS = [list(range(3, 20)), list(range(3, 40)), [7]]


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("8G", 8 << 30), ("1024", 1024), ("1.5 kib", 1536)],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "8GX"])
def test_bad_amounts_are_refused(text):
    with pytest.raises(shipsfast.InputError, match="amount of memory"):
        parse_bytes(text)


def plan(limit, **options):
    model = build()
    anatomy = inspect_model(model, [1, 2], 40)
    execution = ScanExecution(max_memory=limit, **options)
    return make_plan(anatomy, PROMPTS, 12, execution, Held(torch.device("cpu"), torch.float64))


def test_less_memory_makes_smaller_blocks_and_stays_inside():
    sizes = []
    for limit in (1 << 30, 2 << 20, 1 << 20, 1 << 19, 1 << 18):
        got = plan(limit)
        assert got.predicted_bytes <= limit
        assert sorted(i for group in got.prompt_groups for i in group) == [0, 1, 2]
        sizes.append((-len(got.prompt_groups), got.rows_per_block, got.chunk_tokens))
    assert sizes[0] == (-1, 12, sizes[0][2])
    assert sizes[-1] < sizes[0]


def test_too_little_memory_is_refused_with_the_amount():
    with pytest.raises(shipsfast.InputError, match="needs .* MiB beyond the model"):
        plan(1000)


def test_a_scan_under_a_tight_limit_gives_the_same_numbers():
    model = build()
    full = shipsfast.scan(model, PROMPTS, progress=False)
    tight = shipsfast.scan(model, PROMPTS, progress=False, max_memory=1 << 18)
    assert tight.record["plan"]["rows_per_block"] < 12 or len(tight.record["plan"]["prompt_groups"]) > 1
    assert abs(tight.kl - full.kl).max() < 1e-12


def test_a_smaller_plan_has_a_prediction_of_its_own():
    """That of a scan which asks for the same cut from the beginning."""
    first = plan(1 << 30)
    second = first.smaller()
    asked = plan(1 << 30, rows_per_block=second.rows_per_block, chunk_tokens=second.chunk_tokens)
    assert second.predicted_bytes < first.predicted_bytes
    assert replace(second, head_rows=asked.head_rows)._predicted() == asked
    again = Plan.from_json(second.to_json(), PROMPTS, plan(1 << 20).needs)
    assert again == second and again.smaller() == second.smaller()
    halves = second.regrouped([(i,) for group in second.prompt_groups for i in group], PROMPTS)
    assert halves.predicted_bytes < second.predicted_bytes
    assert Plan.from_json(halves.to_json(), PROMPTS, first.needs) == halves


def test_after_running_out_of_memory_the_plan_recorded_is_the_smaller_one(tmp_path, monkeypatch):
    from shipsfast.engine.decoder import Decoder
    from shipsfast.scans.prepare import Prepared

    def once(owner, name):
        real, calls = getattr(owner, name), []

        def run(*args, **kwargs):
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    model = build()
    runs = {
        "scan": (
            lambda out: shipsfast.scan(model, PROMPTS, out=out, progress=False),
            (Prepared, "growing_batch"),
        ),
        "asr": (lambda out: scan_asr(out=out, heads=[(0, 1)]), (Decoder, "prefill")),
    }
    for name, (run, where) in runs.items():
        whole = run(tmp_path / name).record["plan"]
        once(*where)
        smaller = run(tmp_path / f"{name}-smaller").record["plan"]
        assert 0 < smaller["predicted_bytes"] < whole["predicted_bytes"]
        assert shipsfast.load(tmp_path / f"{name}-smaller").record["plan"] == smaller


def test_a_run_goes_on_with_the_plan_it_had(tmp_path, monkeypatch):
    """With no more memory than the smaller plan needs, which is less than the first one's."""
    model, where = build(), tmp_path / "run"
    first = shipsfast.scan(model, PROMPTS, progress=False).record["plan"]
    calls = []

    def stop(self, part, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, part, *args, **kwargs)

    real = RunFolder.write_part
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            shipsfast.scan(model, PROMPTS, out=where, progress=False)
    plan = shipsfast.load(where).record["plan"]
    assert plan["predicted_bytes"] < first["predicted_bytes"]
    result = shipsfast.scan(model, PROMPTS, out=where, progress=False, max_memory=plan["predicted_bytes"])
    assert result.record["plan"]["rows_per_block"] == plan["rows_per_block"]
    assert result.record["plan"]["chunk_tokens"] == plan["chunk_tokens"]
