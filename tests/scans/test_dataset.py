"""Dataset-level Ships against forward hooks, numpy's SVD and scipy's principal angles (tests/support/hooks.py), in float64."""

import functools
import json

import numpy as np
import pytest
import scipy.linalg
import torch

import shipsfast
from shipsfast import Ablation, SubspaceResult
from shipsfast.engine.ablation import KINDS
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.ops.extension import extension_status
from shipsfast.ops.subspaces import leading_subspace, subspace_angle_deg
from tests.support import hooks
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs

TOLERANCE_DEG = 1e-9
HIDDEN = 32  # of the tiny models

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40], SHARED + [7], SHARED, SHARED + [3, 8, 11, 50, 2], [30, 31, 32], [44, 45]]
SOURCES = [[(7 * i + t) % 60 for t in range(len(ids))] for i, ids in enumerate(PROMPTS)]
CUT = dict(chunk_tokens=20, rows_per_block=5, prompts_per_group=2)
FAMILIES = ["llama-mha", "llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "gpt2"]

needs_extension = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)
model_of = functools.cache(build)


@functools.cache
def oracle(family: str, kind: str = "undifferentiated", eps: float = 1e-5) -> hooks.Oracle:
    return hooks.Oracle(model_of(family), PROMPTS, kind, eps, SOURCES if kind == "resample" else None)


def scan(family: str = "llama-gqa", prompts=PROMPTS, **options) -> SubspaceResult:
    options = {"progress": False} | options
    return shipsfast.scan_dataset(model_of(family), prompts, **options)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_angles_equal_hooks(family, rank):
    expected = oracle(family).angles_deg(rank)
    assert (expected.max(1) > 0.01).all(), "the ablations of this model do not show in every layer"
    assert_close_abs(scan(family, rank=rank, layers="model").angle_deg, expected, TOLERANCE_DEG)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_cut_into_chunks_blocks_and_groups(family, rank):
    for options in (dict(), dict(backend="torch"), dict(backend="reference")):
        got = scan(family, rank=rank, layers="model", **CUT, **options)
        assert_close_abs(got.angle_deg, oracle(family).angles_deg(rank), TOLERANCE_DEG, str(options))


@needs_extension
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
def test_fused_layers_equal_hooks(family):
    for options in ({}, CUT):
        got = scan(family, rank=2, layers="fused", **options)
        assert got.record["layers"] == "fused"
        assert_close_abs(got.angle_deg, oracle(family).angles_deg(2), TOLERANCE_DEG, str(options))


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("kind", KINDS)
def test_every_ablation_equals_hooks(kind):
    how = Ablation(kind, 0.3, SOURCES if kind == "resample" else None)
    expected = oracle("llama-gqa", kind, 0.3).angles_deg(2)
    assert_close_abs(scan(rank=2, ablation=how).angle_deg, expected, TOLERANCE_DEG)


def test_whole_key_value_groups():
    got = scan(rank=2, unit="kv_group")
    assert got.unit == "kv_group"
    assert_close_abs(got.angle_deg, oracle("llama-gqa").angles_deg(2, "kv_group"), TOLERANCE_DEG)


def test_some_heads_only():
    got = scan(rank=2, heads=[(2, 1), (0, None)]).angle_deg
    scanned = np.zeros((LAYERS, HEADS), bool)
    scanned[2, 1] = scanned[0] = True
    assert np.array_equal(~np.isnan(got), scanned)
    assert_close_abs(got[scanned], oracle("llama-gqa").angles_deg(2)[scanned], TOLERANCE_DEG)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("rank", [1, 5, HIDDEN])
def test_more_prompts_than_dimensions(rank):
    expected = some(many().angles_deg(rank, among=SOME))
    for options in ({}, dict(chunk_tokens=50, rows_per_block=2, prompts_per_group=7)):
        got = scan(prompts=many().prompts, rank=rank, heads=SOME, **options)
        assert_close_abs(some(got.angle_deg), expected, TOLERANCE_DEG, str(options))


SOME = [(0, 0), (0, 3), (1, 1), (2, 2)]


def some(angles: np.ndarray) -> np.ndarray:
    assert np.isnan(angles).sum() == angles.size - len(SOME)
    return angles[tuple(zip(*SOME, strict=True))]


@functools.cache
def many() -> hooks.Oracle:
    prompts = [[3 + i, (11 * i) % 60] for i in range(HIDDEN + 5)]
    return hooks.Oracle(model_of("llama-gqa"), prompts, "undifferentiated")


@pytest.mark.usefixtures("each_way")
def test_duplicates_weigh_twice():
    """A duplicate is a row of X like any other: it turns the subspace, and the order of prompts does not."""
    prompts = [PROMPTS[0], *PROMPTS[:4], PROMPTS[1], PROMPTS[0]]
    expected = hooks.Oracle(model_of("llama-gqa"), prompts, "undifferentiated").angles_deg(2)
    assert abs(expected - oracle("llama-gqa").angles_deg(2)).max() > 0.1
    for options in ({}, CUT):
        assert_close_abs(
            scan(prompts=prompts, rank=2, **options).angle_deg, expected, TOLERANCE_DEG, str(options)
        )
    turned = scan(prompts=prompts[::-1], rank=2).angle_deg
    assert_close_abs(turned, expected, TOLERANCE_DEG, "reversed")


