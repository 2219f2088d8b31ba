"""Whole runs on the path of a GPU: Triton attention and Triton small operations, here in Triton's interpreter.

Held against float64 by the model's own layers and the reference attention, or by one plain pass for each score. Bounds
are those of tests/support/rounding.py.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.engine import fused_layer
from shipsfast.engine.forked_rows import pays
from shipsfast.ops.tree_attention import TreeContext
from tests.conftest import TEST_GPU
from tests.support.decode_numerics import why_no_triton
from tests.support.fused_models import FUSED
from tests.support.models import _GQA, brute_force, build
from tests.support.numerics import assert_close_abs
from tests.support.rounding import angle_bound_deg, kl_bound

pytestmark = [
    pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton())),
    pytest.mark.skipif(TEST_GPU, reason="tests/gpu/test_on_gpu.py runs this on the device"),
    pytest.mark.filterwarnings(
        "ignore:overflow encountered in exp"
    ),  # the interpreter's, where the result is 0
]
# Shorter than elsewhere, as the interpreter takes 10 ms for each token and kernel; longer than the window of 4. Packed they
# are 8 tokens: a chunk of 8 tokens has one row.
SHARED = [5, 9, 17]
PROMPTS = [SHARED + [3, 8], SHARED + [7], SHARED + [3, 11, 50], SHARED]
OWN = dict(layers="model", backend="reference", progress=False)
TRITON = dict(layers="fused", backend="triton", progress=False)


@pytest.fixture(autouse=True)
def triton_on_a_cpu(monkeypatch):
    """The backend that is for CUDA devices alone, let in for the interpreter."""
    refused = lambda _device, dtype, _alike: "float64" if dtype == torch.float64 else None
    monkeypatch.setattr("shipsfast.ops.tree_attention._no_triton", refused)


def fused(model, **options):
    """Scores by the fused layers."""
    found = shipsfast.scan(model, PROMPTS, **options, **TRITON)
    assert found.record["layers"] == "fused" and found.record["attention_backend"] == "triton"
    assert "layers_why" not in found.record
    return found.scores


@pytest.mark.parametrize("kind", ["leaves", "template"])
def test_the_kind_of_tree_changes_no_score(kind, monkeypatch):
    """It chooses tiles, hence the order of sums alone."""
    asked = []
    monkeypatch.setattr(TreeContext, "kind", lambda _tree, window: asked.append(window) or kind)
    exact = brute_force(build(FUSED[0]), PROMPTS).numpy()
    model = build(FUSED[0]).float()
    assert_close_abs(fused(model), exact, kl_bound(model, PROMPTS, exact))
    assert asked


@pytest.mark.parametrize("family", FUSED)
def test_every_family(family):
    exact = brute_force(build(family), PROMPTS).numpy()
    model = build(family).float()
    assert exact.max() > 0.01
    assert_close_abs(fused(model), exact, kl_bound(model, PROMPTS, exact))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window"])
def test_half_precision(family):
    """In float16, as the interpreter cuts bfloat16's digits off. The truth is of the weights as they are rounded."""
    model = build(family).half()
    exact = brute_force(build(family).half().double(), PROMPTS).numpy()
    assert_close_abs(fused(model), exact, kl_bound(model, PROMPTS, exact))


LONG = [[*SHARED, *range(30, 39)], [*SHARED, *range(41, 49)]]  # so many that gate and up go by rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-gqa", {}),
        ("llama-gqa", dict(chunk_tokens=20, rows_per_block=7)),
        ("qwen3-qknorm", {}),
        ("gemma2-softcap-window", {}),
    ],
)
def test_forks_by_rank(family, options, dtype, monkeypatch):
    exact = brute_force(build(family).to(dtype).double(), LONG).numpy()
    model, taken = build(family).to(dtype), []
    monkeypatch.setattr(fused_layer, "pays", lambda *a, **k: taken.append(pays(*a, **k)) or taken[-1])
    found = shipsfast.scan(model, LONG, **options, **TRITON)
    assert sum(taken) >= 2
    assert_close_abs(found.kl, exact, kl_bound(model, LONG, exact))
    if dtype == torch.float16:
        found = shipsfast.scan(model, LONG, **options, **TRITON | {"layers": FP32_RESIDUAL})
        assert_close_abs(found.kl, exact, kl_bound(model, LONG, exact))


FP32_RESIDUAL = "fused_fp32_residual"


@pytest.mark.parametrize("layers", ["fused", FP32_RESIDUAL])
def test_a_head_that_makes_most_of_the_stream(layers):
    """As good as by the layers' own forward. By its difference to the base row it would be off by 5 to 14 times as much."""
    model = build("llama-gqa")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] *= 30
    model = model.half()
    how = dict(heads=[(0, 0), (0, 1)], ablation="zero")
    exact = shipsfast.scan(copy.deepcopy(model).double(), LONG, **how, **OWN).kl[:, 0, :2]
    own = shipsfast.scan(model, LONG, **how, **OWN).kl[:, 0, :2]
    found = shipsfast.scan(model, LONG, **how, **TRITON | {"layers": layers}).kl[:, 0, :2]
    assert_close_abs(found, exact, 2 * np.abs(own - exact).max())


