"""Resampling the prompts of a dataset-level scan: against scans of the resampled prompts themselves, in float64."""

import functools

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import InputError, SaharaResult, SubspaceResult
from shipsfast.ops.subspaces import resampled_angle_deg
from shipsfast.results import gram_bootstrap
from shipsfast.results.bootstrap import resample_counts
from tests.support.models import HEADS, LAYERS, build

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40], SHARED + [7], SHARED, SHARED + [3, 8, 11, 50, 2], [30, 31, 32], [44, 45]]
TOLERANCE_DEG = 1e-7  # Gram matrices square the ratios of singular values


@functools.cache
def model():
    return build("llama-gqa")


def scan(prompts=PROMPTS, **options) -> SubspaceResult:
    return shipsfast.scan_dataset(model(), prompts, progress=False, **options)


def search(**options) -> SaharaResult:
    return shipsfast.sahara(model(), PROMPTS, progress=False, **options)


def repeated(counts) -> list[list[int]]:
    return [p for p, n in zip(PROMPTS, counts, strict=True) for _ in range(int(n))]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_resample_is_a_scan_of_its_prompts(rank):
    result = scan(rank=rank, rows_per_block=5)
    counts = resample_counts(range(len(PROMPTS)), 6, rank + 1, np.random.default_rng(3))
    assert (counts.max(axis=1) > 1).sum() >= 5, "whole resamples"
    flat = result.grams.heads.reshape(LAYERS * HEADS, len(PROMPTS), -1)
    found = resampled_angle_deg(
        *map(torch.from_numpy, (result.grams.base, flat)), rank, torch.from_numpy(counts)
    )
    for angles, each in zip(found.numpy(), counts, strict=True):
        want = scan(repeated(each), rank=rank).angle_deg
        np.testing.assert_allclose(angles.reshape(want.shape), want, rtol=0, atol=TOLERANCE_DEG)


def test_scratch_does_not_change_the_angles(monkeypatch):
    result = scan()
    args = (torch.from_numpy(result.grams.base), torch.from_numpy(result.grams.heads[1]), 1, torch.eye(6) + 1)
    whole = resampled_angle_deg(*args)
    monkeypatch.setattr("shipsfast.ops.subspaces.SCRATCH_BYTES", 1)
    assert torch.equal(resampled_angle_deg(*args), whole)


def test_stability_is_of_scans_of_resampled_prompts():
    """Frequencies, ranks and the interval of a dozen resamples, each scanned; the jackknife by leaving prompts out."""
    seed, resamples, k = 5, 12, 4
    got = scan().stability(k, resamples=resamples, seed=seed, confidence=0.8)
    counts = resample_counts(range(len(PROMPTS)), resamples, 2, np.random.default_rng(seed))
    angles = np.stack([scan(repeated(each)).angle_deg for each in counts])
    ranks = np.argsort(np.argsort(-angles.reshape(resamples, -1), axis=1), axis=1) + 1
    assert np.array_equal(got.top_k_frequency.ravel(), (ranks <= k).mean(axis=0))
    assert (got.k, got.prompts, got.resamples, got.seed) == (k, len(PROMPTS), resamples, seed)
    assert np.array_equal(got.mean, scan().angle_deg)
    assert (got.rank_low.ravel() >= ranks.min(axis=0)).all()
    assert (got.rank_high.ravel() <= ranks.max(axis=0)).all()
    without = np.stack([scan(PROMPTS[:i] + PROMPTS[i + 1 :]).angle_deg for i in range(len(PROMPTS))])
    low, high = bca(angles, scan().angle_deg, without, 0.8)
    np.testing.assert_allclose(got.low, low, rtol=0, atol=10 * TOLERANCE_DEG)
    np.testing.assert_allclose(got.high, high, rtol=0, atol=10 * TOLERANCE_DEG)


def bca(resampled, observed, without, confidence):
    """Efron & Tibshirani 1993, eqs. 14.9 to 14.15, one head at a time, with the quantile numpy has."""
    from scipy.stats import norm

    out = np.empty((2, *observed.shape))
    for at in np.ndindex(observed.shape):
        values, left = resampled[(slice(None), *at)], without[(slice(None), *at)]
        below = np.clip((values < observed[at]).mean(), 0.5 / len(values), 1 - 0.5 / len(values))
        bias = norm.ppf(below)
        deviation = left.mean() - left
        acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
        for end, tail in enumerate([(1 - confidence) / 2, (1 + confidence) / 2]):
            z = bias + norm.ppf(tail)
            level = norm.cdf(bias + z / (1 - acceleration * z))
            out[(end, *at)] = np.quantile(values, level)
    return out


