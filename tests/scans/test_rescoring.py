"""The error of scores: a sample of them, computed again in a wider dtype."""

import copy
import json

import numpy as np
import pytest
import torch
from rich.console import Console

import shipsfast
from shipsfast.models.wider import why_no_copy, wider_copy
from shipsfast.results.tables import as_json, show
from shipsfast.runs.verify import verify
from shipsfast.scans import rescoring
from shipsfast.scans.prepare import prepare
from shipsfast.scans.score_store import Measure
from tests.support.checkpoints import save
from tests.support.metric_scans import killed_after
from tests.support.models import build, next_log_probs
from tests.support.overflowing import overflowing

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12], [5, 6, 7, 8, 9]]
WIDE = {torch.bfloat16: "float32", torch.float32: "float64"}


def scan(model, **options):
    return shipsfast.scan(model, PROMPTS, progress=False, **options)


def text(result) -> str:
    console = Console(width=400)
    with console.capture() as captured:
        show(result, 3, console=console)
    return captured.get()


def wide(model):
    return copy.deepcopy(model).to(getattr(torch, WIDE[model.dtype]))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "gpt2"])
def test_the_sample_is_what_forward_passes_in_a_wider_dtype_give(family, dtype):
    model = build(family, dtype)
    error, other = scan(model).error, wide(model)
    assert error.measured and error.against == WIDE[dtype] and len(error.rescored) == rescoring.LEAST
    assert [x.drawn for x in error.rescored].count(False) <= 1
    for x in error.rescored:
        said = []
        for heads in ([], [(x.layer, x.head)]):
            with shipsfast.ablate(other, heads), torch.no_grad():
                said.append(next_log_probs(other, PROMPTS[x.prompt]).double())
        expected = float((said[0].exp() * (said[0] - said[1])).sum())
        assert x.expected == pytest.approx(expected, rel=1e-4 if dtype == torch.bfloat16 else 1e-9)
        assert x.error == abs(x.score - x.expected) > 0


HOW = {
    "mean": dict(ablation="mean"),
    "resample": dict(ablation=shipsfast.Ablation("resample", prompts=[ids[::-1] for ids in PROMPTS])),
    "groups": dict(unit="kv_group"),
    "some heads": dict(heads=[(0, 1), (2, 3)]),
    "two metrics": dict(metric=["js", "logit_diff:3,7"]),
    "cut": dict(prompts_per_group=2, rows_per_block=5),
}


@pytest.mark.parametrize("how", HOW)
def test_every_kind_of_scan_has_it(how):
    model = build(dtype=torch.float32)
    found, expected = scan(model, **HOW[how]), scan(wide(model), **HOW[how])
    for result, other in zip((found, *found.also.values()), (expected, *expected.also.values()), strict=True):
        error = result.error
        assert error.measured and len({x[-2:] + x[:2] for x in error.rescored}) >= 4
        for x in error.rescored:
            assert x.score == result.scores[x.prompt, x.layer, x.head]
            assert x.expected == pytest.approx(other.scores[x.prompt, x.layer, x.head], rel=1e-6, abs=1e-12)
        assert result.noise_floor == max(error.packing, *(x.error for x in error.smaller))
        assert result.noise_floor > 0 and "error of a score, against float64" in text(result)


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_what_replaces_outputs_is_computed_anew_in_the_wider_dtype(how):
    model = build(dtype=torch.bfloat16)
    found, expected = scan(model, **HOW[how]).error, scan(wide(model), **HOW[how])
    for x in found.rescored:
        assert x.expected == pytest.approx(expected.scores[x.prompt, x.layer, x.head], rel=1e-4)


def test_a_run_that_lost_a_part_keeps_its_packing_noise(tmp_path):
    """Its manifest is a finished run's, whose noise floor is more than packing."""
    model, how = build(dtype=torch.bfloat16), dict(rows_per_block=5, out=tmp_path / "run")
    whole = scan(model, **how)
    min((tmp_path / "run" / "scores").glob("part-*")).unlink()
    again = scan(model, **how)
    assert (
        again == whole and again.record["packing_noise"] == whole.record["packing_noise"] < whole.noise_floor
    )


