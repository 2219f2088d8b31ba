"""Scans of hidden states against forward hooks in plain passes, one head and one prompt each, in float64; and that layers
behind what is read do not run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import InputError, UnsupportedModelError, probe, projection
from shipsfast.engine.flops import model_flops, scan_flops
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.engine.measurement import ScanExecution
from shipsfast.models.anatomy import inspect_model
from shipsfast.models.loading import load_model
from shipsfast.ops.prefix_tree import pack
from shipsfast.runs.verify import verify
from shipsfast.scans import forecast as forecasting
from shipsfast.scans.forecast import Elsewhere, forecast
from shipsfast.scans.measurements import ShipsMeasurement
from shipsfast.scans.prepare import prepare
from shipsfast.scans.self_check import plain_outputs
from tests.support.checkpoints import device_map, load_offloaded, save
from tests.support.metric_scans import killed_after
from tests.support.model_state import assert_same, state
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs
from tests.support.streams import MODELS, change_along, decoder_layers, stream
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 17, 23, 33, 8], [5, 9, 17, 7], [5, 9, 4, 12, 3], [5, 9, 17]]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
UNIT = VECTOR / VECTOR.norm()
CUT = {"rows_per_block": 5, "chunk_tokens": 30, "prompts_per_group": 3}
FUSED = ("llama", "gemma2", "qwen3")


def norm_of(hidden):
    """A probe that is not linear."""
    return hidden.double().norm(dim=-1)


def along(hidden):
    return hidden @ UNIT


def scan(model, metric, prompts=PROMPTS, **how):
    return shipsfast.scan(model, prompts, metric=metric, **{"progress": False, "rescored": 0} | how)


def cut_of(name: str) -> dict:
    """Models that look beyond a token take one prompt a pack."""
    return CUT | ({"prompts_per_group": 1} if name.startswith("hybrid") else {})


def every(result) -> list[np.ndarray]:
    return [each.scores for each in (result, *result.also.values())]


@pytest.mark.parametrize("layers", ["model", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_hooks(name, layers):
    """Behind every decoder layer in one pass, with the last and without logits; and behind each alone."""
    if layers == "fused" and name not in FUSED:
        pytest.skip("its layers do not fuse")
    model = MODELS[name]()
    count = len(decoder_layers(model))
    expected = [np.concatenate(change_along(model, PROMPTS, layer, along)) for layer in range(count)]
    metrics = [projection(VECTOR, layer) for layer in range(count)]
    together = every(scan(model, metrics, layers=layers, **cut_of(name)))
    for found, want in zip(together, expected, strict=True):
        assert_close_abs(found, want, 1e-12)
    for metric, want in zip(metrics, expected, strict=True):
        assert_close_abs(scan(model, metric, layers=layers).scores, want, 1e-12)
    assert np.abs(expected[-1]).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "hybrid-conv"])
def test_with_metrics_of_logits_in_one_pass(name, monkeypatch):
    model, runs, run = MODELS[name](), [], GrowingBatch.run
    monkeypatch.setattr(GrowingBatch, "run", lambda *args, **how: runs.append(1) or run(*args, **how))
    kl = scan(model, "kl").scores
    alone = len(runs)
    found = scan(model, [probe(norm_of, 1), "kl", projection(VECTOR, 0, False), probe(VECTOR, 2)])
    assert len(runs) == 2 * alone
    last = len(decoder_layers(model)) - 1
    expected = [(1, norm_of), (None, None), (0, lambda h: h @ VECTOR), (last, lambda h: h @ VECTOR)]
    for scores, (layer, value) in zip(every(found), expected, strict=True):
        want = kl if layer is None else np.concatenate(change_along(model, PROMPTS, layer, value))
        assert_close_abs(scores, want, 1e-12)
    assert "passes_end" not in found.record


@pytest.mark.parametrize("at", ["all", "end"])
@pytest.mark.parametrize("layers", ["model", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_at_every_token_of_answers(name, layers, at):
    if layers == "fused" and name not in FUSED:
        pytest.skip("its layers do not fuse")
    model, answers = MODELS[name](), [[4, 4, 30], [41], [4, 9], [8, 2, 2, 19]]
    whole = [[*ids, *answer] for ids, answer in zip(PROMPTS, answers, strict=True)]
    reads = [range(len(ids) - 1, len(both) - 1) for ids, both in zip(PROMPTS, whole, strict=True)]
    metrics = [projection(VECTOR, 1), probe(norm_of, 0)]
    found = scan(model, metrics, answers=answers, at=at, layers=layers, **cut_of(name))
    for result, (layer, value) in zip((found, *found.also.values()), [(1, along), (0, norm_of)], strict=True):
        expected = change_along(model, whole, layer, value, reads, at)
        for got, want in zip(result.by_token, expected, strict=True):
            assert_close_abs(got, want, 1e-12)
        assert_close_abs(result.scores, np.stack([each.mean(0) for each in expected]), 1e-12)


@pytest.mark.parametrize("at", ["all", "end"])
def test_at_positions(at):
    model, places = build(), [2, -2, (0, 3), 1]
    reads = [[2], [2], [0, 3], [1]]
    how = shipsfast.Ablation(at=at)
    found = scan(model, projection(VECTOR, 1), at=places, ablation=how)
    for got, want in zip(found.by_token, change_along(model, PROMPTS, 1, along, reads, at), strict=True):
        assert_close_abs(got, want, 1e-12)


@pytest.mark.parametrize("kind", ["zero", "head_mean_v", "mean"])
def test_other_ablations(kind):
    """Against the whole model inside of `ablate`."""
    model, (layer, head) = build(), (1, 2)
    how = shipsfast.Ablation(kind, prompts=PROMPTS if kind == "mean" else None)
    found = scan(model, projection(VECTOR, 1), ablation=how).scores[:, layer, head]
    for number, ids in enumerate(PROMPTS):
        along_it = []
        for heads in ([], [(layer, head)]):
            with shipsfast.ablate(model, heads, ablation=how), torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
            along_it.append(float(hidden[0, -1] @ UNIT))
        assert found[number] == pytest.approx(along_it[1] - along_it[0], abs=1e-12)


@pytest.mark.parametrize("at", ["all", "end"])
@pytest.mark.parametrize("layers", ["model", "fused"])
def test_later_layers_do_not_run(layers, at, monkeypatch):
    """Neither in the growing batch nor in the plain passes that check it; heads in them make no rows, and steps end there."""
    model, ran, rows, run = build(), [], [], GrowingBatch.run
    inside, handles = [], []

    def watched(self, mask, *args, **how):
        rows.append(len(mask))
        inside.append(1)
        try:
            return run(self, mask, *args, **how)
        finally:
            inside.pop()

    monkeypatch.setattr(GrowingBatch, "run", watched)
    for number, layer in enumerate(model.model.layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _m, _a, number=number: ran.append(number) if inside else None
            )
        )
    handles.append(
        model.model.norm.register_forward_pre_hook(lambda _m, _a: ran.append("norm") if inside else None)
    )
    found = scan(model, projection(VECTOR, 1), layers=layers, at=at)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}
    assert rows == [1 + 2 * HEADS]
    assert (found.scores[:, 2] == 0).all() and (found.scores[:, :2] != 0).all()
    assert found.record["passes_end"].startswith("behind decoder layer 1 of 3")
    assert found.record["plan"]["rows_per_block"] == 2 * HEADS


def prepared(metric):
    measurement = ShipsMeasurement(prompts=PROMPTS, metric=metric)
    return prepare(build(), None, measurement, ScanExecution())


def test_plain_passes_end_there_too():
    ready, ran = prepared([projection(VECTOR, 0), projection(VECTOR, 1)]), []
    for number, layer in enumerate(ready.model.model.layers):
        layer.register_forward_pre_hook(lambda _m, _a, number=number: ran.append(number))
    found = plain_outputs(ready, 0, 3)
    assert ran == [0, 1]
    assert {layer: list(out.shape) for layer, out in found.items()} == {0: [3, 32], 1: [3, 32]}


def test_blocks_are_as_large_as_what_runs_of_them():
    ready = prepared(projection(VECTOR, 1))
    ready.plan = replace(ready.plan, steps_per_block=8)
    # Rows of layer 0 pass two layers, those of layer 1 one, and the unablated row two in each block.
    assert [ready.steps_of(block) for block in ready.blocks(ready.units, ready.units)] == [8, 8, 0]


def test_the_bar_counts_what_runs(capsys):
    steps = []
    tick = GrowingBatch.__init__

    def init(self, *args, tick_=None, **how):
        tick(self, *args, **how)
        self.tick, before = (lambda n: steps.append(n) or before(n)), self.tick

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingBatch, "__init__", init)
        scan(build(), projection(VECTOR, 1), progress=True, rows_per_block=3)
    # The blocks' unablated rows pass two layers each, as do heads of layer 0, those of layer 1 one.
    assert sum(steps) == 3 * 2 + 4 * 2 + 4 * 1
    assert "scan: 100%, 48 of 48 heads x prompts" in capsys.readouterr().err


def test_flops_end_there():
    model, ids = build(), PROMPTS
    anatomy = inspect_model(model, ids[0], 6)
    costs = model_flops(model, anatomy)
    short = costs.up_to(2)
    assert short.layers == costs.layers[:2] and short.head == 0
    units = [(layer, head) for layer in range(2) for head in range(HEADS)]
    two = model_flops(model, inspect_model(_without_last(model), ids[0], 6))  # the same model of two layers
    assert scan_flops(short, [pack(ids)], units) == scan_flops(two, [pack(ids)], units, head=False)


def _without_last(model):
    import copy

    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    return short


def test_a_forecast_knows_it():
    model, units = build(dtype=torch.float32), LAYERS * HEADS
    measurement = ShipsMeasurement(prompts=PROMPTS, metric=projection(VECTOR, 0))
    found = forecast(model, None, measurement, ScanExecution(layers="model"), Elsewhere(device="cpu"))
    whole = forecast(
        model, None, ShipsMeasurement(prompts=PROMPTS), ScanExecution(layers="model"), Elsewhere(device="cpu")
    )
    costs = model_flops(model, inspect_model(model, PROMPTS[0], 6)).up_to(1)
    checks = forecasting.CHECK_ROWS * scan_flops(costs, [pack([PROMPTS[0]])], [])
    heads = [(0, head) for head in range(HEADS)]
    assert found.flops == checks + scan_flops(costs, [pack(PROMPTS)], heads)
    assert found.flops < whole.flops / 2
    assert (found.units, found.plan.rows_per_block) == (units, HEADS)
    with pytest.raises(InputError, match="layer 3: the model has 3 decoder layers"):
        forecast(
            model, None, ShipsMeasurement(prompts=PROMPTS, metric=projection(VECTOR, 3)), ScanExecution(), Elsewhere("cpu")
        )  # fmt: skip


@pytest.mark.parametrize(
    "metrics", [[projection(VECTOR, 1)], [projection(VECTOR, 1), "kl"]], ids=["alone", "with-kl"]
)
def test_a_run_folder_continues(metrics, tmp_path, monkeypatch):
    def run(out):
        model = build(dtype=torch.float32)
        return shipsfast.scan(model, PROMPTS, metric=metrics, out=out, progress=False, rows_per_block=3)

    whole = run(tmp_path / "whole")
    killed_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    kept = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert kept["status"] == "running" and len(kept["parts"]) == 2
    resumed = run(tmp_path / "killed")
    for one, other in zip(every(whole), every(resumed), strict=True):
        assert np.array_equal(one, other) and np.isfinite(one).all()
    assert verify(tmp_path / "killed")["verdict"] == "sound"
    loaded = shipsfast.load(tmp_path / "killed")
    assert loaded == resumed and loaded.metric["name"] == "projection@1"
    assert run(tmp_path / "killed") == resumed  # finished
    other = projection(VECTOR.flip(0), 1)
    with pytest.raises(InputError, match="another|metric there is"):
        shipsfast.scan(
            build(dtype=torch.float32),
            PROMPTS,
            metric=[other, *metrics[1:]],
            out=tmp_path / "killed",
            progress=False,
        )


def test_control_prompts_and_their_contrast():
    model, others = build(), [[7, 7, 7], [40, 2, 31, 6], [3, 3]]
    found = scan(model, projection(VECTOR, 1), control=others)
    for result, prompts in ((found, PROMPTS), (found.control, others)):
        assert_close_abs(result.scores, np.concatenate(change_along(model, prompts, 1, along)), 1e-12)
    contrast = found.contrast()
    assert_close_abs(contrast.difference, found.mean() - found.control.mean(), 1e-12)


def test_only_heads_behind_what_is_read():
    found = scan(build(), projection(VECTOR, 0), heads=[(1, 0), (2, 3)])
    assert (found.scores[:, [1, 2], [0, 3]] == 0).all()
    assert np.isnan(found.scores[:, 0]).all()


def test_a_layer_below_all_heads():
    """The first decoder layer of this one has no attention."""
    found = scan(tiny_model("lfm2"), [projection(VECTOR, 0)])
    assert (found.scores == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name):
    model = MODELS[name]()
    before, logits = state(model), model(torch.tensor([PROMPTS[0]])).logits
    scan(model, projection(VECTOR, 0))
    scan(model, projection(VECTOR, 1), at="end")
    with pytest.raises(ZeroDivisionError):
        scan(model, probe(_fails, 1))
    assert_same(before, state(model))
    assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, logits)


def _fails(hidden):
    raise ZeroDivisionError


def test_hooks_of_others_are_in_it():
    """Steering vectors that a hook adds to what leaves a layer."""
    model = build()
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 1.5 + VECTOR)
    for layer in range(3):
        found = scan(model, projection(VECTOR, layer))
        assert_close_abs(found.scores, np.concatenate(change_along(model, PROMPTS, layer, along)), 1e-12)
    for layer in (0, 1):
        found = scan(model, projection(VECTOR, layer), at="end")
        expected = change_along(model, PROMPTS, layer, along, at="end")
        assert_close_abs(found.scores, np.concatenate(expected), 1e-12)
    for metric in (projection(VECTOR, 2), [projection(VECTOR, 1), "kl"]):
        with pytest.raises(UnsupportedModelError, match="changes hidden states between two layers"):
            scan(model, metric, at="end")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_far_scores_are_off_is_measured(dtype):
    model = build(dtype=dtype)
    found = shipsfast.scan(model, PROMPTS, metric=projection(VECTOR, 1), progress=False)
    error = found.error
    assert error.against == ("float64" if dtype == torch.float32 else "float32")
    assert len(error.rescored) == 4 and found.noise_floor > 0
    exact = np.concatenate(change_along(build(dtype=dtype).double(), PROMPTS, 1, along))
    off = np.abs(found.scores - exact)
    assert off.max() < {torch.float32: 1e-5, torch.bfloat16: 0.5}[dtype]
    assert all(each.layer < 2 for each in error.rescored)
    for each in error.rescored:
        want = exact[each.prompt, each.layer, each.head]
        assert abs(each.expected - want) < {torch.float32: 1e-12, torch.bfloat16: 1e-5}[dtype]
    assert found.above_noise()[2].sum() == 0


@pytest.mark.parametrize("metric", [projection(VECTOR, 1), probe(norm_of, 1)], ids=["projection", "callable"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, None)], ids=["all-rows", "ablated-rows"])
def test_wrong_states_are_caught(metric, rows, monkeypatch):
    """By the unablated model's own, or by the two heads that are computed again."""
    real = GrowingBatch._leaves

    def wrong(self, number, hidden):
        if self._head_chunk is not None:
            hidden = hidden.clone()
            hidden[rows] *= 1.01
        return real(self, number, hidden)

    monkeypatch.setattr(GrowingBatch, "_leaves", wrong)
    with pytest.raises(UnsupportedModelError, match="hidden states of prompt|a plain forward pass gives"):
        scan(build(dtype=torch.float32), metric)