SOME = [(0, 1), (1, 0), (1, 3), (2, 2)]  # heads of three layers of four


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama-gqa", dict(chunk_tokens=8, rows_per_block=3)),
        ("qwen2-gqa", {}),
        ("qwen3-qknorm", dict(ablation="mean")),
        ("gemma2-softcap-window", dict(chunk_tokens=8)),
    ],
)
def test_a_float32_residual_stream(family, options):
    model = build(family).half()
    exact = shipsfast.scan(build(family).half().double(), PROMPTS, heads=SOME, **options, **OWN).kl
    found = shipsfast.scan(model, PROMPTS, heads=SOME, **options, **TRITON | {"layers": FP32_RESIDUAL})
    assert found.record["layers"] == FP32_RESIDUAL and found.identity["residual"] == "float32"
    seen = ~np.isnan(exact)
    assert_close_abs(found.kl[seen], exact[seen], kl_bound(model, PROMPTS, exact[seen]))


def test_a_float32_residual_stream_is_closer_to_the_truth():
    """Where rounding it is what errs most: many layers, each of which adds little to a large stream."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=8.0 if "embed" in name else 0.25)
    model.half()
    heads = [(layer, 0) for layer in range(0, 12, 2)]
    exact = shipsfast.scan(copy.deepcopy(model).double(), PROMPTS[:2], heads=heads, **OWN).kl
    errors = {}
    for layers in ("fused", FP32_RESIDUAL):
        found = shipsfast.scan(model, PROMPTS[:2], heads=heads, **TRITON | {"layers": layers}).kl
        errors[layers] = float(np.sqrt(np.nanmean((found - exact) ** 2)))
    assert errors[FP32_RESIDUAL] < 0.7 * errors["fused"], errors


def test_a_float32_residual_stream_in_dataset_scans():
    model = build("llama-gqa").half()
    how = dict(group_size=2, heads=SOME, progress=False)
    exact = shipsfast.sahara(build("llama-gqa").half().double(), PROMPTS, **how)
    found = shipsfast.sahara(model, PROMPTS, **how | TRITON | {"layers": FP32_RESIDUAL})
    assert found.record["layers"] == FP32_RESIDUAL and found.heads == exact.heads
    seen = np.isfinite(exact.angle_deg)
    assert_close_abs(found.angle_deg[seen], exact.angle_deg[seen], 0.2)


def test_where_a_float32_residual_stream_is_refused():
    half, single = build("llama-gqa").half(), build("llama-gqa").float()
    with pytest.raises(shipsfast.InputError, match="cannot run: the model is in float32 as it is"):
        shipsfast.scan(single, PROMPTS, **TRITON | {"layers": FP32_RESIDUAL})
    half.lm_head.__class__ = type("OwnLinear", (torch.nn.Linear,), {})
    with pytest.raises(shipsfast.InputError, match="the output head is not a plain linear layer"):
        shipsfast.scan(half, PROMPTS, **TRITON | {"layers": FP32_RESIDUAL})
    with pytest.raises(shipsfast.InputError, match="is for scans on a GPU"):
        shipsfast.generate(
            build("llama-gqa").half(),
            PROMPTS,
            groups=[[]],
            max_new_tokens=2,
            eos_token_id=[],
            **TRITON | {"layers": FP32_RESIDUAL},
        )


def test_a_float32_residual_stream_is_tried_first(monkeypatch):
    """A PyTorch that adds half-precision products wrongly to float32 is refused; without being asked for it, all is well."""
    half = build("llama-gqa").half()
    monkeypatch.setattr(
        "shipsfast.ops.mixed_products.why_not", lambda dtype, _: f"torch is too old for {dtype}"
    )
    with pytest.raises(
        shipsfast.InputError, match="cannot run: torch is too old for torch.float16; use layers="
    ):
        shipsfast.scan(half, PROMPTS[:1], heads=SOME, **TRITON | {"layers": FP32_RESIDUAL})
    found = shipsfast.scan(half, PROMPTS[:1], heads=SOME[:1], **TRITON | {"layers": "auto"})
    assert found.record["layers"] == "fused" and "layers_why" not in found.record


CASES = {
    "cut": ("llama-gqa", dict(chunk_tokens=8, rows_per_block=5)),
    "cut gemma": ("gemma2-softcap-window", dict(chunk_tokens=16, rows_per_block=5)),
    "kv groups": ("qwen3-qknorm", dict(unit="kv_group")),
    "kv groups gemma": ("gemma2-softcap-window", dict(unit="kv_group", chunk_tokens=24)),
    "scale": ("gemma2-softcap-window", dict(ablation="scale", scale=0.3)),
    "zero": ("qwen2-gqa", dict(ablation="zero")),
    "uniform": ("mistral-window", dict(ablation="uniform")),
    "mean q": ("llama-gqa", dict(ablation="head_mean_q")),
    "mean k": ("gemma2-softcap-window", dict(ablation="head_mean_k")),
    "mean v": ("qwen3-qknorm", dict(ablation="head_mean_v")),
    "mean": ("gemma2-softcap-window", dict(ablation="mean")),
    "last layer": ("qwen3-qknorm", dict(heads=[(2, 0), (2, 3)])),
    "lower layers": ("gemma2-softcap-window", dict(heads=[(0, 1), (1, 2)])),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_row(case):
    family, options = CASES[case]
    model = build(family).float()
    found = fused(model, **options)
    options = {name: x for name, x in options.items() if name not in ("chunk_tokens", "rows_per_block")}
    exact = shipsfast.scan(build(family), PROMPTS, **options, **OWN).scores
    seen = np.isfinite(exact)
    assert np.array_equal(seen, np.isfinite(found)) and exact[seen].max() > 1e-4
    assert_close_abs(found[seen], exact[seen], kl_bound(model, PROMPTS, exact[seen]))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window"])
def test_several_heads_a_row(family):
    """From the second step of a search on, every row has the heads off that were chosen before."""
    how = dict(group_size=3, rank=1)
    model = build(family).float()
    found = shipsfast.sahara(model, PROMPTS, **how, **TRITON)
    exact = shipsfast.sahara(build(family), PROMPTS, **how, **OWN)
    assert found.record["layers"] == "fused" and found.heads == exact.heads
    seen = np.isfinite(exact.angle_deg)
    bound = angle_bound_deg(model, PROMPTS, exact.record["base_singular_values"])
    assert_close_abs(found.angle_deg[seen], exact.angle_deg[seen], bound)


def test_biases_are_added():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    exact = shipsfast.scan(model, PROMPTS, **OWN).kl
    model = model.float()
    assert_close_abs(fused(model), exact, kl_bound(model, PROMPTS, exact))


GROUPS = [[], [(0, 1)], [(2, 0)], [(1, 2), (1, 3)], [(1, 0), (2, 3)]]


@pytest.mark.parametrize("family", ["qwen2-gqa", "gemma2-softcap-window"])
def test_generation(family):
    """Weights stay where they are: nothing is joined for all layers at once. Biases and the softcap decide texts."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=2.0)
    for layer in model.model.layers:
        if family.startswith("gemma2"):
            layer.self_attn.attn_logit_softcapping = 0.05
    how = dict(groups=GROUPS, max_new_tokens=4, progress=False)
    expected = shipsfast.generate(model, PROMPTS, backend="reference", layers="model", **how)
    assert shipsfast.generate(model.float(), PROMPTS, backend="triton", **how) == expected


