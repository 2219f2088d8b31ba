"""Sahara with control prompts against a naive search of plain forward passes inside `shipsfast.ablate`."""

import functools
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Ablation, SaharaResult
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.ops.subspaces import leading_subspace
from shipsfast.results.bootstrap import resampled_means
from shipsfast.runs.verify import verify
from tests.support import hooks
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40], SHARED + [7], SHARED, [30, 31, 32], [44, 45]]
CONTROL = [SHARED + [12, 50], [2, 33, 21, 8, 13], SHARED + [12, 50, 1], [60]]
PENALTY = 400.0  # degrees per nat: weights of a small random model move tokens little
TOLERANCE_DEG, TOLERANCE_NATS = 1e-9, 1e-12
CUT = dict(chunk_tokens=20, rows_per_block=5, prompts_per_group=2)
model_of = functools.cache(build)


def search(family: str = "llama-gqa", **options) -> SaharaResult:
    options = {"progress": False, "control": CONTROL, "penalty": PENALTY, "rescored": 0} | options
    return shipsfast.sahara(model_of(family), PROMPTS, **options)


class Naive:
    """One plain forward pass for each prompt and group, by the model that `shipsfast.ablate` leaves."""

    def __init__(self, family: str, kind: str | Ablation = "undifferentiated", unit: str = "head") -> None:
        self.model, self.kind, self.unit = model_of(family), kind, unit
        self.kept: dict[frozenset, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def passes(self, group: Sequence) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Hidden states [P, hidden] of the prompts, and logits [V] of each control prompt."""
        key = frozenset(group)
        if key not in self.kept:
            seen: list[torch.Tensor] = []
            hook = self.model.get_output_embeddings().register_forward_pre_hook(
                lambda _module, args: seen.append(args[0][0, -1].clone())
            )
            with (
                torch.no_grad(),
                shipsfast.ablate(self.model, sorted(key), ablation=self.kind, unit=self.unit),
            ):
                logits = [
                    self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                    for ids in PROMPTS + CONTROL
                ]
            hook.remove()
            self.kept[key] = (
                torch.stack(seen[-len(PROMPTS) - len(CONTROL) : -len(CONTROL)]),
                logits[len(PROMPTS) :],
            )
        return self.kept[key]

    def scores(self, group: Sequence, rank: int) -> tuple[np.float64, np.ndarray]:
        """The angle in degrees, and the KL in nats of every control prompt."""
        (base, plain), (hidden, off) = self.passes(()), self.passes(group)
        spans = [leading_subspace(x[None].double(), rank)[0].numpy() for x in (base, hidden)]
        kl = [hooks.kl_nats(a, b) for a, b in zip(plain, off, strict=True)]
        return hooks.principal_angles_deg(*spans).sum(), np.array(kl)

    def search(self, units: Sequence, group_size: int, rank: int, penalty: float, beam: int = 1) -> list:
        """The best groups in order: (objective, heads in the order chosen)."""
        kept = [(0.0, ())]
        for _ in range(group_size):
            pool = {}
            for _, group in kept:
                for unit in (u for u in units if u not in group):
                    angle, kl = self.scores((*group, unit), rank)
                    pool.setdefault(frozenset((*group, unit)), (angle - penalty * kl.mean(), (*group, unit)))
            order = sorted(pool.values(), key=lambda each: -each[0])
            assert len(order) <= beam or order[beam - 1][0] - order[beam][0] > 1e-6, "a clear winner"
            kept = order[:beam]
        return kept


naive = functools.cache(Naive)
EVERY = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


def assert_numbers(got: SaharaResult, exact: Naive, rank: int, units=EVERY) -> None:
    """Angle, KL of each control prompt and objective of every candidate of every step."""
    for step in range(len(got.heads)):
        chosen = got.heads[:step]
        for unit in units:
            at = (step, *unit)
            if unit in chosen:
                assert np.isnan(got.objective[at]) and np.isnan(got.control_by_prompt[step][:, *unit]).all()
                continue
            angle, kl = exact.scores((*chosen, unit), rank)
            assert_close_abs(got.angle_deg[at], angle, TOLERANCE_DEG)
            assert_close_abs(got.control_by_prompt[step][:, *unit], kl, TOLERANCE_NATS)
            assert_close_abs(got.control_kl_nats[at], kl.mean(), TOLERANCE_NATS)
            assert_close_abs(got.objective[at], angle - got.penalty * kl.mean(), 2 * TOLERANCE_DEG)
    assert got.control_by_prompt.shape == (len(got.heads), len(CONTROL), *got.angle_deg.shape[1:])


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("family", "rank"), [("llama-gqa", 1), ("llama-gqa", 2), ("gpt2", 2)])
def test_search_equals_naive(family, rank):
    exact = naive(family)
    got = search(family, rank=rank)
    (_, heads), *_ = exact.search(EVERY, 3, rank, PENALTY)
    assert got.heads == list(heads)
    assert_numbers(got, exact, rank)
    plain = search(family, rank=rank, control=None, penalty=None)
    assert plain.heads != got.heads, "the control has no say in this search"


@pytest.mark.parametrize(
    "how",
    [CUT | dict(layers="model"), dict(backend="reference", layers="model", rows_per_block=4)],
    ids=["cut", "reference"],
)
def test_other_ways_to_run(how):
    got = search(rank=2, **how)
    assert got.heads == list(naive("llama-gqa").search(EVERY, 3, 2, PENALTY)[0][1])
    assert_numbers(got, naive("llama-gqa"), 2)


@pytest.mark.parametrize("beam", [2, 4])
def test_a_beam_equals_naive(beam):
    exact, got = naive("llama-gqa"), search(rank=2, beam=beam)
    expected = exact.search(EVERY, 3, 2, PENALTY, beam)
    assert [frozenset(heads) for heads, _ in got.beams] == [frozenset(heads) for _, heads in expected]
    for (heads, angle), nats in zip(got.beams, got.beam_control_kl_nats, strict=True):
        degrees, kl = exact.scores(heads, 2)
        assert_close_abs(np.float64(angle), degrees, TOLERANCE_DEG)
        assert_close_abs(np.float64(nats), kl.mean(), TOLERANCE_NATS)
    assert (got.heads, got.scores[-1]) == got.beams[0]
    assert_numbers(got, exact, 2)


@pytest.mark.parametrize("kind", ["zero", "head_mean_k", "mean"])
def test_other_ablations(kind):
    """`mean` replaces outputs by the means over the search's prompts, in the control too."""
    how = Ablation("mean", prompts=PROMPTS) if kind == "mean" else Ablation(kind)
    got = search(ablation=kind, rank=2, heads=[(1, None)], group_size=2)
    among = [(1, head) for head in range(HEADS)]
    exact = Naive("llama-gqa", how)
    assert got.heads == list(exact.search(among, 2, 2, PENALTY)[0][1])
    assert_numbers(got, exact, 2, among)


def test_key_value_groups():
    units = [(layer, index) for layer in range(LAYERS) for index in range(2)]
    exact, got = Naive("llama-gqa", unit="kv_group"), search(unit="kv_group", rank=2, group_size=2)
    assert got.heads == list(exact.search(units, 2, 2, PENALTY)[0][1])
    assert_numbers(got, exact, 2, units)


@pytest.mark.parametrize("beam", [1, 3])
def test_without_a_penalty_it_is_the_plain_search(beam):
    plain, free = search(control=None, penalty=None, rank=2, beam=beam), search(penalty=0, rank=2, beam=beam)
    assert free.heads == plain.heads and free.beams == plain.beams
    assert np.array_equal(free.angle_deg, plain.angle_deg, equal_nan=True)
    assert np.array_equal(free.objective, plain.angle_deg, equal_nan=True)
    assert plain.control_kl_nats is None and plain.penalty is None and (free.control_kl_nats[0] > 0).all()
    assert not {"control", "penalty"} & plain.identity.keys() and not any(
        "control" in name for name in plain.record
    )


def test_the_first_step_is_a_scan_of_the_control_prompts():
    got = search(group_size=1)
    scanned = shipsfast.scan(model_of("llama-gqa"), CONTROL, progress=False, rescored=0)
    assert np.array_equal(got.control_by_prompt[0], scanned.kl)


def test_one_degree_a_nat_is_the_default():
    one, left_out = search(penalty=1, group_size=1), search(penalty=None, group_size=1)
    assert left_out == one and left_out.penalty == left_out.identity["penalty"] == 1.0


def test_equal_objectives_go_to_the_lower_head():
    """One prompt turns nothing, and the same control prompt in both: with penalty 0 every objective is 0."""
    got = shipsfast.sahara(
        model_of("llama-gqa"), PROMPTS[:1], control=CONTROL, penalty=0, group_size=4, progress=False
    )
    assert got.heads == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_ranking_and_table_are_by_objective():
    got = search(rank=2)
    best = got.top(3, 1)
    order = sorted((u for u in EVERY if u != got.heads[0]), key=lambda u: -got.objective[1][u])
    assert [(s.layer, s.head) for s in best] == order[:3]
    assert [s.score for s in best] == [got.objective[1][u] for u in order[:3]]
    frame = got.to_pandas()
    assert list(frame) == ["step", "layer", "head", "angle_deg", "control_kl_nats", "objective_deg"]
    np.testing.assert_array_equal(
        frame["objective_deg"], frame["angle_deg"] - PENALTY * frame["control_kl_nats"]
    )
    body = json.loads(json.dumps(got.as_json(3)))
    assert body["penalty"] == PENALTY and body["objective_deg"] == got.chosen(got.objective)
    assert body["control_kl_nats"] == got.chosen(got.control_kl_nats)


# --- how firm it is -----------------------------------------------------------------------------------------------


def test_stability_resamples_both_sets():
    """Against the plain search's resampled angles, and means of resampled control prompts, put together by hand."""
    options = dict(rank=1, penalty=30.0, group_size=1)
    got, plain = search(**options), search(**options | dict(control=None, penalty=None))
    found = got.stability(k=3, resamples=50, seed=4)
    plain.stability(k=3, resamples=50, seed=4)
    (angles,) = plain.grams.at(0)._resampled.values()
    control = got.control_by_prompt[0].reshape(len(CONTROL), -1)
    drawn = angles[:50] - 30 * resampled_means(control, 50, np.random.default_rng([4, 1]))
    assert np.unique(drawn - angles[:50], axis=0).shape[0] > 10
    ranks = (-drawn).argsort(1, kind="stable").argsort(1)
    expected = (ranks < 3).mean(0).reshape(LAYERS, HEADS)
    np.testing.assert_allclose(found.top_k_frequency, expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.mean, got.objective[0])
    low, high = drawn.min(0).reshape(expected.shape), drawn.max(0).reshape(expected.shape)
    assert (found.low >= low - 1e-9).all() and (found.high <= high + 1e-9).all()


def test_with_penalty_0_as_firm_as_the_plain_search():
    free, plain = search(penalty=0, rank=2), search(control=None, penalty=None, rank=2)
    for step in range(3):
        a, b = free.stability(1, step), plain.stability(1, step)
        assert np.array_equal(a.top_k_frequency, b.top_k_frequency, equal_nan=True)


# --- run folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam", [1, 2])
def test_save_and_load(tmp_path, beam):
    got = search(rank=2, beam=beam, out=tmp_path / "run")
    loaded = shipsfast.load(tmp_path / "run")
    assert loaded == got and loaded.penalty == PENALTY
    assert np.array_equal(loaded.control_by_prompt, got.control_by_prompt, equal_nan=True)
    for place, one in (("saved", got), ("again", loaded)):
        one.save(tmp_path / place)
        assert shipsfast.load(tmp_path / place) == got
        assert verify(tmp_path / place)["verdict"] == "sound"
    assert verify(tmp_path / "run")["verdict"] == "sound"
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(manifest["identity"]["control"]["prompts"]) == len(CONTROL)
    assert manifest["control_noise_floor"] == got.record["control_noise_floor"] < 1e-12


@pytest.mark.parametrize(("beam", "stop"), [(1, 2), (1, 7), (1, 12), (2, 10)])
def test_a_killed_search_continues(tmp_path, monkeypatch, beam, stop):
    """Killed in any step, among the angles or among the control prompts: it ends bit for bit as it would have."""
    options = dict(rank=2, beam=beam, rows_per_block=6, layers="model", prompts_per_group=3)
    real, calls, stops = GrowingBatch.run, [], []

    def run(self, mask, *args, **kwargs):
        if stops == [len(calls)]:
            raise KeyboardInterrupt
        calls.append(len(mask))
        return real(self, mask, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)
    whole = search(**options)
    assert len(calls) > 13
    at = stop * len(calls) // 14
    calls.clear()
    stops.append(at)
    with pytest.raises(KeyboardInterrupt):
        search(out=tmp_path / "run", **options)
    stops.clear()
    got = search(out=tmp_path / "run", **options)
    assert got == whole and shipsfast.load(tmp_path / "run") == whole
    plans = [each.record["control_plan"] | {"memory_limit_bytes": 0} for each in (got, whole)]
    assert plans[0] == plans[1]
    assert verify(tmp_path / "run")["verdict"] == "sound"
    monkeypatch.setattr(GrowingBatch, "run", None)
    assert search(out=tmp_path / "run", **options) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(penalty=2), "different penalty.*penalty there is 400.0, here 2.0"),
        (dict(control=CONTROL[:1]), "different control.*the control prompts are others"),
        (dict(control=None, penalty=None), "there is a control there only"),
    ],
)
def test_another_control_is_another_run(tmp_path, change, named):
    options = dict(group_size=1, heads=[(0, 1), (1, 2)])
    search(out=tmp_path / "run", **options)
    with pytest.raises(shipsfast.InputError, match=f"another run.*{named}"):
        search(out=tmp_path / "run", **options | change)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(control=None), "penalty .--penalty. is for control prompts, and there are none"),
        (dict(penalty=-1), "penalty must be a finite number of at least 0, in degrees per nat, got -1"),
        (dict(penalty=float("nan")), "penalty must be a finite number"),
        (dict(penalty=float("inf")), "penalty must be a finite number"),
        (dict(penalty=True), "penalty must be a finite number"),
        (dict(penalty="1"), "penalty must be a finite number"),
        (dict(control=[]), "in the control prompts: there are no prompts"),
        (dict(control="one text"), "in the control prompts: prompts must be a list"),
        (dict(control=[[1], []]), "in the control prompts: prompt 1"),
        (dict(control=[[1], [64]]), "in the control prompts: prompt 1"),
        (dict(control=["text"]), "in the control prompts: .*tokenizer"),
        (
            dict(ablation=Ablation("resample", prompts=[[1] * len(p) for p in PROMPTS])),
            "resample takes outputs from one prompt for each, and control prompts have none",
        ),
    ],
)
def test_refused(options, words):
    with pytest.raises(shipsfast.InputError, match=words):
        search(**options)


def test_a_head_that_overflows_ordinary_prompts_is_named(monkeypatch):
    from shipsfast.scans import search_control as control

    real = control.kl_rows

    def overflowing(*args):
        return torch.where(real(*args) > 0, torch.inf, 0.0)

    monkeypatch.setattr(control.ControlScan, "_check", lambda self: None)
    monkeypatch.setattr(control, "kl_rows", overflowing)
    with pytest.raises(
        shipsfast.InputError, match=r"the KL of head 0-0 on control prompt \d is not a finite number"
    ):
        search(group_size=1)


def test_a_model_that_is_not_what_its_own_forward_is_is_refused(monkeypatch):
    from shipsfast.scans import search_control as control

    wrong = {None: torch.eye(2, 64, dtype=torch.float64) * 9}
    monkeypatch.setattr(control, "ablated_outputs", lambda *args: wrong)
    with pytest.raises(
        shipsfast.UnsupportedModelError, match="on control prompt 2 is .* cannot be scanned exactly"
    ):
        search(group_size=1)