def test_same_seed_same_result_whatever_k():
    result = scan()
    three, ten = result.stability(3), result.stability(10)
    assert np.array_equal(three.low, ten.low) and three.k == 3 and ten.k == 10
    assert np.array_equal(scan().stability(3).top_k_frequency, three.top_k_frequency)
    assert not np.array_equal(result.stability(3, seed=1).low, three.low)


def test_heads_not_scanned_stay_out():
    found = scan(heads=[(0, 1), (2, None)]).stability(2)
    assert np.isnan(found.top_k_frequency[1]).all() and np.isnan(found.low[0, 0])
    assert found.top_k_frequency[[0, 2, 2, 2, 2], [1, 0, 1, 2, 3]].sum() == pytest.approx(2)


def test_steps_of_a_search():
    result = search(group_size=2, beam=2)
    alone = scan().stability(1)
    first = result.stability()
    assert np.array_equal(first.top_k_frequency, alone.top_k_frequency)
    second = result.stability(step=1)
    assert np.isnan(second.top_k_frequency[result.heads[0]])
    assert np.nansum(second.top_k_frequency) == pytest.approx(1)
    # the score of a set of heads does not depend on which of them was first
    counts = np.array([2, 0, 1, 1, 1, 1])
    others = [(0, 3), (1, 0), (2, 2)]
    assert result.heads[0] not in others
    flat = np.stack([result.grams.heads[1][other] for other in others])
    found = resampled_angle_deg(
        *map(torch.from_numpy, (result.grams.base, flat)), 1, torch.from_numpy(counts[None].astype(float))
    )
    for angle, other in zip(found[0], others, strict=True):
        pair = shipsfast.sahara(
            model(), repeated(counts), group_size=2, heads=[result.heads[0], other], progress=False
        )
        assert abs(float(angle) - pair.scores[1]) <= TOLERANCE_DEG


def test_gain_noise_and_concentration_of_a_search():
    result = search(group_size=3)
    np.testing.assert_array_equal(result.gain_deg[0], result.angle_deg[0])
    np.testing.assert_array_equal(result.gain_deg[2], result.angle_deg[2] - result.scores[1])
    result.noise_floor = float(np.nanmedian(np.abs(result.gain_deg[1])))
    above = result.above_noise()
    assert above.shape == result.angle_deg.shape and not above[np.isnan(result.angle_deg)].any()
    np.testing.assert_array_equal(above[1], np.abs(result.gain_deg[1]) > result.noise_floor)
    shares = [result.concentration(step) for step in range(3)]
    assert [s.heads for s in shares] == [12, 11, 10]
    gains = np.abs(result.gain_deg[2])
    assert shares[2].top_share[1] == pytest.approx(np.nanmax(gains) / np.nansum(gains))
    assert result.record["concentration"] == [s.to_json() for s in shares]
    with pytest.raises(InputError, match="step 3 is not one of 0 to 2"):
        result.concentration(3)


@pytest.mark.parametrize("how", ["scan", "save"])
def test_run_folders_keep_them(tmp_path, how):
    out = tmp_path / "run"
    for run, options in ((scan, {}), (search, dict(group_size=2, beam=2))):
        result = run(**options, **(dict(out=out / run.__name__) if how == "scan" else {}))
        if how == "save":
            result.save(out / run.__name__)
        loaded = shipsfast.load(out / run.__name__)
        for key in ("base", "heads"):
            got, want = getattr(loaded.grams, key), getattr(result.grams, key)
            lower = np.tril_indices(len(PROMPTS))
            np.testing.assert_array_equal(got[..., *lower], want[..., *lower])
            np.testing.assert_array_equal(got, np.swapaxes(got, -1, -2))
        np.testing.assert_allclose(loaded.stability(2).low, result.stability(2).low, rtol=0, atol=1e-9)
        if how == "scan":
            kept = loaded.record["rank_stability"]
            assert kept == (
                result.stability(10).to_json()
                if run is scan
                else [result.stability(1, s).to_json() for s in (0, 1)]
            )


