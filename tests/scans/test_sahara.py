"""The greedy search and its beam against a naive search that runs one forward pass per prompt and group."""

import functools
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Ablation, SaharaResult
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.ops.extension import extension_status
from tests.support import hooks
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs

TOLERANCE_DEG = 1e-9

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40], SHARED + [7], SHARED, [30, 31, 32], [44, 45]]
SOURCES = [[(7 * i + t) % 60 for t in range(len(ids))] for i, ids in enumerate(PROMPTS)]
CUT = dict(chunk_tokens=20, rows_per_block=5, prompts_per_group=2)
model_of = functools.cache(build)


@functools.cache
def oracle(family: str = "llama-gqa", kind: str = "undifferentiated", eps: float = 1e-5) -> hooks.Oracle:
    return hooks.Oracle(model_of(family), PROMPTS, kind, eps, SOURCES if kind == "resample" else None)


def search(family: str = "llama-gqa", model=None, prompts=PROMPTS, **options) -> SaharaResult:
    options = {"progress": False} | options
    return shipsfast.sahara(model or model_of(family), prompts, **options)


def naive(exact: hooks.Oracle, group_size: int, rank: int, unit: str = "head", among=None):
    """Greedy search: the heads in the order chosen, and every step's scores [group_size, L, units]."""
    chosen, steps = [], []
    for _ in range(group_size):
        steps.append(exact.angles_deg(rank, unit, chosen, among))
        _, chosen = max(
            (steps[-1][each], [*chosen, each])
            for each in np.ndindex(steps[-1].shape)
            if not np.isnan(steps[-1][each])
        )
        _clear_winner(steps[-1])
    return chosen, np.stack(steps)


def naive_beam(exact: hooks.Oracle, group_size: int, rank: int, beam: int):
    """The best `beam` sets of heads after every step, each grown from one of the step before: (set, score), falling."""
    units = hooks.unit_heads(exact.model, "head")
    kept = [(frozenset(), 0.0)]
    for _ in range(group_size):
        grown = {group | {each} for group, _ in kept for each in units if each not in group}
        scored = sorted(((exact.angle_deg(sorted(g), rank), g) for g in grown), key=lambda s: -s[0])
        assert beam >= len(scored) or scored[beam - 1][0] - scored[beam][0] > 1e-6
        kept = [(group, score) for score, group in scored[:beam]]
    return kept


def _clear_winner(angles: np.ndarray) -> None:
    """The oracle does not say which of two heads wins when their scores are as close as rounding."""
    first, second = np.sort(angles[~np.isnan(angles)])[[-1, -2]]
    assert first - second > 1e-6


def assert_search(got: SaharaResult, heads: Sequence, steps: np.ndarray) -> None:
    """The same heads, all scores of every step, NaN exactly where they cannot be."""
    assert got.heads == list(heads)
    assert got.angle_deg.shape == steps.shape and got.angle_deg.dtype == np.float64
    scored = ~np.isnan(steps)
    assert np.array_equal(~np.isnan(got.angle_deg), scored)
    assert_close_abs(got.angle_deg[scored], steps[scored], TOLERANCE_DEG)
    assert got.scores == [got.angle_deg[step][head] for step, head in enumerate(heads)]
    assert got.beams[0] == (list(heads), got.scores[-1])


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(
    ("family", "rank"),
    [
        ("llama-gqa", 1),
        ("llama-gqa", 2),
        ("llama-gqa", 3),
        ("gemma2-softcap-window", 1),
        ("gpt2", 2),
    ],
)
def test_search_equals_naive(family, rank):
    heads, steps = naive(oracle(family), 3, rank)
    assert_search(search(family, rank=rank, layers="model"), heads, steps)  # group_size 3 is the default


def test_nan_where_already_chosen():
    got = search(rank=2)
    for step in range(3):
        assert {tuple(at) for at in np.argwhere(np.isnan(got.angle_deg[step]))} == set(got.heads[:step])


@pytest.mark.parametrize(
    "options",
    [
        dict(layers="model") | CUT,
        dict(layers="model", backend="reference", rows_per_block=4),
        pytest.param(
            dict(layers="fused") | CUT,
            marks=pytest.mark.skipif(not extension_status()[0], reason="no extension"),
        ),
    ],
    ids=["cut", "reference", "fused"],
)
def test_other_ways_to_run(options):
    assert_search(search(rank=2, **options), *naive(oracle(), 3, 2))


@pytest.mark.parametrize("kind", ["zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean", "resample"])
def test_other_ablations(kind):
    """Within one layer: means over heads are of what the heads have before any of the group is switched off."""
    how = Ablation(kind, prompts=SOURCES if kind == "resample" else None)
    among = [(1, head) for head in range(HEADS)]
    got = search(ablation=how, rank=2, heads=[(1, None)])
    assert_search(got, *naive(oracle(kind=kind), 3, 2, among=among))


@pytest.mark.usefixtures("each_way")
def test_key_value_groups():
    heads, steps = naive(oracle(), 3, 2, unit="kv_group")
    got = search(unit="kv_group", rank=2)
    assert got.unit == "kv_group" and steps.shape == (3, LAYERS, 2)
    assert_search(got, heads, steps)