def test_the_noise_floor_covers_what_rounding_does_to_ablated_rows():
    """Of half precision it is that of the scores, far above what packing does."""
    model = build(dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rescoring, "how_many", lambda asked, scores, *_: min(asked, scores))
        result = scan(model, rescored=48)
    exact = scan(wide(model)).kl
    error, true = result.error, np.abs(result.kl - exact)
    assert len(error.rescored) == 48  # all of them, so that what is printed is what there is
    assert error.absolute["max"] == pytest.approx(true.max(), rel=1e-3)
    smaller = true.ravel()[np.argsort(result.kl.ravel())]
    some = [x for x in error.rescored if x.drawn]
    assert len(error.smaller) == -(-len(some) // 2) and len(some) == 40
    assert result.noise_floor == max(x.error for x in error.smaller) > 10 * error.packing
    assert result.noise_floor <= smaller[:28].max() * (1 + 1e-3)
    weak = ~result.above_noise()
    assert np.array_equal(weak, result.mean() <= result.noise_floor)


def test_draws_are_spread_and_every_score_has_the_same_chance(monkeypatch):
    usable = np.ones((4, 3, 4), dtype=bool)
    usable[1] = False
    found = rescoring.drawn(usable, 9)
    assert len(set(found)) == 9 and sorted({p for p, *_ in found}) == [0, 2, 3]
    assert [sum(p == at for p, *_ in found) for at in (0, 2, 3)] == [3, 3, 3]
    assert found == rescoring.drawn(usable, 9)
    count = np.zeros(usable.shape)
    for seed in range(300):
        monkeypatch.setattr(rescoring, "SEED", seed)
        for at in rescoring.drawn(usable, 6):
            count[at] += 1
    assert (count[1] == 0).all()
    assert np.abs(count[[0, 2, 3]] - 50).max() < 30  # 300 x 6 / 36, more than four standard deviations


def test_a_run_that_goes_on_ends_the_same_and_measures_once(tmp_path, monkeypatch):
    model = build(dtype=torch.bfloat16)
    how = dict(rows_per_block=5, metric=["kl", "js"])
    whole = scan(model, out=tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            scan(model, out=tmp_path / "run", **how)
    real = Measure.result
    with monkeypatch.context() as patch:  # and once more, after the error was measured

        def stopped(*_):
            raise KeyboardInterrupt

        patch.setattr(Measure, "result", stopped)
        with pytest.raises(KeyboardInterrupt):
            scan(model, out=tmp_path / "run", **how)
    assert Measure.result is real
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["error"]
    with monkeypatch.context() as patch:
        patch.setattr(rescoring, "again", lambda *_: pytest.fail("measured twice"))
        again = scan(model, out=tmp_path / "run", **how)
    loaded = shipsfast.load(tmp_path / "run")
    for found in (again, loaded):
        assert (
            found == whole and found.error == whole.error and found.also["js"].error == whole.also["js"].error
        )
    assert kept == whole.error.to_json() and verify(tmp_path / "run")["verdict"] == "sound"
    body = as_json(loaded, 3)
    assert body["error"] == kept == json.loads(json.dumps(kept))
    assert body["noise_floor"] == kept["floor"] > kept["packing"] == loaded.record["packing_noise"]


def refused(result, reason: str, rescored: int) -> None:
    """Not measured against a wider dtype, and said so everywhere; what is known instead is there."""
    error = result.error
    assert not error.measured and reason in error.reason and len(error.rescored) == rescored
    assert f"the error against higher precision was not measured: {error.reason}" in text(result)
    assert f"the noise floor has what packing and batching round, and not what {error.own} does" in text(
        result
    )
    assert error.against == error.own == result.identity["dtype"]
    assert result.noise_floor == max([error.packing, *(x.error for x in error.smaller)])


def test_where_there_is_no_wider_dtype_plain_passes_are_what_is_known():
    refused(scan(build()), "float64 is the widest there is", rescoring.LEAST)
    model = build(dtype=torch.float32)
    refused(scan(model, max_memory=150_000), "a copy in float64 takes", rescoring.LEAST)
    refused(scan(model, rescored=0), "none was asked for (rescored=0)", 2)


def test_quantised_layers_have_no_copy():
    model = build(dtype=torch.float32)
    assert why_no_copy(model) == ""
    model.is_quantized = True
    assert why_no_copy(model) == ""  # loaded as plain numbers, as GGUF files are
    model.lm_head.register_buffer("qweight", torch.zeros(3, 4, dtype=torch.int32))
    assert why_no_copy(model) == "its layers are quantised"
    model = build(dtype=torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    assert why_no_copy(model) == "its layers are quantised"


def test_streamed_weights_are_not_read_again_and_again(tmp_path):
    from shipsfast.models.loading import load_model

    save(build(dtype=torch.float32), tmp_path / "model")
    streamed = load_model(str(tmp_path / "model"), dtype="float32", device="cpu", stream=True)
    refused(scan(streamed), "its weights are streamed", 2)


def test_a_copy_that_does_not_run_ends_no_scan():
    model = build(dtype=torch.float32)

    def narrow(_module, args):
        if args[0].dtype == torch.float64:
            raise RuntimeError("expected m1 and m2 to have the same dtype\nsecond line")

    model.model.layers[1].mlp.register_forward_pre_hook(narrow)
    refused(scan(model), "a copy in float64 does not run: expected m1 and m2 to have the same dtype", 4)


def test_out_of_memory_with_a_copy_ends_no_scan(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rescoring, "wider_copy", no_memory)
    refused(scan(build(dtype=torch.float32)), "out of memory with a copy in float64", 4)


def test_marked_scores_are_not_drawn():
    result = scan(overflowing(), nonfinite="mark", ablation="zero")
    assert result.marked.any() and result.error.rescored
    assert all(np.isfinite([x.score, x.expected]).all() for x in result.error.rescored)
    assert not any(result.marked[x.prompt, x.layer, x.head] for x in result.error.rescored)


def test_what_one_metric_ranks_first_may_be_marked_in_another():
    model = build(dtype=torch.bfloat16)
    strong = np.quantile(scan(model).kl, 0.7)

    def broken(base, ablated, index):
        base, ablated = base[index].log_softmax(-1), ablated.log_softmax(-1)
        kl_nats = (base.exp() * (base - ablated)).sum(-1).double()
        return torch.where(kl_nats > strong, torch.nan, kl_nats)

    result = scan(model, metric=["kl", broken], nonfinite="mark")
    (other,) = result.also.values()
    assert np.isnan(other.scores[:, *result.top(1)[0][:2]]).any()
    for each in (result, other):
        assert each.error.measured and len(each.error.rescored) == rescoring.LEAST
        assert np.isfinite([(x.score, x.expected) for x in each.error.rescored]).all()


def test_a_copy_is_the_same_model_and_leaves_the_first_alone():
    model = build(dtype=torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    described = prepare(model, None, shipsfast.scan.measurement(prompts=PROMPTS), shipsfast.scan.execution())
    other, anatomy = wider_copy(model, described.anatomy)
    assert other.lm_head.weight is other.model.embed_tokens.weight and other.dtype == torch.float32
    assert [x.attention for x in anatomy.layers] == [x.self_attn for x in other.model.layers]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in other.parameters())
    for name, p in model.named_parameters():
        assert before[name][0] == id(p) and torch.equal(before[name][1], p)
    places = [
        [id(x) for module in each.modules() for x in vars(module).values() if isinstance(x, dict)]
        for each in (model, other)
    ]
    assert len(places[0]) == len(places[1]) == len({*places[0], *places[1]}) / 2  # nothing is hooked to both
    next(other.parameters()).data.zero_()
    assert next(model.parameters()).abs().sum() > 0


@pytest.mark.parametrize("rank", [1, 2])
def test_angles_have_it(rank, tmp_path):
    model = build(dtype=torch.bfloat16)
    how = dict(rank=rank, progress=False)
    result = shipsfast.scan_dataset(model, PROMPTS, out=tmp_path / "run", **how)
    exact = shipsfast.scan_dataset(wide(model), PROMPTS, **how).angle_deg
    error = result.error
    assert error.measured and error.against == "float32" and len(error.rescored) == 4
    for x in error.rescored:
        assert x.score == result.angle_deg[x.layer, x.head] and x.prompt is x.step is None
        assert x.expected == pytest.approx(exact[x.layer, x.head], rel=1e-3)
    assert result.noise_floor == error.floor > error.packing
    assert "error of an angle, against float32" in text(result)
    loaded = shipsfast.load(tmp_path / "run")
    assert loaded == result and loaded.error == error and verify(tmp_path / "run")["verdict"] == "sound"


def test_gains_of_a_search_have_it(tmp_path):
    model = build(dtype=torch.bfloat16)
    how = dict(group_size=2, progress=False)
    result = shipsfast.sahara(model, PROMPTS, out=tmp_path / "run", **how)
    other = wide(model)
    error, first = result.error, result.heads[0]
    assert error.measured and [(x.layer, x.head) for x in error.rescored if not x.drawn] == result.heads
    exact = shipsfast.scan_dataset(other, PROMPTS, progress=False).angle_deg
    assert {x.step for x in error.rescored} == {0, 1}
    for x in error.rescored:
        assert x.score == pytest.approx(result.gain_deg[x.step, x.layer, x.head], rel=1e-12)
        if x.step == 0:
            assert x.expected == pytest.approx(exact[x.layer, x.head], rel=1e-3)
        elif result.heads == shipsfast.sahara(other, PROMPTS, **how).heads:
            gain = shipsfast.sahara(other, PROMPTS, **how).gain_deg[1, x.layer, x.head]
            assert x.expected == pytest.approx(gain, rel=1e-2, abs=1e-2)
    assert first == result.heads[0] and result.noise_floor == error.floor
    assert "error of a gain, against float32" in text(result)
    loaded = shipsfast.load(tmp_path / "run")
    assert loaded == result and loaded.error == error and verify(tmp_path / "run")["verdict"] == "sound"


def test_how_many_are_rescored():
    assert [rescoring.how_many(12, n) for n in (0, 3, 48, 640, 1080, 10**6)] == [0, 3, 4, 8, 12, 12]
    assert rescoring.how_many(0, 1000) == 0
    with pytest.raises(shipsfast.InputError, match="rescored must be a whole number of at least 0"):
        shipsfast.scan.execution(rescored=-1)


def test_one_head_is_no_ranking():
    one, two = scan(build(), heads=[(1, 2)]), scan(build(), heads=[(0, 1), (1, 2)])
    found = text(one)
    assert "95% interval" in found
    for word in ("Gini", "top 1", "in top", "rank interval", "resampling the prompts"):
        assert word not in found
    assert "Gini" in text(two) and "top 1 " in text(two) and "rank interval" in text(two)
    assert "in top" not in text(two) and "top 3" not in text(two)
    assert one.plot() is not None and "carry" not in one.bars("").title