@pytest.mark.usefixtures("each_way")
def test_one_prompt_spans_everything():
    """U is [1, 1]: no head can turn it."""
    got = scan(prompts=PROMPTS[:1]).angle_deg
    assert got.shape == (LAYERS, HEADS) and np.array_equal(got, np.zeros_like(got))


@pytest.mark.usefixtures("each_way")
def test_as_many_directions_as_prompts_span_everything():
    got = scan(prompts=PROMPTS[:3], rank=3).angle_deg
    assert_close_abs(got, np.zeros_like(got), TOLERANCE_DEG)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("rank", [1, 3])
def test_very_small_angles(rank):
    """Far below what an arccosine can see (1e-6 degrees in float64), and as exact as float64 hidden states are.

    GPT-2, because the norms of Llama round to float32. `noise` is the angle that rounding makes: heads scaled by one
    unit in the last place.
    """
    model = model_of("gpt2")
    expected = hooks.Oracle(model, PROMPTS, "scale", 1 - 1e-9).angles_deg(rank)
    assert 1e-10 < expected.min() and expected.max() < 1e-6
    noise = hooks.Oracle(model, PROMPTS, "scale", 1 - 2**-53).angles_deg(rank).max()
    assert noise < 1e-3 * expected.min()
    got = scan("gpt2", rank=rank, ablation="scale", scale=1 - 1e-9).angle_deg
    assert_close_abs(got, expected, 10 * noise)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("prompts", ["few", "many"])
@pytest.mark.parametrize("ratio", [1e-3, 1e-8])
def test_a_direction_that_all_prompts_share(ratio, prompts):
    """Singular values that are a small part of the first: their vectors are as well determined as float64 has them.

    GPT-2 whose hidden states are a common vector, and little else.
    """
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias += torch.linspace(1, 2, HIDDEN)
        model.transformer.ln_f.weight *= ratio
    exact = hooks.Oracle(model, PROMPTS if prompts == "few" else many().prompts, "zero")
    values = np.linalg.svd(exact.hidden(), compute_uv=False)
    assert ratio / 10 < values[1] / values[0] < 10 * ratio
    expected = some(exact.angles_deg(2, among=SOME))
    got = shipsfast.scan_dataset(
        model, exact.prompts, rank=2, ablation="zero", heads=SOME, prompts_per_group=20, progress=False
    )
    rounding_deg = np.rad2deg(2e-16 / ratio) * values[1] / (values[1] - values[2])
    assert_close_abs(some(got.angle_deg), expected, TOLERANCE_DEG + 100 * rounding_deg)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(
    "angles",
    [[0, 1e-9, 1e-3, 45, 60], [1e-10, 1e-6], [90 - 1e-9, 30], [90, 90 - 1e-7, 1e-9], [90], [0]],
    ids=str,
)
@pytest.mark.parametrize("num_prompts", [12, 40])
def test_known_angles(angles, num_prompts):
    """Subspaces turned by known angles, at both ends of the range: cosines are blind to small ones, sines to right ones."""
    rank = len(angles)
    rng = np.random.default_rng(rank)
    axes = np.linalg.qr(rng.normal(size=(num_prompts, 2 * rank)))[0]
    own, away = axes[:, :rank], axes[:, rank:]
    turned = own * np.cos(np.deg2rad(angles)) + away * np.sin(np.deg2rad(angles))
    right = np.linalg.qr(rng.normal(size=(HIDDEN, rank)))[0].T
    base, other = (torch.tensor(left * np.linspace(3, 2, rank) @ right) for left in (own, turned))
    got = subspace_angle_deg(leading_subspace(base[None], rank)[0], torch.stack([base, other]))
    assert_close_abs(got, np.array([0, sum(angles)]), 1e-12)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_angles_of_the_oracle_are_those_of_scipy(rank):
    """To 1e-9 degrees for one angle, or none above 45 degrees; to 1e-5 where scipy mixes them up."""
    base, other = (np.linalg.svd(oracle("llama-gqa").hidden(h))[0][:, :rank] for h in ([], [(0, 1)]))
    expected = np.rad2deg(scipy.linalg.subspace_angles(base, other))[::-1]
    clean = rank == 1 or expected.max() < 45
    assert_close_abs(
        hooks.principal_angles_deg(base, other), expected.copy(), TOLERANCE_DEG if clean else 1e-5
    )


@pytest.mark.usefixtures("each_way")
def test_float32_is_close():
    model = build("llama-gqa").float()
    got = shipsfast.scan_dataset(model, PROMPTS, rank=2, progress=False)
    assert_close_abs(got.angle_deg, oracle("llama-gqa").angles_deg(2), 1e-3)
    assert 0 <= got.noise_floor < 1e-3


