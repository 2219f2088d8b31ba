"""Fused layers in half precision on a CPU: products in half precision or float32, everything else in float32."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.engine import forked_rows, fused_layer
from shipsfast.ops import half_products
from shipsfast.ops.extension import extension_status
from tests.support.fused_models import FUSED, PROMPTS, SHARED
from tests.support.models import brute_force, build
from tests.support.numerics import assert_close_abs
from tests.support.rounding import kl_bound

pytestmark = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONG = [[*SHARED, *range(30, 39)], [*SHARED, *range(41, 49)]]  # so many that gate and up go by rank
FP32_RESIDUAL = "fused_fp32_residual"
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@pytest.fixture(params=["units", "no-units"])
def products(request, monkeypatch):
    """A processor that has units for half precision, and one that has none: the dtype of products, of a model's."""
    gain = {"units": 4.0, "no-units": 0.2}[request.param]
    monkeypatch.setattr(half_products, "_gain", lambda _dtype: gain)
    return lambda dtype: dtype if request.param == "units" else torch.float32


def scan(model, prompts=PROMPTS, **options):
    return shipsfast.scan(model, prompts, progress=False, **options)


def exact_scores(family: str, dtype: torch.dtype, prompts=PROMPTS, *how) -> np.ndarray:
    """Of the weights as they are rounded."""
    return brute_force(build(family).to(dtype).double(), prompts, *how).numpy()


@each_half
@pytest.mark.parametrize("family", FUSED)
def test_every_family(family, dtype, products):
    model, exact = build(family).to(dtype), exact_scores(family, dtype)
    found = scan(model)
    assert found.record["layers"] == FP32_RESIDUAL and "layers_why" not in found.record
    assert found.record["attention_backend"] == "cpp"
    assert found.record["products"] == str(products(dtype)).removeprefix("torch.")
    assert found.identity["residual"] == "float32"
    assert found.identity.get("products") == (None if products(dtype) == dtype else "float32")
    assert_close_abs(found.kl, exact, kl_bound(model, PROMPTS, exact))
    again = scan(model, chunk_tokens=20, rows_per_block=5)
    assert_close_abs(again.kl, exact, kl_bound(model, PROMPTS, exact))


@each_half
def test_nearer_to_the_truth_than_the_layers_own_forward(dtype, products):
    """Root mean squares of errors of sqrt(KL), which rounding moves by as much for every head, over all families."""
    errors = {"model": [], "auto": []}
    for family in FUSED:
        model, exact = build(family).to(dtype), np.sqrt(exact_scores(family, dtype))
        for layers, found in errors.items():
            found.append(np.sqrt(scan(model, layers=layers, rescored=0).kl.clip(0)) - exact)
    own, ours = (float(np.sqrt(np.mean(np.square(errors[name])))) for name in ("model", "auto"))
    assert ours < (0.9 if products(dtype) == dtype else 0.35) * own


@each_half
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window"])
def test_forks_by_rank(family, dtype, products, monkeypatch):
    taken = []
    monkeypatch.setattr(
        fused_layer, "pays", lambda *a, **k: taken.append(forked_rows.pays(*a, **k)) or taken[-1]
    )
    model, exact = build(family).to(dtype), exact_scores(family, dtype, LONG)
    found = scan(model, LONG)
    assert sum(taken) >= 2
    assert_close_abs(found.kl, exact, kl_bound(model, LONG, exact))