def test_candidates_only():
    among = [(0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2)]
    got = search(heads=[(2, 2), (0, 3), (1, None)], rank=2)
    assert_search(got, *naive(oracle(), 3, 2, among=among))


def test_every_candidate_may_be_chosen():
    heads, _ = naive(oracle(), 2, 1, among=[(0, 0), (2, 3), (1, 1)])
    got = search(heads=[(0, 0), (2, 3), (1, 1)], group_size=3)
    assert got.heads[:2] == heads and set(got.heads) == {(0, 0), (2, 3), (1, 1)}
    assert np.isnan(got.angle_deg[2]).sum() == LAYERS * HEADS - 1


def test_group_of_one_is_the_best_of_the_scan():
    scanned = shipsfast.scan_dataset(model_of("llama-gqa"), PROMPTS, rank=2, progress=False)
    got = search(group_size=1, rank=2)
    assert got.heads == [scanned.top(1)[0][:2]] and len(got.angle_deg) == 1
    assert_close_abs(got.angle_deg[0], scanned.angle_deg, TOLERANCE_DEG)


# --- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_way")
def test_exact_ties_go_to_the_lower_head():
    """One prompt: its left singular vector is 1 whatever is off, so every head scores exactly 0."""
    got = search(prompts=PROMPTS[:1], group_size=6)
    assert got.heads == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert got.scores == [0.0] * 6
    beams = search(prompts=PROMPTS[:1], group_size=2, beam=3).beams
    assert [heads for heads, _ in beams] == [[(0, 0), (0, 1)], [(0, 0), (0, 2)], [(0, 0), (0, 3)]]


def twins(family: str, low: int, high: int, seed: int = 0):
    """A model in which two heads of layer 0 are one and the same: the same queries, keys, values and output."""
    model = build(family, seed=seed)
    attention = hooks.Site(model, 0).attention
    size = attention.head_dim
    a, b = (slice(head * size, (head + 1) * size) for head in (low, high))
    with torch.no_grad():
        if family == "gpt2":
            for weight in (attention.c_attn.weight, attention.c_attn.bias):
                parts = weight.unflatten(-1, (3, -1))
                parts[..., b] = parts[..., a]
            attention.c_proj.weight[b] = attention.c_proj.weight[a]
        else:
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[b] = projection.weight[a]
            attention.o_proj.weight[:, b] = attention.o_proj.weight[:, a]
    return model


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (1, 3)])
@pytest.mark.parametrize("family", ["llama-mha", "gpt2"])
def test_exchangeable_heads_go_to_the_lower(family, low, high, seed):
    """Two heads that do the same tie, whatever the order in which their outputs are added up does to the last bits.

    The norms of Llama round to float32, which hides it there, and GPT-2's do not.
    """
    model = twins(family, low, high, seed)
    for options in ({}, CUT):
        got = search(model=model, ablation="zero", heads=[(0, low), (0, high)], group_size=1, **options)
        assert got.scores[0] > 0.1
        assert abs(got.angle_deg[0, 0, low] - got.angle_deg[0, 0, high]) < 1e-11
        assert got.heads == [(0, low)]


# --- beam -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("family", "rank"), [("llama-gqa", 1), ("llama-gqa", 2), ("gpt2", 2)])
def test_beam_of_two_equals_naive(family, rank):
    exact = oracle(family)
    expected = naive_beam(exact, 3, rank, 2)
    for options in ({}, dict(layers="model") | CUT):
        got = search(family, rank=rank, beam=2, **options)
        assert [frozenset(heads) for heads, _ in got.beams] == [group for group, _ in expected]
        assert_close_abs(
            np.array([angle for _, angle in got.beams]),
            np.array([angle for _, angle in expected]),
            TOLERANCE_DEG,
        )
        assert all(len(heads) == len(set(heads)) == 3 for heads, _ in got.beams)
        _path_of_the_best(got, exact, rank)


def _path_of_the_best(got: SaharaResult, exact: hooks.Oracle, rank: int) -> None:
    """heads, scores and angle_deg are those of the best group, as it grew."""
    assert (got.heads, got.scores[-1]) == got.beams[0]
    steps = np.stack([exact.angles_deg(rank, parent=got.heads[:step]) for step in range(len(got.heads))])
    assert_search(got, got.heads, steps)


def test_a_wide_beam_keeps_every_group():
    """Wider than there are groups: all three pairs of three heads, each once and scored once."""
    among = [(0, 0), (1, 1), (2, 3)]
    got = search(heads=among, group_size=2, beam=10, rank=2)
    pairs = [frozenset(heads) for heads, _ in got.beams]
    assert len(pairs) == len(set(pairs)) == 3
    for heads, angle in got.beams:
        assert abs(angle - oracle().angle_deg(heads, 2)) < TOLERANCE_DEG
    assert sorted((a for _, a in got.beams), reverse=True) == [a for _, a in got.beams]