def test_result():
    got = scan(rank=2)
    angles = got.angle_deg
    assert angles.dtype == np.float64 and angles.shape == (LAYERS, HEADS)
    assert 0 <= got.noise_floor < 1e-10 and got.above_noise().all()
    best = max(np.ndindex(LAYERS, HEADS), key=lambda at: angles[at])
    assert got.top(1)[0] == (*best, angles[best])
    values = np.linalg.svd(oracle("llama-gqa").hidden(), compute_uv=False)
    assert_close_abs(np.array(got.record["base_singular_values"]), values[:3], 1e-10)
    frame = got.to_pandas()
    assert list(frame.columns) == ["layer", "head", "angle_deg"] and len(frame) == LAYERS * HEADS


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rank=7), "rank 7 needs at least 7 prompts, and there are 6"),
        (dict(rank=0), "rank must be a whole number of at least 1, got 0"),
        (dict(rank=-1), "rank must be"),
        (dict(rank=1.0), "rank must be"),
        (dict(rank=True), "rank must be"),
        (dict(prompts=[PROMPTS[0]] * 3, rank=2), "rank 2 is more than the prompts have.*span 1 direction"),
        (dict(prompts=[*PROMPTS[:3], *PROMPTS[:3]], rank=4), "span 3 directions.*duplicates"),
        (dict(prompts=[[i % 60, i // 60] for i in range(70)], rank=33), "rank 33.*hidden size of 32"),
        (dict(prompts=[]), "prompt"),
        (dict(ablation="resample"), "resample needs prompts"),
        (dict(unit="layer"), "unknown unit"),
        (dict(ablation="knockout"), "unknown ablation"),
    ],
)
def test_refused(options, words):
    with pytest.raises(shipsfast.InputError, match=words):
        scan(**options)


# --- run folders ------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    got = scan(rank=2, heads=[(0, 1), (2, None)])
    got.save(tmp_path / "saved")
    loaded = SubspaceResult.load(tmp_path / "saved")
    assert np.array_equal(loaded.angle_deg, got.angle_deg, equal_nan=True)
    assert loaded.noise_floor == got.noise_floor and loaded.top(2) == got.top(2)
    assert loaded.unit == "head" and loaded.record["status"] == "complete"
    with pytest.raises(shipsfast.InputError, match="kind 'subspace', expected 'ships'"):
        shipsfast.ShipsResult.load(tmp_path / "saved")


def stop_at(monkeypatch, number: int, calls: list) -> None:
    """Ctrl-C in the `number`th pass of a growing batch."""
    real = GrowingBatch.run

    def run(self, mask, *args, **kwargs):
        calls.append(len(mask) - 1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(self, mask, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)


@pytest.mark.usefixtures("each_way")
def test_a_killed_scan_continues(tmp_path, monkeypatch):
    """Three blocks of four heads, for two groups of prompts each: killed in the second half of the second block."""
    options = dict(rank=2, rows_per_block=4, prompts_per_group=3, layers="model")
    calls = []
    stop_at(monkeypatch, 4, calls)
    with pytest.raises(KeyboardInterrupt):
        scan(out=tmp_path / "run", **options)
    partial = SubspaceResult.load(tmp_path / "run")
    assert partial.record["status"] == "running" and np.isnan(partial.angle_deg).sum() == 8
    got = scan(out=tmp_path / "run", **options)
    assert calls == [4] * 4 + [4] * 4  # two blocks that were missing
    assert_close_abs(got.angle_deg, oracle("llama-gqa").angles_deg(2), TOLERANCE_DEG)
    loaded = SubspaceResult.load(tmp_path / "run")
    assert np.array_equal(loaded.angle_deg, got.angle_deg) and loaded.record["status"] == "complete"
    assert len(loaded.record["base_singular_values"]) == 3


def test_a_finished_scan_is_not_repeated(tmp_path, monkeypatch):
    first = scan(rank=2, out=tmp_path / "run")
    monkeypatch.setattr(GrowingBatch, "run", None)
    again = scan(rank=2, out=tmp_path / "run")
    assert np.array_equal(first.angle_deg, again.angle_deg) and again.noise_floor == first.noise_floor


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(rank=1), "rank"),
        (dict(ablation="zero"), "ablation"),
        (dict(unit="kv_group"), "unit"),
        (dict(prompts=PROMPTS[:5]), "prompts"),
    ],
)
def test_another_scan_is_refused_by_what_differs(tmp_path, change, named):
    scan(rank=2, heads=[(0, 1)], out=tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(shipsfast.InputError, match=f"another run.*{named}"):
        scan(**({"rank": 2, "heads": [(0, 1)]} | change), out=tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert json.loads(before)["identity"]["rank"] == 2


def test_another_kind_of_run_is_refused(tmp_path):
    scan(rank=1, heads=[(0, 1)], out=tmp_path / "run")
    with pytest.raises(shipsfast.InputError, match="another run.*kind"):
        shipsfast.scan(model_of("llama-gqa"), PROMPTS, heads=[(0, 1)], out=tmp_path / "run", progress=False)