def test_a_model_that_overflows_is_named():
    model = build(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3e4
    with pytest.raises(
        UnsupportedModelError, match="not finite without any head off: the hidden state after decoder layer 1"
    ):
        scan(model, projection(VECTOR, 1))
    assert np.isfinite(scan(model, projection(VECTOR, 0)).scores).all()


def nowhere(hidden):
    return hidden[:, 0] * float("nan") if len(hidden) > 4 else hidden[:, 0]


def test_a_probe_that_is_no_number():
    with pytest.raises(
        InputError,
        match="metric nowhere@1: the model's numbers are finite.*for its hidden states after decoder layer 1",
    ):
        scan(build(), probe(nowhere, 1))


def test_a_direction_of_other_weights_is_said(capsys):
    model = build(dtype=torch.float32)
    direction = shipsfast.direction(model, PROMPTS[:2], PROMPTS[2:], layer=1, progress=False)
    capsys.readouterr()
    scan(model, projection(direction))
    assert "direction" not in capsys.readouterr().err
    scan(build(dtype=torch.float32, seed=1), projection(direction))
    assert "metric projection@1: its direction is of other weights" in capsys.readouterr().err


def test_wrong_size():
    with pytest.raises(InputError, match="metric projection@1 has a vector of 31 numbers, and .* have 32"):
        scan(build(), projection(VECTOR[:31], 1))
    with pytest.raises(InputError, match="metric projection@3: layer 3: the model has 3 decoder layers"):
        scan(build(), projection(VECTOR, 3))


@pytest.mark.parametrize("where", ["streamed", "offloaded"])
def test_weights_that_come_as_their_layer_runs(where, tmp_path):
    """They are given back where the pass ends early, and no later layer's stay."""
    folder = save(build("llama-gqa", torch.float32), tmp_path)
    model = load_model(str(folder))
    if where == "streamed":
        other = load_model(str(folder), stream=True)
    else:
        other = load_offloaded(folder, dict.fromkeys(device_map(model, "disk"), "disk"), dtype=torch.float32)
    metric = projection(VECTOR, 1)
    expected, found = (
        shipsfast.scan(m, PROMPTS, metric=metric, progress=False, rows_per_block=5) for m in (model, other)
    )
    assert found.record["weights"] == where
    assert_close_abs(found.scores, expected.scores, 1e-5)
    assert all(p.is_meta for layer in other.model.layers for p in layer.parameters())
    along = [
        shipsfast.direction(m, PROMPTS[:2], PROMPTS[2:], layer=0, progress=False) for m in (model, other)
    ]
    assert_close_abs(along[1].vectors, along[0].vectors, 1e-4)
    assert all(p.is_meta for layer in other.model.layers for p in layer.parameters())


def test_what_is_no_number_can_be_marked():
    expected = np.concatenate(change_along(build(), PROMPTS, 1, lambda h: h[..., 0]))
    base = np.stack([stream(build(), ids)[1, -1, 0].numpy() for ids in PROMPTS])[:, None, None]
    limit = np.abs(base).max() + 0.1
    no_number = np.abs(base + expected) > limit
    assert no_number.any() and not no_number.all()

    def sometimes(hidden):
        return torch.where(hidden[:, 0].abs() > limit, float("nan"), hidden[:, 0])

    found = scan(build(), probe(sometimes, 1), nonfinite="mark")
    assert np.array_equal(found.marked, no_number)
    assert_close_abs(found.scores[~no_number], expected[~no_number], 1e-12)


def test_memory_that_runs_out_is_tried_again_smaller(monkeypatch):
    whole, real, sizes = scan(build(), projection(VECTOR, 1)), GrowingBatch.run, []

    def run(self, mask, *args, **how):
        sizes.append(len(mask))
        if len(mask) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, mask, *args, **how)

    monkeypatch.setattr(GrowingBatch, "run", run)
    assert_close_abs(scan(build(), projection(VECTOR, 1)).scores, whole.scores, 1e-12)
    assert sizes == [9, 5, 5]