def test_a_beam_of_one_is_the_plain_search():
    plain, one = search(rank=2), search(rank=2, beam=1)
    assert one.heads == plain.heads and one.beams == plain.beams
    assert np.array_equal(one.angle_deg, plain.angle_deg, equal_nan=True)


def test_a_beam_is_never_worse_at_its_own_steps():
    plain, wide = search(rank=1), search(rank=1, beam=4)
    assert wide.scores[-1] >= plain.scores[-1] - TOLERANCE_DEG


# --- run folders ------------------------------------------------------------------------------------------------


def same(a: SaharaResult, b: SaharaResult) -> None:
    assert a.heads == b.heads and a.beams == b.beams and a.noise_floor == b.noise_floor
    assert np.array_equal(a.angle_deg, b.angle_deg, equal_nan=True)
    assert a.scores == b.scores and a.unit == b.unit


@pytest.mark.parametrize("beam", [1, 2])
def test_save_and_load(tmp_path, beam):
    got = search(rank=2, beam=beam, out=tmp_path / "run")
    if beam == 2:
        assert any(got.record["path"]), (
            "the best group is not the plain search's: its steps are not all in one place"
        )
    loaded = SaharaResult.load(tmp_path / "run")
    same(loaded, got)
    got.save(tmp_path / "saved")
    same(SaharaResult.load(tmp_path / "saved"), got)
    loaded.save(tmp_path / "again")
    same(SaharaResult.load(tmp_path / "again"), got)


def test_save_and_load_key_value_groups(tmp_path):
    got = search(unit="kv_group", group_size=2)
    got.save(tmp_path / "saved")
    same(SaharaResult.load(tmp_path / "saved"), got)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("stop", [2, 5, 8])
@pytest.mark.parametrize("beam", [1, 2])
def test_a_killed_search_continues(tmp_path, monkeypatch, beam, stop):
    """Three blocks of four heads a step and group: killed in the first, second or third step."""
    options = dict(rank=2, beam=beam, rows_per_block=4, layers="model")
    calls = []  # how many heads each pass scores
    stops = []
    real = GrowingBatch.run

    def run(self, mask, *args, **kwargs):
        if stops == [len(calls)]:
            raise KeyboardInterrupt
        calls.append(len(mask) - 1)
        return real(self, mask, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)
    whole = search(**options)
    everything = sum(calls)
    assert everything == 12 + 11 + 10 if beam == 1 else everything > 12 + 11 + 10
    calls.clear()
    stops.append(stop - 1)
    with pytest.raises(KeyboardInterrupt):
        search(out=tmp_path / "run", **options)
    with pytest.raises(shipsfast.InputError, match="not finished"):
        SaharaResult.load(tmp_path / "run")
    stops.clear()
    got = search(out=tmp_path / "run", **options)
    assert sum(calls) == everything  # nothing is scored twice
    assert got.heads == whole.heads and [h for h, _ in got.beams] == [h for h, _ in whole.beams]
    assert np.array_equal(np.isnan(got.angle_deg), np.isnan(whole.angle_deg))
    some = ~np.isnan(whole.angle_deg)
    assert_close_abs(got.angle_deg[some], whole.angle_deg[some], TOLERANCE_DEG)
    same(SaharaResult.load(tmp_path / "run"), got)


def test_a_finished_search_is_not_repeated(tmp_path, monkeypatch):
    first = search(rank=2, out=tmp_path / "run")
    monkeypatch.setattr(GrowingBatch, "run", None)
    same(search(rank=2, out=tmp_path / "run"), first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(rank=2), "rank"),
        (dict(group_size=1), "group_size"),
        (dict(beam=2), "beam"),
        (dict(scale=0.1), "ablation"),
    ],
)
def test_another_search_is_refused_by_what_differs(tmp_path, change, named):
    options = dict(group_size=2, heads=[(0, 1), (1, 2)], rank=1)
    search(out=tmp_path / "run", **options)
    with pytest.raises(shipsfast.InputError, match=f"another run.*{named}"):
        search(out=tmp_path / "run", **(options | change))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(group_size=13), "group_size 13 is above the 12 heads"),
        (dict(group_size=3, heads=[(0, 1), (1, 2)]), "group_size 3 is above the 2 heads"),
        (dict(group_size=7, unit="kv_group"), "group_size 7 is above the 6 kv_groups"),
        (dict(group_size=0), "group_size must be a whole number of at least 1, got 0"),
        (dict(group_size=1.5), "group_size must be"),
        (dict(group_size=True), "group_size must be"),
        (dict(beam=0), "beam must be a whole number of at least 1, got 0"),
        (dict(beam=-1), "beam must be"),
        (dict(rank=6), "rank 6 needs at least 6 prompts, and there are 5"),
        (dict(rank=0), "rank must be"),
        (dict(prompts=[PROMPTS[0]] * 3, rank=2), "rank 2 is more than the prompts have"),
        (dict(ablation="resample"), "resample needs prompts"),
        (dict(unit="layer"), "unknown unit"),
    ],
)
def test_refused(options, words):
    with pytest.raises(shipsfast.InputError, match=words):
        search(**options)
