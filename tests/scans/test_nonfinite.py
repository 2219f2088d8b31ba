"""NaN and infinity: found, named where they begin, and either the end of the run or marked; never in a ranking."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

import shipsfast
from shipsfast.cli import main
from shipsfast.demo.run import MODEL
from shipsfast.models.loading import load_model
from shipsfast.results.tables import as_json, show
from tests.support.checkpoints import device_map, load_offloaded, save
from tests.support.models import _GQA, FAMILIES, HEADS, LAYERS, build
from tests.support.overflowing import PROMPTS, overflowing, scan

NAN, INF = float("nan"), float("inf")


def spoil(model, name: str, at, value: float):
    with torch.no_grad():
        dict(model.named_parameters())[name][at] = value
    return model


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("name", "at", "where"),
    [
        ("model.embed_tokens.weight", (6, 3), r"outside the layers \(model.embed_tokens.weight\)"),
        ("model.layers.1.self_attn.q_proj.weight", (17, 0), "in layer 1, head 2"),
        ("model.layers.2.self_attn.o_proj.weight", (0, 31), "in layer 2, head 3"),
        ("model.layers.1.mlp.down_proj.weight", (0, 0), r"in layer 1 \(model.layers.1.mlp.down_proj.weight\)"),
        ("model.norm.weight", 0, "outside the layers"),
        ("lm_head.weight", (3, 3), r"outside the layers \(lm_head.weight\)"),
    ],
)  # fmt: skip
def test_weights_are_named_with_layer_and_head(name, at, where, value):
    what = "NaN" if np.isnan(value) else "infinity"
    model = spoil(build(), name, at, value)
    message = f"not finite without any head off: .* of prompt 0: {what} first appears {where}.*in the weights as they"
    with pytest.raises(shipsfast.UnsupportedModelError, match=message):
        scan(model, nonfinite="mark")
    if "lm_head" not in name:  # which hidden states do not pass
        with pytest.raises(shipsfast.InputError, match=f"{what} first appears {where}"):
            shipsfast.scan_dataset(model, PROMPTS, progress=False)
    else:
        with pytest.raises(shipsfast.UnsupportedModelError, match=f"new token 0 of prompt 0 .*{where}"):
            shipsfast.generate(model, PROMPTS, groups=[[]], max_new_tokens=2, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overflow_is_found_in_its_layer_in_every_family(family):
    """An MLP whose output is far above what float16 holds, in layer 1."""
    model = build(family, torch.float32)
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.1", "h.1")))
    linear = next(m for n, m in layer.named_modules() if n.endswith(("down_proj", "fc2", "mlp.c_proj")))
    with torch.no_grad():
        linear.weight.mul_(3e38)
    with pytest.raises(
        shipsfast.UnsupportedModelError, match=r"in layer 1 \(.*where numbers overflow float32"
    ):
        scan(model)


def test_an_ablation_that_overflows_ends_the_run_or_is_marked(tmp_path):
    model = overflowing()
    message = "the score of head 1-2 on prompt 0 is not a number.*infinity first appears in layer 1.*overflow float32"
    with pytest.raises(shipsfast.InputError, match=message):
        scan(model, ablation="zero", out=tmp_path / "run", rows_per_block=3)
    kept = shipsfast.load(tmp_path / "run")
    assert np.isfinite(kept.kl[:, 0]).all() and kept.marked is None
    result = scan(model, ablation="zero", nonfinite="mark", out=tmp_path / "run", rows_per_block=3)
    clean = scan(build(dtype=torch.float32), ablation="zero", layers="model", rows_per_block=3)
    expected = np.zeros((3, LAYERS, HEADS), bool)
    expected[:, 1, 2] = True
    for each in (result, shipsfast.load(tmp_path / "run")):
        assert np.array_equal(each.marked, expected) and np.array_equal(np.isnan(each.kl), expected)
        assert each.marked_heads == [(1, 2)] and (1, 2) not in [s[:2] for s in each.top(99)]
        assert len(each.top(99)) == LAYERS * HEADS - 1
        assert np.array_equal(each.kl[~expected], clean.kl[~expected])
        assert each.marks()["count"] == 3 and each.marks()["first"]["place"]["layer"] == 1
        assert each.stability(3).k == 3
    shown = Console(record=True, width=200)
    show(result, 5, console=shown)
    text = shown.export_text()
    assert "not finite, marked and left out of the ranking: 3 scores, of 1 head: 1-2" in text
    assert "the first: head 1-2 on prompt 0: infinity first appears in layer 1" in text
    assert json.loads(json.dumps(as_json(result, 5)["nonfinite"]))["heads"] == [[1, 2]]
    assert len(result.to_pandas()) == 3 * LAYERS * HEADS and result.to_pandas()["kl_nats"].isna().sum() == 3
    notes = [t.get_text() for axes in result.plot(tmp_path / "plot.png").axes for t in axes.texts]
    assert "x: 3 scores not finite" in notes
    result.save(tmp_path / "saved")
    assert np.array_equal(shipsfast.load(tmp_path / "saved").marked, expected)


def test_marked_scores_are_not_computed_again(tmp_path, monkeypatch):
    model, calls = overflowing(), []
    real = shipsfast.engine.growing_batch.GrowingBatch.run

    def run(self, mask, consume, **options):
        calls.append(len(mask) - 1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, mask, consume, **options)

    monkeypatch.setattr("shipsfast.engine.growing_batch.GrowingBatch.run", run)
    options = dict(ablation="zero", nonfinite="mark", out=tmp_path / "run", rows_per_block=4)
    with pytest.raises(KeyboardInterrupt):
        scan(model, **options)
    result = scan(model, **options)
    assert calls == [4, 4, 4, 4]
    assert result.marked_heads == [(1, 2)] and result.marks()["first"]["head"] == 2
    with pytest.raises(shipsfast.InputError, match="head 1-2 on prompt 0 is not a number"):
        (tmp_path / "run" / "run.json").write_text(
            (tmp_path / "run" / "run.json").read_text().replace('"complete"', '"running"')
        )
        scan(model, ablation="zero", out=tmp_path / "run")


def test_one_prompt_is_enough_for_a_mark():
    """A metric that is undefined for one prompt only."""

    def half(base, ablated, prompt):
        kl = shipsfast.ops.divergences.kl_rows(base, ablated, prompt)
        return torch.where(prompt == 1, torch.where(kl > kl.median(), INF, kl), kl)

    with pytest.raises(
        shipsfast.InputError, match="on prompt 1 is infinite.* the metric .*half is undefined"
    ):
        scan(build(), metric=half)
    result = scan(build(), metric=[half, "js"], nonfinite="mark")
    assert result.marked[1].any() and not result.marked[[0, 2]].any()
    assert np.isfinite(result.scores[[0, 2]]).all()
    ranked = {s[:2] for s in result.top(99)}
    assert ranked == {(i, j) for i in range(LAYERS) for j in range(HEADS)} - set(result.marked_heads)
    assert result.also["js"].marked is None


def test_rows_of_nothing_but_marks_are_no_ranking():
    result = scan(build(), metric=lambda b, a, i: torch.full(i.shape, NAN) if len(i) > 1 else torch.zeros(1), nonfinite="mark")  # fmt: skip
    assert result.top(5) == [] and result.marked.all() and result.marks()["count"] == result.scores.size
    show(result, 5, console=Console(record=True, quiet=True))
    assert as_json(result, 5)["top"] == []


def test_tokens_that_a_model_rules_out_stay_ruled_out():
    """-inf in the logits of some tokens, with and without heads off, is a distribution like any other."""
    model = build()
    bias = torch.zeros(61, dtype=torch.float64)
    bias[7:20] = -INF
    model.lm_head.bias = torch.nn.Parameter(bias)
    masked = scan(model)
    small = build()
    keep = [i for i in range(61) if not 7 <= i < 20]
    small.lm_head.weight = torch.nn.Parameter(small.lm_head.weight[keep].clone())
    np.testing.assert_allclose(masked.kl, scan(small).kl, rtol=0, atol=1e-12)
    assert masked.marked is None and np.isfinite(masked.kl).all()
    texts = shipsfast.generate(model, PROMPTS, groups=[[]], max_new_tokens=4, progress=False)
    assert not {t for row in texts for text in row for t in text} & set(range(7, 20))


def test_a_token_ruled_out_is_not_what_overflows():
    """-inf in the output head's bias, on purpose, and a head that overflows when it is off."""
    model = overflowing()
    bias = torch.zeros(61)
    bias[40:] = -INF
    model.lm_head.bias = torch.nn.Parameter(bias)
    for run in (shipsfast.scan, shipsfast.scan_dataset):
        with pytest.raises(shipsfast.InputError, match="head 1-2 on prompt 0.*in layer 1.*overflow float32"):
            run(model, PROMPTS, ablation="zero", progress=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)
    with pytest.raises(shipsfast.UnsupportedModelError, match=r"\(lm_head\), where numbers overflow float32"):
        scan(model)
    with torch.no_grad():
        model.lm_head.bias[3] = NAN
    with pytest.raises(shipsfast.UnsupportedModelError, match=r"NaN .*\(lm_head.bias\), in the weights"):
        scan(model)


