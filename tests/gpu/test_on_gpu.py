"""Whole runs on a CUDA GPU, held against float64 on the CPU: Triton attention, CUDA KL, the decode kernel."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import shipsfast
from shipsfast.engine import fused_layer
from shipsfast.engine.forked_rows import pays
from shipsfast.ops.subspaces import leading_subspace, subspace_angle_deg
from tests.support.numerics import assert_close_abs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

_SIZES = dict(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "gemma2": Gemma2Config(**_SIZES, sliding_window=6, attn_logit_softcapping=2.0),
}
FUSED = FAMILIES | {
    "mistral": MistralConfig(**_SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**{name: x for name, x in _SIZES.items() if name != "head_dim"}),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 9], [5, 6, 7, 20], [30]]
# Enough tokens that rows which fork take gate and up by rank (engine/forked_rows.py).
LONG = [[5, 6, 7, 8, 9, 10, 11, 12, *range(20 + i, 40 + i)] for i in range(4)]
GROUPS = [[], [(0, 1)], [(2, 0)], [(1, 2), (2, 3)]]
# Scores of these models are around 0.1 nats.
TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def pair(family: str, dtype: torch.dtype):
    """The same weights in float64 on the CPU and in `dtype` on the GPU."""
    torch.manual_seed(0)
    config = copy.deepcopy(FUSED[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model = model.to(dtype).double().eval()
    return model, copy.deepcopy(model).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan(family, dtype):
    exact, model = pair(family, dtype)
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert result.record["attention_backend"] == "triton" and result.record["layers"] == "fused"
    expected = shipsfast.scan(exact, PROMPTS, progress=False)
    assert_close_abs(result.kl, expected.kl, TOLERANCE_NATS[dtype])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("options", [{}, dict(chunk_tokens=40, rows_per_block=5)], ids=["whole", "cut"])
def test_fused_layers_are_as_close_as_the_models_own(family, dtype, options):
    """Error against float64 at most twice that of the model's own layers on the same device, plus a floor."""
    exact, model = pair(family, dtype)
    expected = torch.as_tensor(shipsfast.scan(exact, PROMPTS, layers="model", progress=False).kl)
    runs = {
        layers: shipsfast.scan(model, PROMPTS, layers=layers, progress=False, **options)
        for layers in ("model", "fused")
    }
    assert {layers: run.record["layers"] for layers, run in runs.items()} == {
        "model": "model",
        "fused": "fused",
    }
    error = float((torch.as_tensor(runs["model"].kl) - expected).abs().max())
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    assert_close_abs(runs["fused"].kl, expected, 2 * error + floor)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("family", FUSED)
def test_a_scan_by_rank(family, dtype, monkeypatch):
    exact, model = pair(family, dtype)
    expected = torch.as_tensor(shipsfast.scan(exact, LONG, layers="model", progress=False).kl)
    own = torch.as_tensor(shipsfast.scan(model, LONG, layers="model", progress=False).kl)
    taken = []
    monkeypatch.setattr(fused_layer, "pays", lambda *a, **k: taken.append(pays(*a, **k)) or taken[-1])
    found = shipsfast.scan(model, LONG, layers="fused", progress=False)
    assert sum(taken) >= 2
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    assert_close_abs(found.kl, expected, 2 * float((own - expected).abs().max()) + floor)


