"""Run folders in states that users bring about: policies changed midway, links, stray files, partial results saved."""

import json
import shutil

import numpy as np
import pytest

import shipsfast
from shipsfast.runs import lock
from shipsfast.runs.verify import render, verify
from tests.support.command_line import refused
from tests.support.models import build
from tests.support.overflowing import overflowing, scan

ZERO = dict(ablation="zero", rows_per_block=3, prompts_per_group=2)


def first_part(folder):
    return folder / "scores" / "part-000000.parquet"


def held(folder) -> list:
    """Locks on folders below."""
    return [each for each in lock._held.values() if folder in each.folder.parents]


def rows(folder) -> int:
    return sum(part["rows"] for part in json.loads((folder / "run.json").read_text())["parts"])


@pytest.mark.parametrize("finished", [True, False])
def test_marks_are_refused_where_none_are_wanted(tmp_path, finished):
    """And neither their reason nor their rows are touched, so that marking goes on as if nothing had been."""
    model, out = overflowing(), tmp_path / "run"
    whole = scan(model, nonfinite="mark", metric=["kl", "js"], out=out, **ZERO)
    if not finished:
        first_part(out).unlink()
    for other in (model, build(dtype=model.dtype)):  # whose scores are all finite
        with pytest.raises(shipsfast.InputError, match=r"3 marked scores: .*go on with nonfinite='mark'"):
            scan(other, metric=["kl", "js"], out=out, **ZERO)
    again = scan(model, nonfinite="mark", metric=["kl", "js"], out=out, **ZERO)
    for each in (again, shipsfast.load(out)):
        assert np.array_equal(each.kl, whole.kl, equal_nan=True)
        assert json.dumps(each.marks(), sort_keys=True) == json.dumps(whole.marks(), sort_keys=True)
    assert rows(out) == whole.kl.size and verify(out)["verdict"] == "sound", render(verify(out))


def test_a_reason_without_marks_does_not_stay(tmp_path, monkeypatch):
    """Killed between the reason and the first mark: there is nothing to refuse, and in the end nothing to say."""
    model, out = overflowing(), tmp_path / "run"

    def keep(self, scores, group, block):
        if (~np.isfinite(scores)).any():
            raise KeyboardInterrupt
        return real(self, scores, group, block)

    real = shipsfast.scans.score_store.Measure.keep
    with monkeypatch.context() as patch:
        patch.setattr("shipsfast.scans.score_store.Measure.keep", keep)
        with pytest.raises(KeyboardInterrupt):
            scan(model, nonfinite="mark", out=out, **ZERO)
    assert "nonfinite" in json.loads((out / "run.json").read_text())
    with pytest.raises(shipsfast.InputError, match="head 1-2 on prompt 0 is not a number with zero"):
        scan(model, out=out, **ZERO)
    result = scan(build(dtype=model.dtype), out=out, **ZERO)
    assert result.marked is None and "nonfinite" not in json.loads((out / "run.json").read_text())


