"""Run folders: what is written is what is read, a killed scan continues, another scan is refused."""

import json

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.models.fingerprint import fingerprint
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]


def scan(out, model=None, prompts=PROMPTS, **options):
    return shipsfast.scan(model or build(), prompts, out=out, progress=False, **options)


def test_round_trip(tmp_path):
    result = scan(tmp_path / "run")
    loaded = shipsfast.ShipsResult.load(tmp_path / "run")
    assert np.array_equal(loaded.kl, result.kl)
    assert loaded.noise_floor == result.noise_floor and loaded.top(3) == result.top(3)
    assert loaded.record["status"] == "complete"
    assert loaded.record["attention_backend"] in ("cpp", "torch")


def test_any_run_folder_loads(tmp_path):
    model = build()
    scan(tmp_path / "a", model)
    shipsfast.scan_dataset(model, PROMPTS, out=tmp_path / "b", progress=False)
    shipsfast.sahara(model, PROMPTS, out=tmp_path / "c", group_size=1, progress=False)
    kinds = [type(shipsfast.load(tmp_path / name)).__name__ for name in "abc"]
    assert kinds == ["ShipsResult", "SubspaceResult", "SaharaResult"]
    with pytest.raises(shipsfast.InputError, match=r"it has no run\.json"):
        shipsfast.load(tmp_path)


def test_ablate_takes_what_top_returns():
    model = build()
    top = scan(None, model).top(2)
    ids = torch.tensor([PROMPTS[0]])
    with shipsfast.ablate(model, top):
        first = model(ids).logits
    with shipsfast.ablate(model, [s[:2] for s in top]):
        assert torch.equal(first, model(ids).logits)


def test_save_writes_the_same_folder(tmp_path):
    result = scan(None, heads=[(0, 1), (2, 3)])
    result.save(tmp_path / "saved")
    loaded = shipsfast.ShipsResult.load(tmp_path / "saved")
    assert np.array_equal(loaded.kl, result.kl, equal_nan=True)
    result.save(tmp_path / "saved")  # again: nothing is written twice
    assert len(list((tmp_path / "saved" / "scores").iterdir())) == 1


def test_a_killed_scan_continues(tmp_path, monkeypatch):
    """Killed in its third block: two parts are kept, and only the rest is computed again."""
    whole = scan(None)
    calls = []
    real = shipsfast.engine.growing_batch.GrowingBatch.run

    def run(self, mask, *args, **how):
        calls.append(len(mask) - 1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, mask, *args, **how)

    monkeypatch.setattr("shipsfast.engine.growing_batch.GrowingBatch.run", run)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "run", rows_per_block=4)
    partial = shipsfast.ShipsResult.load(tmp_path / "run")
    assert partial.record["status"] == "running"
    assert np.isnan(partial.kl).sum() == 4 * 3
    scan(tmp_path / "run", rows_per_block=4)
    assert calls == [4, 4, 4, 4]
    resumed = shipsfast.ShipsResult.load(tmp_path / "run")
    np.testing.assert_allclose(resumed.kl, whole.kl, rtol=0, atol=1e-14)
    assert resumed.record["status"] == "complete"


def test_a_finished_scan_is_not_repeated(tmp_path, monkeypatch):
    first = scan(tmp_path / "run")
    monkeypatch.setattr("shipsfast.engine.growing_batch.GrowingBatch.run", None)
    again = scan(tmp_path / "run")
    assert np.array_equal(first.kl, again.kl) and again.noise_floor == first.noise_floor


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(ablation="zero"), "ablation"),
        (dict(scale=1e-3), "ablation"),
        (dict(prompts=[[5, 6, 7, 8], [5, 6, 9], [11, 13]]), "prompts"),
        (dict(heads=[(0, 1)]), "heads"),
        (dict(model="other"), "fingerprint"),
    ],
)
def test_another_scan_is_refused_by_what_differs(tmp_path, change, named):
    scan(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    if change.get("model"):
        change = {"model": build(seed=1)}
    with pytest.raises(shipsfast.InputError, match=f"another run.*{named}"):
        scan(tmp_path / "run", **change)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(shipsfast.InputError, match="is not a shipsfast run"):
        scan(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_scan_that_failed_its_check_fails_again(tmp_path, monkeypatch):
    """All scores are written when the spot check refuses them: a second run must not take them for good."""

    def refuse(*_args):
        raise shipsfast.UnsupportedModelError("refused")

    with monkeypatch.context() as patch:
        patch.setattr("shipsfast.scans.ships._spot_check", refuse)
        for _ in range(2):
            with pytest.raises(shipsfast.UnsupportedModelError, match="refused"):
                scan(tmp_path / "run")
    assert scan(tmp_path / "run").record["spot_check_max_abs"] is not None


def test_a_score_that_is_not_a_number_ends_the_scan(tmp_path):
    model = build(dtype=torch.float32)
    with pytest.raises(shipsfast.InputError, match="head 0-0 on prompt . is not a number"):
        scan(tmp_path / "run", model, scale=1e300)
    assert not (tmp_path / "run" / "scores").exists()


def test_another_config_is_another_model():
    model = build()
    before = fingerprint(model)
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("damage", ["missing", "not json", "other schema"])
def test_a_damaged_manifest_is_named(tmp_path, damage):
    scan(tmp_path / "run")
    manifest = tmp_path / "run" / "run.json"
    if damage == "missing":
        manifest.unlink()
    elif damage == "not json":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    with pytest.raises(shipsfast.InputError, match=r"run\.json"):
        shipsfast.ShipsResult.load(tmp_path / "run")


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    import errno
    import os

    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shipsfast.runs.folder.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        scan(tmp_path / "run")
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def test_fingerprint_sees_one_changed_tensor():
    model = build()
    before = fingerprint(model)
    assert fingerprint(build()) == before
    model.model.layers[1].mlp.up_proj.weight.data *= 1.001
    assert fingerprint(model) != before


def test_out_of_memory_halves_and_gives_the_same_numbers(monkeypatch):
    whole = scan(None)
    real = shipsfast.ops.tree_attention_torch.segment_attention
    failures = []

    def attention(q, *args, **kwargs):
        if q.shape[0] > 3 and len(failures) < 50:
            failures.append(q.shape[0])
            raise torch.OutOfMemoryError("injected")
        return real(q, *args, **kwargs)

    monkeypatch.setattr("shipsfast.ops.tree_attention.segment_attention", attention)
    result = scan(None, backend="torch")
    assert failures
    np.testing.assert_allclose(result.kl, whole.kl, rtol=0, atol=1e-12)
    assert result.record["plan"]["chunk_tokens"] < whole.record["plan"]["chunk_tokens"]


def test_killed_while_the_first_manifest_was_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.abc.tmp").write_text("{")
    scan(tmp_path / "run")
    assert shipsfast.load(tmp_path / "run").record["status"] == "complete"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(shipsfast.InputError, match="is not a shipsfast run"):
        scan(tmp_path / "other")