@pytest.mark.parametrize(
    ("kind", "unit"), [("scale", "head"), ("head_mean_k", "head"), ("mean", "head"), ("zero", "kv_group")]
)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_fused_layers_with_other_ablations(family, kind, unit):
    exact, model = pair(family, torch.float32)
    how = dict(ablation=kind, unit=unit, progress=False)
    found = shipsfast.scan(model, PROMPTS, layers="fused", **how)
    assert_close_abs(found.kl, shipsfast.scan(exact, PROMPTS, **how).kl, TOLERANCE_NATS[torch.float32])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_search(family):
    """Rows with several heads off."""
    exact, model = pair(family, torch.float32)
    how = dict(group_size=3, progress=False)
    found, expected = shipsfast.sahara(model, PROMPTS, **how), shipsfast.sahara(exact, PROMPTS, **how)
    assert found.record["layers"] == "fused" and found.heads == expected.heads
    seen = np.isfinite(expected.angle_deg)
    assert_close_abs(found.angle_deg[seen], expected.angle_deg[seen], 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[:1]], ids=["several", "one"]
)  # one end: products of one row
def test_a_float32_residual_stream(family, dtype, prompts):
    exact, model = pair(family, dtype)
    expected = torch.as_tensor(shipsfast.scan(exact, prompts, layers="model", progress=False).kl)
    own = torch.as_tensor(shipsfast.scan(model, prompts, layers="model", progress=False).kl)
    found = shipsfast.scan(model, prompts, layers="fused_fp32_residual", progress=False)
    assert found.record["layers"] == "fused_fp32_residual"
    assert_close_abs(found.kl, expected, 2 * float((own - expected).abs().max()) + 1e-4)
    angles = shipsfast.scan_dataset(model, PROMPTS, layers="fused_fp32_residual", progress=False).angle_deg
    assert np.isfinite(angles).all()


def test_what_cannot_be_fused_says_why():
    config = GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval().to("cuda")
    record = shipsfast.scan(model, PROMPTS, progress=False).record
    assert record["layers"] == "model" and "GPT2Block is not one of" in record["layers_why"]
    record = shipsfast.scan(pair("llama", torch.bfloat16)[1], PROMPTS, backend="torch", progress=False).record
    assert record["layers"] == "model" and "attention backend torch on cuda" in record["layers_why"]


@pytest.mark.parametrize("family", FAMILIES)
def test_angles(family):
    exact, model = pair(family, torch.float32)
    found = shipsfast.scan_dataset(model, PROMPTS, progress=False).angle_deg
    assert_close_abs(found, shipsfast.scan_dataset(exact, PROMPTS, progress=False).angle_deg, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family, dtype):
    """In bfloat16 texts may part at near-ties; every run holds one text against a plain forward pass."""
    exact, model = pair(family, dtype)
    how = dict(groups=GROUPS, max_new_tokens=12, progress=False)
    found = shipsfast.generate(model, PROMPTS, **how)
    if dtype == torch.float32:
        assert found == shipsfast.generate(exact, PROMPTS, **how)
    assert found == shipsfast.generate(model, PROMPTS, **how)
    assert shipsfast.generate(model, PROMPTS, batch_rows=3, do_sample=True, **how)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("common", [0, 1e4], ids=["", "common"])
@pytest.mark.parametrize(("prompts", "width"), [(100, 4096), (31, 20)])
def test_angles_of_many_matrices(prompts, width, common, rank):
    """Without LAPACK there, with it here; `common` is a direction that all prompts share."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(prompts, width)) + common
    base[:4] *= np.array([[8], [6], [4], [3]])
    x = torch.from_numpy(base + 1e-3 * rng.normal(size=(40, prompts, width)))
    expected = subspace_angle_deg(leading_subspace(x[:1], rank)[0], x)
    on_gpu = x.cuda()
    found = subspace_angle_deg(leading_subspace(on_gpu[:1], rank)[0], on_gpu)
    assert expected[1:].min() > 1e-7
    assert_close_abs(found, expected, 1e-8)


def test_top_heads_of_a_screen_in_bfloat16():
    _, model = pair("llama", torch.float32)
    found = shipsfast.top_heads(model, PROMPTS, k=2, screen="bfloat16", progress=False)
    expected = shipsfast.scan(model, PROMPTS, progress=False).top(2)
    assert [h[:2] for h in found.heads] == [h[:2] for h in expected]
    assert_close_abs(
        torch.tensor([h.score for h in found.heads]),
        torch.tensor([h.score for h in expected]),
        TOLERANCE_NATS[torch.float32],
    )
