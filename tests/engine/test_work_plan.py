"""Scans are cut so that parts are written now and then: by sizes alone, at a bounded price, and to the same bits."""

import os
import signal
import time

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.engine import work_plan
from shipsfast.engine.flops import model_flops, scan_flops
from shipsfast.engine.measurement import ScanExecution
from shipsfast.engine.memory_plan import Held, make_plan
from shipsfast.engine.work_plan import MOST_MORE, Work, cut_by_work
from shipsfast.models.anatomy import inspect_model
from shipsfast.ops.prefix_tree import pack
from shipsfast.runs.manifest import MANIFEST, find_parts, read_manifest
from shipsfast.runs.verify import verify
from shipsfast.scans import scan_bar
from tests.support.faults import PROMPTS, ended, forked, numbers
from tests.support.models import build

LAYERS, HEADS = 20, 40
UNITS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
LONG = [[1, 2, 3, *range(10 * i + 4, 10 * i + 34)] for i in range(60)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep():
    """A shape with so many heads that the unablated row costs little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=80, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def planned(model, seconds, monkeypatch, *, streamed=0, at_once=False, memory=None, **asked):
    """The plan by memory, and the one by work, of parts that take so many seconds."""
    monkeypatch.setattr(work_plan, "PART_SECONDS", seconds)
    anatomy, execution = (
        inspect_model(model, LONG[0], 33),
        ScanExecution(max_memory=memory or 1 << 34, **asked),
    )
    work = Work(model_flops(model, anatomy), CPU, torch.float32, streamed, at_once)
    plan = make_plan(anatomy, LONG, len(UNITS), execution, Held(CPU, torch.float32))
    return plan, cut_by_work(plan, LONG, UNITS, execution, work), work


def flops_of(plan, work, block):
    """The largest group's."""
    return max(scan_flops(work.costs, [pack([LONG[i] for i in g])], block) for g in plan.prompt_groups)


def flops_in_all(plan, work):
    packs = [pack([LONG[i] for i in group]) for group in plan.prompt_groups]
    return scan_flops(work.costs, packs, UNITS, blocks=plan.blocks(UNITS))


@pytest.mark.parametrize("share", [2.0, 0.4, 0.1])
def test_a_part_takes_as_long_as_planned(deep, monkeypatch, share):
    """share: of the whole scan."""
    whole, _, work = planned(deep, 1e9, monkeypatch)
    assert work.flops_per_part == 1e9 * torch.get_num_threads() * work_plan.CPU_THREAD_RATE
    seconds = share * flops_in_all(whole, work) / (torch.get_num_threads() * work_plan.CPU_THREAD_RATE)
    plan, cut, work = planned(deep, seconds, monkeypatch)
    blocks = cut.blocks(UNITS)
    assert [unit for block in blocks for unit in block] == UNITS
    assert max(flops_of(cut, work, block) for block in blocks) <= 1.1 * work.flops_per_part
    assert flops_in_all(cut, work) <= (1 + MOST_MORE) * flops_in_all(plan, work)
    assert (cut == plan) == (share > 1)
    assert cut.predicted_bytes <= plan.predicted_bytes
    assert "steps_per_block" not in plan.to_json()


def test_cutting_costs_a_bounded_share_of_the_work(deep, monkeypatch):
    plan, cut, work = planned(deep, 1e-9, monkeypatch)
    more = flops_in_all(cut, work) / flops_in_all(plan, work) - 1
    assert 0.5 * MOST_MORE < more <= MOST_MORE
    steps = [sum(LAYERS - layer for layer, _ in block) for block in cut.blocks(UNITS)]
    assert max(steps) - min(steps) <= 2 * LAYERS  # blocks of equal work, not of equal numbers of heads


def test_prompts_are_cut_where_heads_are_not_enough(deep, monkeypatch):
    """Only where a row of a smaller pack still fills a chunk."""
    plan, cut, _ = planned(deep, 1e-9, monkeypatch, chunk_tokens=500)
    assert len(plan.prompt_groups) == 1  # of 1,803 tokens
    assert [len(group) for group in cut.prompt_groups] == [30, 30] and cut.needs.tokens == 903
    for how in (dict(chunk_tokens=1000), dict(chunk_tokens=500, at_once=True)):  # too small, or of no use
        _, cut, _ = planned(deep, 1e-9, monkeypatch, **how)
        assert len(cut.prompt_groups) == 1


def test_what_was_asked_for_stays(deep, monkeypatch):
    plan, cut, _ = planned(deep, 1e-9, monkeypatch, rows_per_block=300, prompts_per_group=20)
    assert cut == plan and cut.rows_per_block == 300


def test_blocks_that_memory_makes_small_enough_are_not_cut_again(deep, monkeypatch):
    small, _, work = planned(deep, 1e9, monkeypatch, memory=40 << 20)
    assert small.rows_per_block < len(UNITS) // 4
    largest = max(flops_of(small, work, block) for block in small.blocks(UNITS))
    seconds = 1.05 * largest / (torch.get_num_threads() * work_plan.CPU_THREAD_RATE)
    plan, cut, _ = planned(deep, seconds, monkeypatch, memory=40 << 20)
    assert cut == plan


def test_a_streamed_block_computes_for_what_it_reads(deep, monkeypatch):
    whole, _, work = planned(deep, 1e9, monkeypatch)
    total = flops_in_all(whole, work)
    read = int(total / 3 / work_plan.CPU_FLOPS_PER_BYTE)
    _, cut, _ = planned(deep, 1e-9, monkeypatch, streamed=read)
    assert len(cut.blocks(UNITS)) == 4  # the unablated row's work comes to each
    _, cut, _ = planned(deep, 1e-9, monkeypatch, streamed=total)
    assert len(cut.blocks(UNITS)) == 1


@pytest.fixture
def short_parts(monkeypatch):
    """Parts as small as can be, also of a small model."""
    monkeypatch.setattr(work_plan, "PART_SECONDS", 1e-9)
    monkeypatch.setattr(work_plan, "MOST_MORE", 1.0)


SCANS = {"scan": shipsfast.scan, "scan_dataset": shipsfast.scan_dataset, "sahara": shipsfast.sahara}


@pytest.mark.usefixtures("one_thread", "short_parts")
@pytest.mark.parametrize("name", SCANS)
def test_killed_after_a_part_it_goes_on_with_the_next(tmp_path, monkeypatch, name):
    """To the bits of a run without a folder; also where parts are planned otherwise by then."""
    model, run = build(dtype=torch.float32), SCANS[name]
    out, how = tmp_path / "run", dict(progress=False)
    whole = run(model, PROMPTS, **how)
    blocks = whole.record["plan"]["steps_per_block"]
    child = forked(lambda: run(model, PROMPTS, out=out, **how), lambda: _slow(monkeypatch))
    deadline = time.monotonic() + 60
    listed, manifest = '"scores/part', out / MANIFEST
    while not (manifest.exists() and listed in manifest.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    found = verify(out)
    assert found["verdict"] == "unfinished" and not found["problems"]
    kept = find_parts(read_manifest(out))
    monkeypatch.setattr(work_plan, "PART_SECONDS", 30.0)
    resumed = run(model, PROMPTS, out=out, **how)
    parts = find_parts(read_manifest(out))
    assert 0 < len(kept) < len(parts) and parts[: len(kept)] == kept
    assert resumed.record["plan"]["steps_per_block"] == blocks
    if name == "scan":
        assert numbers(resumed) == numbers(whole)
    else:
        assert resumed.angle_deg.tobytes() == whole.angle_deg.tobytes()
    assert verify(out)["verdict"] == "sound"


def _slow(monkeypatch):
    """A moment passes after each part that is written, so that the kill comes between two of them."""
    from shipsfast.runs.folder import RunFolder

    real = RunFolder.write_parts

    def write(self, frames, **record):
        real(self, frames, **record)
        time.sleep(0.5 if "scores" in frames else 0)

    monkeypatch.setattr(RunFolder, "write_parts", write)


@pytest.mark.usefixtures("one_thread", "short_parts")
def test_a_cut_changes_nothing_beyond_rounding():
    model = build(dtype=torch.float64)
    cut = shipsfast.scan(model, PROMPTS, progress=False)
    whole = shipsfast.scan(model, PROMPTS, progress=False, rows_per_block=12)
    assert "steps_per_block" in cut.record["plan"] and "steps_per_block" not in whole.record["plan"]
    np.testing.assert_allclose(cut.scores, whole.scores, rtol=1e-10, atol=1e-14)


def test_a_block_that_takes_long_is_told_once_and_only_where_it_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan_bar, "PART_SECONDS", 0.0)
    model = build(dtype=torch.float32)
    shipsfast.scan(model, PROMPTS, progress=False)
    assert capsys.readouterr().err == ""
    shipsfast.scan(model, PROMPTS, progress=False, out=tmp_path / "run")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"{tmp_path / 'run'} gets its next part about every" in told[0]