@pytest.mark.parametrize("kind", ["streamed", "disk", "cpu"])
@pytest.mark.parametrize(
    ("name", "at", "where"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (17, 0), "in layer 1, head 2"),
        ("model.layers.2.input_layernorm.weight", 3, "in layer 2"),
    ],
)
def test_weights_that_are_not_in_memory_are_named(kind, name, at, where, tmp_path):
    model = spoil(build(dtype=torch.float32), name, at, NAN)
    if kind == "streamed":
        model = load_model(str(save(model, tmp_path)), stream=True)
    elif kind == "disk":
        model = load_offloaded(save(model, tmp_path), device_map(model, "disk"), dtype=model.dtype)
    else:
        model = cpu_offload(model, torch.device("cpu"))
    with pytest.raises(
        shipsfast.UnsupportedModelError, match=f"NaN first appears {where}.*{name}.*in the weights"
    ):
        scan(model)
    with pytest.raises(shipsfast.InputError, match=f"NaN first appears {where}.*in the weights"):
        shipsfast.scan_dataset(model, PROMPTS, progress=False)


def test_weights_of_a_module_around_others_are_named():
    """Experts keep theirs beside an activation."""
    torch.manual_seed(0)
    config = MixtralConfig(**_GQA, num_local_experts=2, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    name = "model.layers.1.mlp.experts.down_proj"
    spoil(model, name, (slice(None), 0, 0), NAN)
    with pytest.raises(
        shipsfast.UnsupportedModelError, match=f"NaN first appears in layer 1 .{name}.*weights"
    ):
        scan(model)


def test_searches_and_texts_name_the_place():
    model = overflowing(1, 2)
    with pytest.raises(
        shipsfast.InputError, match="hidden states of head 1-2 on prompt 0 .*first appears in layer 1"
    ):
        shipsfast.scan_dataset(model, PROMPTS, progress=False, ablation="zero")
    with pytest.raises(shipsfast.InputError, match="hidden states of head 1-2 on prompt 0 .*in layer 1"):
        shipsfast.sahara(model, PROMPTS, progress=False, ablation="zero", group_size=2)
    with pytest.raises(shipsfast.InputError, match=r"new token 0 of prompt 0 .*heads 1-2 off: .*in layer 1"):
        shipsfast.generate(
            model, PROMPTS, groups=[[(1, 2)]], ablation="zero", max_new_tokens=2, progress=False
        )


def test_looking_for_the_place_leaves_no_hooks():
    model = overflowing()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.train()
    with pytest.raises(shipsfast.InputError):
        scan(model, ablation="zero")
    assert model.training and all(m.training for m in model.modules())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_unknown_policies_are_refused(capsys, monkeypatch, tmp_path):
    with pytest.raises(shipsfast.InputError, match="unknown nonfinite 'zero': expected one of raise, mark"):
        scan(build(), nonfinite="zero")
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\n")
    monkeypatch.setattr("sys.argv", ["shipsfast", "scan", str(MODEL), str(prompts), "--nonfinite", "zero"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "--nonfinite zero: expected raise or mark" in capsys.readouterr().err
