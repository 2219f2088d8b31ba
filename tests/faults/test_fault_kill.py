"""Killed at any moment: what is listed is whole, and the run ends in the same numbers, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.runs.manifest import BACKUP
from shipsfast.runs.verify import verify
from tests.support.faults import PROMPTS, SIZES, ended, forked, found, numbers, scan
from tests.support.models import build
from tests.support.traces import PACKAGE, lines, trace

pytestmark = pytest.mark.usefixtures("one_thread")

WRITERS = tuple(
    os.path.join(PACKAGE, name)
    for name in ("runs/folder.py", "runs/whole_files.py", "runs/manifest.py", "runs/lock.py")
)
POINTS = 56
KILLS = 12  # by the clock


def whole_parts(folder) -> None:
    """Whatever was killed: nothing that is listed is damaged."""
    if (folder / "run.json").exists():
        report = verify(folder)
        assert report["verdict"] in ("unfinished", "sound") and not report["problems"], report


def test_sigkill_anywhere_in_a_scan(tmp_path):
    model, draw = build(dtype=torch.float32), random.Random(7)
    whole = numbers(scan(tmp_path / "whole", model))
    count = {
        files: lines(files, lambda files=files: scan(tmp_path / f"count {len(files)}", model))
        for files in ((PACKAGE,), WRITERS)
    }
    killed, states = 0, set()
    for number in range(POINTS):
        files = (PACKAGE,) if number % 2 else WRITERS
        out = tmp_path / str(number)
        child = forked(lambda out=out: scan(out, model), trace(files, draw.randint(1, count[files]), [0]))
        status = ended(child)
        assert status == -signal.SIGKILL
        killed += 1
        whole_parts(out)
        states.add(len(list(out.glob("scores/part*"))))
        resumed = scan(out, model)
        assert numbers(resumed) == whole and numbers(shipsfast.load(out)) == whole
        report = verify(out)
        assert report["verdict"] == "sound"
        # What is left where the kill came after everything was done: a lock, and the copy of the manifest half made.
        left = [Path(x["path"]).name for x in report["leftovers"]]
        assert all(name in (".lock", BACKUP) or name.startswith(f".{BACKUP}.") for name in left), left
    assert killed == POINTS and len(states) >= 5, states  # they lie all over the scan
    found("SIGKILL in a scan", killed)


def test_sigkill_by_the_clock(tmp_path):
    model, draw = build(dtype=torch.float32), random.Random(8)
    started = time.perf_counter()
    whole = numbers(scan(tmp_path / "whole", model))
    takes, killed, run = time.perf_counter() - started, 0, 0
    for _ in range(4 * KILLS):
        out = tmp_path / f"run {run}"  # one folder gets on between kills
        child = forked(lambda out=out: scan(out, model))
        time.sleep(draw.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        whole_parts(out)
        if status == -signal.SIGKILL:
            killed += 1
        else:  # it was through before: sooner the next time, in a folder of its own
            assert status == 0 and numbers(shipsfast.load(out)) == whole
            takes, run = takes / 2, run + 1
        if killed == KILLS:
            break
    assert killed == KILLS
    assert numbers(scan(out, model)) == whole and verify(out)["verdict"] == "sound"
    found("SIGKILL in a scan, by the clock", killed)


def _others():
    from tests.support.evaluations import CONTROL, GROUPS, evaluate, scan_asr
    from tests.support.evaluations import PROMPTS as TEXTS
    from tests.support.speaking_models import build as speaker

    model, talker = build(dtype=torch.float32), speaker("llama-gqa")

    def angles(result):
        found = (result.angle_deg, result.grams.base, result.grams.heads, np.float64(result.noise_floor))
        return [x.tobytes() for x in found] + [result.record["base_singular_values"]]

    def searched(result):
        return angles(result) + [result.heads, result.record["repeated_angle_max_abs_deg"]]

    def answers(result):
        return [
            result.completions.label.tobytes(),
            result.completions.sha256.tolist(),
            result.completions.nll_nats.tobytes(),
            result.control.completions.nll_nats.tobytes(),
            result.control.kl_nats.tobytes(),
        ]

    how = dict(progress=False, **SIZES)
    ordinary = dict(control=CONTROL[:2], control_tokens=3, batch_rows=4, model=talker)
    others = [[prompt[-1], *prompt] for prompt in PROMPTS[:3]]
    return {
        "scan with a control": (
            lambda out: shipsfast.scan(model, PROMPTS, control=others, out=out, **how),
            lambda result: [numbers(result), numbers(result.control)],
            8,
        ),
        "top_heads": (
            lambda out: shipsfast.top_heads(model, PROMPTS, out=out, k=2, screen="bfloat16", **how),
            lambda r: [r.per_prompt.tobytes(), r.screened.tobytes(), r.upper.tobytes(), r.heads, r.certificate.to_json()], 8,
        ),
        "scan_dataset": (lambda out: shipsfast.scan_dataset(model, PROMPTS, out=out, **how), angles, 6),
        "sahara": (
            lambda out: shipsfast.sahara(model, PROMPTS, out=out, group_size=2, beam=2, **how), searched, 6,
        ),
        "sahara with a control": (
            lambda out: shipsfast.sahara(
                model, PROMPTS, out=out, group_size=2, control=PROMPTS[:2], penalty=9, **how
            ),
            lambda r: [*searched(r), r.control_by_prompt.tobytes()], 6,
        ),
        "evaluate": (lambda out: evaluate(TEXTS[:3], out=out, groups=GROUPS[:3], **ordinary), answers, 3),
        "scan_asr": (
            lambda out: scan_asr(out=out, heads=[(0, 1), (2, 2)], model=talker), lambda r: [r.scores.tobytes()], 3,
        ),
    }  # fmt: skip


def test_sigkill_in_the_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("shipsfast.answers.label.WRITE_EVERY_S", 0.0)
    draw, killed = random.Random(9), 0
    for name, (run, what, points) in _others().items():
        whole = what(run(tmp_path / name))
        count = lines(WRITERS, lambda name=name, run=run: run(tmp_path / f"{name} counted"))
        for number in range(points):
            out = tmp_path / f"{name} {number}"
            child = forked(lambda out=out, run=run: run(out), trace(WRITERS, draw.randint(1, count), [0]))
            assert ended(child) == -signal.SIGKILL
            killed += 1
            whole_parts(out)
            assert what(run(out)) == whole and what(shipsfast.load(out)) == whole, (name, number)
            assert verify(out)["verdict"] == "sound", (name, number)
    found("SIGKILL in runs of the other kinds", killed)