@pytest.mark.parametrize("ablation", ["uniform", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean"])
def test_every_ablation(ablation, products):
    model = build("llama-gqa").bfloat16()
    exact = scan(copy.deepcopy(model).double(), ablation=ablation).kl
    found = scan(model, ablation=ablation)
    assert found.record["layers"] == FP32_RESIDUAL
    assert_close_abs(found.kl, exact, kl_bound(model, PROMPTS, exact))


def test_ends_only(products):
    model = build("llama-gqa").bfloat16()
    exact = scan(copy.deepcopy(model).double(), at="end").kl
    assert_close_abs(scan(model, at="end").kl, exact, kl_bound(model, PROMPTS, exact))


def test_searches(products):
    model = build("llama-gqa").bfloat16()
    how = dict(group_size=2, progress=False)
    found = shipsfast.sahara(model, PROMPTS, **how)
    exact = shipsfast.sahara(copy.deepcopy(model).double(), PROMPTS, **how)
    assert found.record["layers"] == FP32_RESIDUAL
    at = tuple(np.transpose([exact.heads[0]]))
    assert np.isclose(found.angle_deg[0][at], exact.angle_deg[0][at], rtol=0.05)


@each_half
def test_biases_are_added(dtype, products):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.models import _GQA

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = model.to(dtype)
    exact = scan(copy.deepcopy(model).double(), layers="model").kl
    assert_close_abs(scan(model).kl, exact, kl_bound(model, PROMPTS, exact))


@each_half
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "gpt2"])
def test_texts(family, dtype, products):
    """Token by token what a pass over the whole text says, in float64 with the weights as they are; near ties may fall
    otherwise."""
    model = build(family).to(dtype)
    wide, groups, limit = copy.deepcopy(model).double(), [[], [(1, 1)]], 6
    texts = shipsfast.generate(
        model, PROMPTS, groups=groups, max_new_tokens=limit, eos_token_id=[], progress=False
    )
    near = {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    for group, answers in zip(groups, texts, strict=True):
        for prompt, said in zip(PROMPTS, answers, strict=True):
            assert len(said) == limit
            with torch.no_grad(), shipsfast.ablate(wide, group):
                logits = wide(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
            best, chosen = logits.max(-1).values, logits.gather(1, torch.tensor(said)[:, None])[:, 0]
            assert (best - chosen).max() <= near, (group, prompt)


def test_what_is_refused_by_name():
    half = build("llama-gqa").bfloat16()
    with pytest.raises(
        shipsfast.InputError, match="'fused' .* cannot run: on a CPU the residual stream .* in float32"
    ):
        scan(half, layers="fused")
    assert scan(half, layers=FP32_RESIDUAL).record["layers"] == FP32_RESIDUAL
    half.lm_head.__class__ = type("OwnLinear", (torch.nn.Linear,), {})
    assert "output head" in scan(half).record["layers_why"]


def test_what_overflows_in_the_models_own_forward_is_named(products):
    """Also where the fused layers, with products in float32, get through."""
    model = build("llama-gqa").half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 20_000
        model.model.layers[1].mlp.down_proj.weight /= 10_000
    with pytest.raises(
        shipsfast.UnsupportedModelError, match=r"not finite .*layers\.1\.mlp\.up_proj.*float16"
    ):
        scan(model)


def test_what_overflows_with_a_head_off_is_named(products):
    """An ablation that the model's own float16 layers do not stand; the fused ones keep their stream in float32."""
    model = build("llama-gqa").half()
    how = dict(ablation="scale", scale=1e6, heads=[(1, 0), (1, 1)])
    refused = (
        shipsfast.InputError,
        shipsfast.UnsupportedModelError,
    )  # by its scores, or by its own layers alone
    with pytest.raises(refused, match="first appears in layer 1.*float16"):
        scan(model, **how)
    found = scan(model, nonfinite="mark", **how)
    known = found.kl[:, 1, :2]
    assert np.isfinite(known).any() or found.marked[:, 1, :2].any()


def test_a_generation_plan_counts_the_layer_that_prefill_converts(products):
    from shipsfast.answers import plan
    from shipsfast.answers.measurements import GenerationMeasurement
    from shipsfast.engine.measurement import Execution
    from shipsfast.engine.subject import look_at

    model = build("llama-gqa").bfloat16()
    measurement = GenerationMeasurement(prompts=PROMPTS, max_new_tokens=4)
    subject, layers = look_at(model, None, measurement, Execution()), model.model.layers
    own = sum(p.numel() for p in layers.parameters())
    if products(torch.bfloat16) == torch.float32:
        of_one = fused_layer.loaded_bytes(layers[0], torch.float32, torch.device("cpu"))
        assert plan._loaded_bytes(subject, joined=True) == 4 * own + of_one
    else:
        assert plan._loaded_bytes(subject, joined=True) == 2 * own


def test_texts_where_converted_weights_have_no_room(monkeypatch):
    """Then each step converts a layer's weights anew, and says the same."""
    from shipsfast.answers import plan

    monkeypatch.setattr(half_products, "_gain", lambda _dtype: 0.2)
    model, seen = build("llama-gqa").bfloat16(), []
    how = dict(groups=[[], [(1, 1)]], max_new_tokens=5, eos_token_id=[], progress=False)
    own = plan._fitted
    monkeypatch.setattr(plan, "_fitted", lambda *a, joined: seen.append(joined) or own(*a, joined=joined))
    expected = shipsfast.generate(model, PROMPTS, **how)
    assert seen == [True]
    needed = plan._loaded_bytes

    def much(subject, joined):
        return 2**50 if joined else needed(subject, joined)

    monkeypatch.setattr(plan, "_loaded_bytes", much)
    assert shipsfast.generate(model, PROMPTS, **how) == expected
    assert seen == [True, True, False]


def test_a_packing_that_is_refused_is_left_out(monkeypatch):
    def refused(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(half_products, "_gain", lambda _dtype: 4.0)
    model = build("llama-gqa").bfloat16()
    expected = scan(model).kl
    fused_layer._packs.cache_clear()
    ops = type("Ops", (), {"_reorder_linear_weight": staticmethod(refused)})
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", ops)
        assert not fused_layer._packs(torch.bfloat16)
        found = scan(model).kl
    fused_layer._packs.cache_clear()
    assert_close_abs(found, expected, kl_bound(model, PROMPTS, expected))


def test_plans_count_what_is_in_float32(products):
    """All between a layer's products, and the residual stream; a cache is in the model's own dtype."""
    from shipsfast.answers.measurements import DecodingExecution, GenerationMeasurement
    from shipsfast.answers.plan import make_generation_plan
    from shipsfast.engine.subject import look_at
    from shipsfast.models.anatomy import LOGIT_COPIES
    from shipsfast.ops.kv_cache import slot_bytes

    model, execution = build("llama-gqa").bfloat16(), DecodingExecution()
    subject = look_at(model, None, GenerationMeasurement(prompts=PROMPTS, max_new_tokens=4), execution)
    plan, anatomy = make_generation_plan(subject, 2, execution), subject.anatomy
    cache = slot_bytes(anatomy.num_layers, anatomy.num_kv_heads, anatomy.head_dim, plan.capacity, 2)
    assert plan.slot_bytes == cache + 4 * (anatomy.vocab_size * LOGIT_COPIES + anatomy.work_width)
    held = subject.held()
    assert held.dtype == plan.prefill.needs.held.dtype == torch.float32 and held.row_size == 4


def test_another_precision_of_products_is_another_run(tmp_path, monkeypatch):
    half = build("llama-gqa").bfloat16()
    monkeypatch.setattr(half_products, "_gain", lambda _dtype: 4.0)
    scan(half, out=tmp_path / "run")
    monkeypatch.setattr(half_products, "_gain", lambda _dtype: 0.5)
    with pytest.raises(shipsfast.InputError, match="products"):
        scan(half, out=tmp_path / "run")


def test_products_go_by_what_was_measured(monkeypatch):
    gains = {torch.bfloat16: 2.0, torch.float16: 1.1}
    monkeypatch.setattr(half_products, "_gain", gains.get)
    assert half_products.products_dtype(torch.bfloat16) == torch.bfloat16
    assert half_products.products_dtype(torch.float16) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert half_products.products_dtype(dtype) == dtype


def test_the_measurement_is_made_once():
    half_products._gain.cache_clear()
    gain = half_products._gain(torch.bfloat16)
    assert gain > 0 and half_products._gain(torch.bfloat16) == gain
    assert half_products._gain.cache_info().misses == 1


def test_the_measurement_is_of_the_processor_and_not_of_who_else_is_on_it(monkeypatch):
    """Threads are as before, and time in which the process waits does not count."""
    half_products._gain.cache_clear()
    before, linear = torch.get_num_threads(), torch.nn.functional.linear
    torch.set_num_threads(2)

    def disturbed(x, weight):
        if x.dtype == torch.bfloat16:
            time.sleep(0.02)
        return linear(x, weight)

    try:
        undisturbed = half_products._gain(torch.bfloat16)
        half_products._gain.cache_clear()
        monkeypatch.setattr(torch.nn.functional, "linear", disturbed)
        assert half_products._gain(torch.bfloat16) > 0.6 * undisturbed
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        half_products._gain.cache_clear()
