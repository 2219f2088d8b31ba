"""Several metrics in one scan: the numbers of scans of their own, one read of the logits, run folders that continue."""

import shutil

import numpy as np
import pytest

import shipsfast
from shipsfast import InputError
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.ops import divergences
from tests.support.metric_scans import HEADS, PROMPTS, killed_after, scan, to_the_mean_of_all
from tests.support.models import build

METRICS = ["js", "logit_diff:3,7", "kl", "total_variation"]
NAMES = ["js", "logit_diff(3, 7)", "kl", "total_variation"]


@pytest.mark.parametrize("cut", [{}, {"prompts_per_group": 2, "rows_per_block": 2, "chunk_tokens": 8}])
def test_each_is_what_a_scan_of_its_own_gives(cut):
    together = scan([*METRICS, to_the_mean_of_all], **cut)
    results = [together, *together.also.values()]
    assert [r.metric["name"] for r in results[:4]] == NAMES and list(together.also) == [
        r.metric["name"] for r in results[1:]
    ]
    for metric, got in zip([*METRICS, to_the_mean_of_all], results, strict=True):
        alone = scan(metric, **cut)
        np.testing.assert_allclose(got.scores, alone.scores, rtol=1e-12, atol=1e-15)
        assert got.metric == alone.metric and got.top(3)[0][:2] == alone.top(3)[0][:2]
        assert got.noise_floor == pytest.approx(alone.noise_floor, rel=1e-6, abs=1e-13)
        assert got.record["spot_check_max_abs"] < 1e-9 and "concentration" in got.record
    assert np.array_equal(together.also["kl"].kl, together.also["kl"].scores, equal_nan=True)


def test_one_pass_and_one_read_of_the_logits(monkeypatch):
    passes, reads = [], []
    run, read = GrowingBatch.run, divergences.divergence_rows
    monkeypatch.setattr(GrowingBatch, "run", lambda *args, **kw: passes.append(1) or run(*args, **kw))
    monkeypatch.setattr(
        "shipsfast.scans.metrics.divergence_rows", lambda *args, names: reads.append((len(args[1]), names)) or read(*args, names=names)
    )  # fmt: skip
    scan(METRICS)
    assert len(passes) == 1
    whole = [names for rows, names in reads if rows > 1]  # not those of the checks
    assert whole == [["js", "kl", "total_variation"]]


def test_run_folders(tmp_path, monkeypatch):
    out = tmp_path / "run"
    killed_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        scan(METRICS, out=out, rows_per_block=1)
    partial = shipsfast.load(out)
    assert list(partial.also) == NAMES[1:] and partial.record["status"] == "running"
    assert all(np.isfinite(r.scores).sum() == len(PROMPTS) for r in (partial, *partial.also.values()))
    scan(METRICS, out=out, rows_per_block=1)
    loaded, whole = shipsfast.load(out), scan(METRICS)
    for got, want in zip((loaded, *loaded.also.values()), (whole, *whole.also.values()), strict=True):
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-12, atol=1e-15)
        assert got.record["status"] == "complete" and got.metric == want.metric
    assert shipsfast.load(out / "also" / "2").metric["name"] == "kl"

    monkeypatch.setattr(GrowingBatch, "run", None)  # nothing is computed again
    again = scan(METRICS, out=out)
    assert list(again.also) == NAMES[1:]
    with pytest.raises(InputError, match="different further_metrics"):
        scan("js", out=out)
    with pytest.raises(InputError, match="different metric"):
        scan(METRICS[::-1], out=out)
    with pytest.raises(InputError, match="different further_metrics"):
        scan([*METRICS[:3], "reverse_kl"], out=out)


def test_a_lost_part_is_measured_again(tmp_path):
    out = tmp_path / "run"
    scan(METRICS, out=out)
    shutil.rmtree(out / "also" / "2")
    again = scan(METRICS, out=out)
    np.testing.assert_allclose(again.also["kl"].kl, scan("kl").kl, rtol=1e-12, atol=1e-15)
    assert shipsfast.load(out).also["kl"].record["status"] == "complete"


def test_save(tmp_path):
    result = scan(METRICS)
    result.save(tmp_path / "saved")
    loaded = shipsfast.load(tmp_path / "saved")
    assert list(loaded.also) == NAMES[1:]
    np.testing.assert_array_equal(loaded.also["kl"].kl, result.also["kl"].kl)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ([], "there are no metrics"),
        (["kl", "js", "kl"], "two metrics are called kl"),
        (["kl", "no_such"], "no_such"),
    ],
)
def test_refused(metrics, words):
    with pytest.raises(InputError, match=words):
        scan(metrics)


def test_one_without_a_name_keeps_all_out_of_a_folder(tmp_path):
    with pytest.raises(InputError, match="no name of its own"):
        scan(["kl", lambda b, a, i: a[:, 0]], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_not_a_number_names_the_metric():
    def undefined(base_logits, ablated_logits, prompt_index):
        return ablated_logits[:, 0] * (0 if len(ablated_logits) == 1 else float("nan"))

    with pytest.raises(InputError, match="and the metric .*undefined is undefined"):
        shipsfast.scan(build(), PROMPTS, metric=["kl", undefined], heads=HEADS, progress=False)


def test_killed_before_its_manifest(tmp_path, monkeypatch):
    """A folder of a further metric is made, and its manifest is not written."""
    real = shipsfast.runs.folder.RunFolder.write_manifest

    def write(self, record):
        if self.path.name == "2":
            raise KeyboardInterrupt
        real(self, record)

    monkeypatch.setattr("shipsfast.runs.folder.RunFolder.write_manifest", write)
    with pytest.raises(KeyboardInterrupt):
        scan(METRICS, out=tmp_path / "run")
    monkeypatch.undo()
    assert list(shipsfast.load(tmp_path / "run").also) == NAMES[1:2]
    assert list(scan(METRICS, out=tmp_path / "run").also) == NAMES[1:]
