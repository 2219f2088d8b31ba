"""Signals, the caller's own code, threads and clocks: nothing is lost, and the model is as it was."""

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.demo.run import PROMPTS as DEMO
from shipsfast.models import ambient, restore
from shipsfast.runs.lock import FolderLock
from shipsfast.runs.verify import verify
from tests.support import warm
from tests.support.faults import PROMPTS, ended, forked, found, numbers, scan
from tests.support.model_state import assert_same, state
from tests.support.models import build
from tests.support.traces import PACKAGE, lines, trace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32)


def test_ctrl_c_between_any_two_lines(tmp_path, model):
    """The lines that put things back among them; but for models/restore.py and ambient.py, in which signals wait."""
    whole, before, draw = numbers(scan(tmp_path / "whole", model)), state(model), random.Random(5)
    settings = ambient.matmul_settings()

    def stop():
        if sys._getframe(2).f_code.co_filename not in (restore.__file__, ambient.__file__):
            raise KeyboardInterrupt

    restoring = (
        f"{PACKAGE}/models/layer_call.py",
    )  # a third of the points lie where forward methods are put back
    count = {files: lines(files, lambda: scan(None, model)) for files in ((PACKAGE,), restoring)}
    stopped = 0
    for number in range(60):
        out = tmp_path / str(number)
        files = (PACKAGE,) if number % 3 else restoring
        trace(files, draw.randint(1, count[files]), [0], stop)()
        try:
            scan(out, model)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.settrace(None)
        assert_same(dict(before), state(model))
        assert not torch.is_inference_mode_enabled() and ambient.matmul_settings() == settings
        if number % 4 == 0:
            assert numbers(scan(out, model)) == whole and verify(out)["verdict"] == "sound"
    assert stopped >= 50
    found("Ctrl-C between two lines", stopped)