def test_a_partial_result_leaves_a_finished_folder_finished(tmp_path):
    whole = scan(build(), out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    part = shipsfast.load(tmp_path / "run")
    part.scores[1:], part.record["status"] = np.nan, "running"
    part.save(tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    part.save(tmp_path / "part")
    assert shipsfast.load(tmp_path / "part").record["status"] == "running"
    whole.save(tmp_path / "part")
    assert verify(tmp_path / "part")["verdict"] == "sound"
    part.record["status"] = "complete"  # of the first prompt, and then of more
    part.save(tmp_path / "first")
    part.scores[1], part.record["status"] = whole.scores[1], "running"
    part.save(tmp_path / "first")
    more = shipsfast.load(tmp_path / "first")
    assert more.record["status"] == "complete" and np.isfinite(more.scores).sum() == 2 * more.scores[0].size


def test_a_failed_save_lets_go_of_the_lock(tmp_path, monkeypatch):
    result = scan(build(), out=tmp_path / "run")
    first_part(tmp_path / "run").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "shipsfast.runs.folder.RunFolder._sweep", lambda self: (_ for _ in ()).throw(OSError(5, "I/O"))
        )
        with pytest.raises(shipsfast.errors.WriteError):
            result.save(tmp_path / "run")
    assert not held(tmp_path) and not (tmp_path / "run" / ".lock").exists()
    (tmp_path / "run" / ".x.tmp").mkdir()
    result.save(tmp_path / "run")
    assert (tmp_path / "run" / ".x.tmp").is_dir() and not held(tmp_path)
    assert np.array_equal(shipsfast.load(tmp_path / "run").kl, result.kl)


@pytest.mark.parametrize("name", ["scores", "also", "also/1"])
@pytest.mark.parametrize("use", ["scan", "save"])
def test_nothing_is_written_through_a_link(tmp_path, name, use):
    out, outside = tmp_path / "run", tmp_path / "outside"
    result = scan(build(), metric=["kl", "js"], out=out)
    first_part(out / "also" / "1" if "also" in name else out).unlink()
    shutil.move(out / name, outside)
    (out / name).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(shipsfast.InputError, match=f"{name} is a link"):
        scan(build(), metric=["kl", "js"], out=out) if use == "scan" else result.save(out)
    assert sorted(outside.rglob("*")) == before and not held(tmp_path)


def test_what_nobody_lists_is_removed_by_running_again(tmp_path, capfd):
    out = tmp_path / "run"
    result = scan(build(), out=out)
    stray = out / "scores" / "part-000099.parquet"
    shutil.copy(first_part(out), stray)
    with pytest.raises(shipsfast.InputError, match="run the same command again, which removes it"):
        shipsfast.load(out)
    written = (out / "run.json").read_bytes()
    assert np.array_equal(scan(build(), out=out).kl, result.kl)
    assert f"{stray} is not one of the parts that run.json lists: it is removed" in capfd.readouterr().err
    assert not stray.exists() and (out / "run.json").read_bytes() == written and not held(tmp_path)
    assert verify(out)["verdict"] == "sound"


def test_places_that_cannot_be_are_told_in_one_line(tmp_path, capsys, monkeypatch, model_folder):
    prompts = tmp_path / "p.txt"
    prompts.write_text("mend a kettle\n")
    args = ("scan", model_folder, prompts, "--heads", "0-0", "--template", "none", "--out")
    assert "File name too long" in refused(capsys, *args, tmp_path / ("x" * 300))
    for kind in ("link", "folder"):
        out = tmp_path / kind
        out.mkdir()
        (out / ".lock").symlink_to("nowhere") if kind == "link" else (out / ".lock").mkdir()
        assert ".lock is not the file that a run makes there" in refused(capsys, *args, out)
    (tmp_path / "link" / ".lock").unlink()
    from tests.support.command_line import run

    assert run(capsys, *args, tmp_path / "link", "--quiet")[0] == 0
    shutil.rmtree(tmp_path / "link" / "scores")
    (tmp_path / "link" / "scores").write_text("")
    assert "scores is not a folder: take it away" in refused(capsys, *args, tmp_path / "link")

    def fail(*_args, **_options):
        raise shipsfast.errors.WriteError(71, "Protocol error", "somewhere")

    monkeypatch.setattr("shipsfast.runs.folder.RunFolder.write_parts", fail)
    assert "cannot read or write (somewhere): Protocol error" in refused(capsys, *args, tmp_path / "new")


def test_a_record_does_not_pass_for_what_the_run_is(tmp_path):
    """A loaded result's record, whatever it says, is not the identity or the list of parts of where it is saved."""
    scan(build(), out=tmp_path / "run", rows_per_block=3)
    loaded = shipsfast.load(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    loaded.record |= {"parts": manifest["parts"], "schema": 2, "identity": {}, "checksum": "x"}
    loaded.save(tmp_path / "saved")
    again = shipsfast.load(tmp_path / "saved")
    assert np.array_equal(again.kl, loaded.kl) and again.identity == loaded.identity
    assert len(json.loads((tmp_path / "saved" / "run.json").read_text())["parts"]) == 1
