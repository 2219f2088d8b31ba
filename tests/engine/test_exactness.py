"""The scan against its definition: one forward pass per ablation and prompt, in float64."""

import pytest
import torch

import shipsfast
from tests.support.models import FAMILIES, HEADS, LAYERS, brute_force, build

SHARED = [5, 9, 17, 23]
PROMPTS = {
    "shared-prefix": [
        SHARED + [3, 8, 40, 41],
        SHARED + [7],
        SHARED + [3, 8, 11, 50, 51, 52, 9, 4, 1],
        SHARED,
    ],
    "no-shared-prefix": [[4, 5, 6, 7, 8, 9], [10, 11, 12], [30, 31, 32, 33, 34]],
    "one-prompt": [[6, 2, 50, 33, 12, 12, 8]],
    "one-token": [[6], [9], [6]],
    "duplicates": [SHARED + [3], SHARED + [3], [9, 9, 9], SHARED + [3]],
}
TOLERANCE_NATS = 1e-12


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_undifferentiated_equals_brute_force(family, prompts):
    model = build(family)
    result = shipsfast.scan(model, PROMPTS[prompts], progress=False, layers="model")
    expected = brute_force(model, PROMPTS[prompts])
    if prompts != "one-token":  # a single token attends to itself, however its logits are scaled
        assert expected.max() > 1e-4, "the ablations of this model do not show"
    _close(result.kl, expected)


@pytest.mark.parametrize("ablation", ["uniform", "scale", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_ablations_equal_brute_force(family, ablation):
    model = build(family)
    result = shipsfast.scan(
        model, PROMPTS["shared-prefix"], ablation=ablation, scale=0.3, progress=False, layers="model"
    )
    _close(result.kl, brute_force(model, PROMPTS["shared-prefix"], ablation, 0.3))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "gpt2"])
def test_cut_into_chunks_blocks_and_groups(family, backend):
    model = build(family)
    result = shipsfast.scan(
        model, PROMPTS["shared-prefix"], backend=backend, progress=False, layers="model",
        chunk_tokens=20, rows_per_block=5, prompts_per_group=3,
    )  # fmt: skip
    _close(result.kl, brute_force(model, PROMPTS["shared-prefix"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close_to_float64(family):
    """Scores in float32 are within 1e-5 nats plus 1e-4 of their size of the exact ones."""
    prompts = PROMPTS["shared-prefix"]
    exact = torch.as_tensor(shipsfast.scan(build(family), prompts, progress=False).kl)
    single = shipsfast.scan(build(family).float(), prompts, progress=False)
    error = (torch.as_tensor(single.kl) - exact).abs()
    assert torch.isfinite(error).all()
    assert (error <= 1e-5 + 1e-4 * exact).all(), error.max()
    assert single.record["packing_noise"] < 1e-8 and single.noise_floor <= 1e-5 + 1e-4 * exact.median()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_ranks_the_same_head_first(dtype):
    prompts = PROMPTS["shared-prefix"]
    exact = shipsfast.scan(build("llama-gqa"), prompts, progress=False)
    half = shipsfast.scan(build("llama-gqa").to(dtype), prompts, progress=False)
    assert half.top(1)[0][:2] == exact.top(1)[0][:2]
    assert half.record["head_precision"] == "float32"


def test_long_prompts_cross_block_boundaries(monkeypatch):
    """Runs longer than a block, with and without a window."""
    monkeypatch.setattr("shipsfast.ops.tree_attention_torch.BLOCK", 3)
    monkeypatch.setattr("shipsfast.ops.tree_attention_cpp.BLOCK", 3)
    prompts = [SHARED * 3 + [3, 4, 5, 6, 7, 8], SHARED * 3 + [9, 10], SHARED * 2]
    for family in ("llama-gqa", "mistral-window"):
        model = build(family)
        for backend in ("auto", "torch"):
            got = shipsfast.scan(model, prompts, backend=backend, progress=False)
            _close(got.kl, brute_force(model, prompts))


def test_spot_check_and_noise_floor_are_recorded():
    result = shipsfast.scan(build(), PROMPTS["shared-prefix"], progress=False)
    assert result.record["spot_check_max_abs"] < TOLERANCE_NATS
    assert 0 <= result.record["packing_noise"] <= result.noise_floor < TOLERANCE_NATS
    assert result.kl.shape == (4, LAYERS, HEADS)


def _close(got, expected: torch.Tensor) -> None:
    got = torch.as_tensor(got)
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= TOLERANCE_NATS, (got - expected).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("layers", ["model", "fused"])
def test_a_model_that_leaves_its_scale_to_attention(layers):
    """Then it is one over the root of the head size, of which there are not as many as heads."""
    prompts, model = [[3, 4, 5, 6], [3, 9]], build("qwen2-gqa")
    exact = brute_force(model, prompts)
    assert model.config.hidden_size // HEADS != HEADS
    for layer in model.model.layers:
        layer.self_attn.scaling = None
    got = shipsfast.scan(model, prompts, layers=layers, progress=False).kl
    assert abs(torch.from_numpy(got) - exact).max() < 1e-12
    with shipsfast.ablate(model, [(1, 2)]):
        ablated = model(torch.tensor([prompts[0]])).logits[0, -1].log_softmax(-1)
    plain = model(torch.tensor([prompts[0]])).logits[0, -1].log_softmax(-1)
    assert abs(float((plain.exp() * (plain - ablated)).sum()) - float(exact[0, 1, 2])) < 1e-12