def test_a_second_ctrl_c_waits_until_the_model_is_as_before(model):
    before, seen = state(model), []

    def metric(base_logits, ablated_logits, prompt_index):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # while things are put back
            seen.append("went on")

    with pytest.raises(KeyboardInterrupt):
        scan(None, model, metric=metric)
    assert seen == ["went on"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(before, state(model))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_in_one_line(tmp_path, number, status):
    """A real process, signalled when its first part is there; the same command then ends the run."""
    out = tmp_path / "run"
    code = (
        "import shipsfast.scans.ships\n"
        "from shipsfast.cli import main\n"
        "from dataclasses import replace\n"
        "real, small = shipsfast.scans.ships.prepare_passes, dict(rows_per_block=2, prompts_per_group=2)\n"
        "shipsfast.scans.ships.prepare_passes = lambda m, t, what, how: real(m, t, what, replace(how, **small))\n"
        "main()\n"
    )
    arguments = ["scan", MODEL, DEMO / "taboo.csv", "--limit", 40, "--out", out, "-q"]
    process = warm.Warm(code, arguments)
    until = time.monotonic() + 120
    while not list(out.glob("scores/part-000001*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    done = process.wait(60)
    printed, said = done.stdout, done.stderr
    assert done.returncode == status, said
    assert printed.strip() == "" and "Traceback" not in said
    said = [line for line in said.splitlines() if "shipsfast: " in line]  # other packages have their warnings
    assert len(said) == 1 and f"is kept in {out}" in said[0] and "run again to continue" in said[0]
    report = verify(out)
    # At most the temporary file that was just being made.
    assert report["verdict"] == "unfinished" and len(report["leftovers"]) <= 1, report
    found("SIGINT and SIGTERM to the command", 1)


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_an_exception_in_a_metric(tmp_path, model, at):
    before, whole = state(model), scan(None, model, metric=["kl", sound]).also[SOUND]
    _calls[:] = [0, at]
    with pytest.raises(Broken, match="mine"):
        scan(tmp_path / "run", model, metric=["kl", sound])
    assert_same(before, state(model))
    _calls[:] = [0, 0]
    if at > 2:
        assert list((tmp_path / "run" / "scores").glob("part-*"))  # what was finished is kept
    again = scan(tmp_path / "run", model, metric=["kl", sound]).also[SOUND]
    assert np.array_equal(again.scores, whole.scores) and again.noise_floor == whole.noise_floor
    assert verify(tmp_path / "run")["verdict"] == "sound"
    found("exception in a metric", 1)


_calls = [0, 0]
SOUND = "tests.faults.test_fault_stop.sound"


def sound(base_logits, ablated_logits, prompt_index):
    _calls[0] += 1
    if _calls[0] == _calls[1]:
        raise Broken("mine")
    return (ablated_logits - base_logits[prompt_index]).abs().amax(-1)


def test_an_exception_in_a_judge(tmp_path):
    from tests.support.evaluations import evaluate, no_keyword
    from tests.support.failing_judges import Fails
    from tests.support.speaking_models import build as speaker

    talker = speaker("llama-gqa")
    before, whole = state(talker), evaluate(model=talker, judge=no_keyword, batch_rows=6)
    judge = Fails(1, Broken("mine"))
    with pytest.raises(Broken, match="mine"):
        evaluate(out=tmp_path / "run", model=talker, judge=judge, batch_rows=6)
    assert_same(before, state(talker))
    kept = shipsfast.load(tmp_path / "run")
    assert 0 < len(kept.to_pandas()) == judge.judged and not verify(tmp_path / "run")["problems"]
    again = evaluate(out=tmp_path / "run", model=talker, judge=Fails(999), batch_rows=6)
    assert again.labels == whole.labels
    found("exception in a judge", 1)


@pytest.mark.parametrize("at", [1, 7, 30])
def test_an_exception_in_the_progress_bar(tmp_path, monkeypatch, model, at):
    from tqdm import tqdm

    before, whole, calls = state(model), numbers(scan(None, model)), []

    def update(_self, _n=1):
        calls.append(1)
        if len(calls) == at:
            raise Broken("mine")

    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "update", update)
        with pytest.raises(Broken, match="mine"):
            scan(tmp_path / "run", model)
    assert_same(before, state(model))
    assert numbers(scan(tmp_path / "run", model)) == whole
    found("exception in the progress bar", 1)


@pytest.mark.parametrize("error", [Broken("mine"), SystemExit(3)], ids=["exception", "exit"])
def test_a_thread_that_dies(tmp_path, monkeypatch, model, error):
    """The bootstrap of a dataset-level scan runs in threads; all angles are there by then."""
    from shipsfast.ops import subspaces

    real, calls = subspaces._leading_eigenvectors, []

    def once(*args):
        calls.append(threading.current_thread())
        if len(calls) == 40:
            raise error
        return real(*args)

    before, whole = state(model), shipsfast.scan_dataset(model, PROMPTS, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(subspaces, "_leading_eigenvectors", once)
        with pytest.raises(type(error)):
            shipsfast.scan_dataset(model, PROMPTS, out=tmp_path / "run", progress=False)
    assert threading.main_thread() not in calls
    assert_same(before, state(model))
    assert np.array_equal(shipsfast.load(tmp_path / "run").angle_deg, whole.angle_deg)
    again = shipsfast.scan_dataset(model, PROMPTS, out=tmp_path / "run", progress=False)
    assert (
        np.array_equal(again.angle_deg, whole.angle_deg) and "not_known" not in again.record["rank_stability"]
    )
    found("a thread dies", 1)


@pytest.mark.parametrize("names", [["time"], ["time", "monotonic", "perf_counter"]], ids=["date", "all"])
def test_a_clock_that_is_set_back(tmp_path, monkeypatch, model, names):
    """Only the date's clock is ever set back. Should the others be broken, durations are wrong, and nothing is lost."""
    from tests.support.evaluations import evaluate
    from tests.support.speaking_models import build as speaker

    talker, whole = speaker("llama-gqa"), numbers(scan(None, model))
    labels = evaluate(model=talker).labels
    for name in names:
        start = getattr(time, name)()
        back = iter(range(10**9))
        monkeypatch.setattr(time, name, lambda start=start, back=back: start - 3600 * next(back))
    monkeypatch.setattr("shipsfast.answers.label.WRITE_EVERY_S", 0.0)
    result = shipsfast.scan(
        model, PROMPTS, out=tmp_path / "run", rows_per_block=5, prompts_per_group=2, chunk_tokens=16
    )
    answers = evaluate(model=talker, out=tmp_path / "answers", batch_rows=6)
    monkeypatch.undo()
    assert numbers(result) == whole and numbers(shipsfast.load(tmp_path / "run")) == whole
    assert answers.labels == labels
    if names == ["time"]:
        assert result.record["seconds"] >= 0 and result.record["scan_seconds"] >= 0
        assert len(list((tmp_path / "answers" / "completions").iterdir())) > 1
    found("clock set back", 1)


def test_a_second_writer_is_refused(tmp_path, model):
    out = tmp_path / "run"
    out.mkdir()
    lock = FolderLock(out)
    since = lock.owner["since"]
    words = f"is being written to by process {os.getpid()} on .* since {since.replace('+', '.')}: wait"

    def other():
        with pytest.raises(shipsfast.InputError, match=words):
            scan(out, model)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(other).result()
    assert ended(forked(other)) == 0  # another process, which does not know the parent's table
    assert not [p for p in out.iterdir() if p.name != ".lock"]
    lock.release()
    assert not list(out.iterdir())
    whole = numbers(scan(out, model))
    assert not (out / ".lock").exists()

    # While it runs, readers are let in; and a kill lets go of it at once.
    (out / "scores" / "part-000001.parquet").unlink()
    ready = tmp_path / "ready"

    def hold(*_args, **_how):
        ready.touch()
        time.sleep(60)

    def slow():
        shipsfast.runs.folder.RunFolder.write_parts = hold
        scan(out, model)

    child = forked(slow)
    until = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(shipsfast.InputError, match=f"by process {child} on "):
        scan(out, model)
    assert np.isnan(shipsfast.load(out).scores).any() and verify(out)["verdict"] == "unfinished"
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL and (out / ".lock").exists()
    assert numbers(scan(out, model)) == whole
    found("two writers", 3)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    child = forked(lambda: time.sleep(30))
    lock.release()
    FolderLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)
    ended(child)
    assert not Path(tmp_path / ".lock").exists()


def test_no_flock_is_told(tmp_path, monkeypatch, capfd, model):
    import errno

    def none(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("shipsfast.runs.lock.fcntl.flock", none)
    scan(tmp_path / "run", model)
    assert "cannot be locked (No locks available): make sure that no other process" in capfd.readouterr().err


def test_a_signal_while_an_error_is_put_right_is_not_swallowed():
    def fails():
        with restore._OneSignal() as signals:
            signals.closed = True
            signal.raise_signal(signal.SIGINT)
            raise Broken

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