@pytest.mark.parametrize("run", [scan, search])
def test_a_killed_run_keeps_its_own(tmp_path, monkeypatch, run):
    options = dict(rows_per_block=5)
    whole = run(**options)
    calls = []
    real = shipsfast.engine.growing_batch.GrowingBatch.run

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr("shipsfast.engine.growing_batch.GrowingBatch.run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "run", **options)
    again = run(out=tmp_path / "run", **options)
    np.testing.assert_allclose(again.grams.heads, whole.grams.heads, rtol=1e-12)
    np.testing.assert_allclose(again.grams.base, whole.grams.base, rtol=1e-12)


def test_too_many_prompts_are_scanned_without(tmp_path, monkeypatch):
    monkeypatch.setattr(gram_bootstrap, "MOST_BYTES", 8 * LAYERS * HEADS * len(PROMPTS) ** 2 - 1)
    result = scan(out=tmp_path / "run")
    assert result.grams is None and not (tmp_path / "run" / "grams").exists()
    for each in (result, shipsfast.load(tmp_path / "run")):
        with pytest.raises(InputError, match="6 prompts are too many to keep every head's Gram matrix"):
            each.stability()


def test_a_folder_without_them_says_so(tmp_path):
    scan(out=tmp_path / "run")
    for part in (tmp_path / "run" / "grams").iterdir():
        part.unlink()
    with pytest.raises(InputError, match="part-000000.parquet is missing: run the same command again"):
        shipsfast.load(tmp_path / "run").stability()


def test_too_few_prompts_and_bad_settings():
    with pytest.raises(InputError, match="2 distinct prompts cannot be resampled at rank 1: take at least 3"):
        scan(PROMPTS[:2]).stability()
    with pytest.raises(InputError, match="k must be a whole number"):
        scan().stability(0)
    with pytest.raises(InputError, match="confidence must lie between"):
        search(group_size=1).stability(confidence=2)


def test_draws_with_too_few_distinct_prompts_are_drawn_again():
    counts = resample_counts(range(4), 500, 3, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 4).all() and ((counts > 0).sum(axis=1) >= 3).all()
    assert (resample_counts(range(4), 500, 1, np.random.default_rng(0)) > 0).sum(axis=1).min() < 3


@pytest.mark.parametrize("beam", [1, 3])
def test_every_score_of_a_search_comes_with_its_own(beam):
    """All prompts once is no resample at all. With a beam, the best group was not always in the first place."""
    result = search(group_size=3, beam=beam)
    assert any(result.record["path"]) == (beam > 1)
    for step, angles in enumerate(result.angle_deg):
        scored = ~np.isnan(angles)
        both = map(torch.from_numpy, (result.grams.base, result.grams.heads[step][scored]))
        found = resampled_angle_deg(*both, 1, torch.ones(1, len(PROMPTS), dtype=torch.float64))
        np.testing.assert_allclose(found[0], angles[scored], rtol=0, atol=TOLERANCE_DEG)


def test_copies_of_a_prompt_are_one_prompt():
    counts = resample_counts([1, 1, 1, 1, 2, 3, 4, 5], 500, 3, np.random.default_rng(0))
    contents = np.stack([counts[:, :4].sum(axis=1), *counts[:, 4:].T], 1)
    assert ((contents > 0).sum(axis=1) >= 3).all()
    with pytest.raises(InputError, match="2 distinct prompts cannot be resampled at rank 1"):
        scan([PROMPTS[0], PROMPTS[0], PROMPTS[3]]).stability()


def test_a_rank_that_most_resamples_cannot_have():
    with pytest.raises(InputError, match="most resamples of 30 prompts have fewer than 29 distinct"):
        resample_counts(range(30), 200, 29, np.random.default_rng(0))


def test_memory_that_runs_out_loses_no_score(tmp_path, monkeypatch):
    real, calls = shipsfast.ops.subspaces.gram_matrices, []

    def fail_once(x):
        calls.append(1)
        if len(calls) == 2:  # the first is the base's
            raise MemoryError("injected")
        return real(x)

    monkeypatch.setattr("shipsfast.scans.angles.gram_matrices", fail_once)
    result = scan(out=tmp_path / "run")
    loaded = shipsfast.load(tmp_path / "run")
    assert len(calls) > 2 and np.isfinite(loaded.angle_deg).all()
    np.testing.assert_array_equal(loaded.stability(2).low, result.stability(2).low)


def test_a_long_resampling_is_not_begun_by_itself(monkeypatch):
    from shipsfast.results.tables import as_json

    result = search(group_size=1)
    assert "top" in as_json(result, 3)["stability"][0]
    monkeypatch.setattr("shipsfast.results.subspace.QUICK", 1)
    monkeypatch.setattr("shipsfast.ops.subspaces.resampled_angle_deg", None)
    assert "take minutes" in as_json(result, 3)["stability"][0]["not_known"]
    result.plot()
    scan().plot()