def test_norms_of_another_dtype_go_through_the_model():
    model = build("llama-gqa").half()
    model.model.layers[1].input_layernorm.float()
    reason = fused_layer.why_not(list(model.model.layers), torch.float16, torch.device("cuda"), "triton")
    assert reason == "input_layernorm.weight is in float32"


def test_why_not_on_a_gpu():
    """Asked without a GPU: what decides is the model, the dtype and the backend of attention."""
    layers = list(build("gemma2-softcap-window").bfloat16().model.layers)
    gpu = torch.device("cuda")
    assert fused_layer.why_not(layers, torch.bfloat16, gpu, "triton") is None
    assert "attention backend torch on cuda" in fused_layer.why_not(layers, torch.bfloat16, gpu, "torch")
    layers[1].mlp.act_fn = torch.nn.ReLU()
    assert fused_layer.why_not(layers, torch.bfloat16, gpu, "triton") == "activation ReLU"


def test_a_generation_plan_counts_the_layer_that_prefill_joins():
    from shipsfast.answers import plan
    from shipsfast.answers.measurements import GenerationMeasurement
    from shipsfast.engine.measurement import Execution
    from shipsfast.engine.subject import look_at

    model = build("llama-gqa").float()
    measurement = GenerationMeasurement(prompts=PROMPTS, max_new_tokens=4)
    subject = look_at(model, None, measurement, Execution(backend="triton", layers="fused"))
    layer = model.model.layers[0]
    assert (
        plan._loaded_bytes(subject, joined=False)
        == fused_layer.loaded_bytes(layer, subject.products, subject.device)
        > 0
    )


def test_several_ablations_in_one_batch():
    """The base row's heads, all off, once for each: one query row, as many mask rows as ablations."""
    kinds = ["zero", "undifferentiated", "mean"]
    exact = shipsfast.scan(build(FUSED[0]), PROMPTS, ablation=kinds, rescored=0, **OWN)
    found = shipsfast.scan(build(FUSED[0]).float(), PROMPTS, ablation=kinds, rescored=0, **TRITON)
    for kind, one in found.by_ablation.items():
        bound = kl_bound(build(FUSED[0]).float(), PROMPTS, exact.by_ablation[kind].kl)
        assert_close_abs(one.kl, exact.by_ablation[kind].kl, bound)