@pytest.mark.parametrize("layers", ["model", "fused"])
@pytest.mark.parametrize("at", ["all", "end"])
def test_a_probe_may_write_to_what_it_gets(at, layers):
    """It gets states of its own: rows that still have layers to pass, and other metrics, are as they were."""

    def centred(hidden):
        return torch.tanh(hidden.sub_(3.0) @ UNIT)

    def same(hidden):
        return torch.tanh((hidden - 3.0) @ UNIT)

    how = dict(at=at, layers=layers)
    for layer in range(LAYERS):
        found, expected = (
            every(scan(build(), [probe(f, layer), projection(VECTOR, layer), "kl"], **how))
            for f in (centred, same)
        )
        for one, other in zip(found, expected, strict=True):
            assert_close_abs(one, other, 1e-12)


def test_a_direction_of_a_model_with_other_layers_is_refused():
    direction = shipsfast.Direction(np.stack([VECTOR.numpy()] * (LAYERS + 2)), np.ones(LAYERS + 2), 1)
    with pytest.raises(
        InputError, match=f"of a model of {LAYERS + 2} decoder layers, and this one has {LAYERS}"
    ):
        scan(build(), projection(direction))
    found = scan(build(), projection(direction.vectors[1], 1))
    assert_close_abs(found.scores, scan(build(), projection(VECTOR, 1)).scores, 1e-12)
