"""Models that cannot be scanned exactly are refused by name, before any score is made."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
)

import shipsfast
from tests.support.models import _COMMON, build

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 9]]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2), "Mamba"),
        (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "Bloom"),
        (DiffLlamaConfig(**_COMMON, num_key_value_heads=2), "calls attention 2 times"),
        (
            Llama4TextConfig(
                **_COMMON, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
                attention_chunk_size=4,
            ),
            "neither causal nor a sliding window",
        ),
        (
            LlamaConfig(
                **(_COMMON | dict(max_position_embeddings=64)),
                rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4},
            ),
            "rotary embedding",
        ),
    ],
    ids=["mamba", "bloom-alibi", "diffllama-twice", "llama4-chunked", "dynamic-rope"],
)  # fmt: skip
def test_refused_by_name(config, reason):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(shipsfast.UnsupportedModelError, match=reason):
        shipsfast.scan(model, PROMPTS, progress=False)


def test_attention_outside_the_interface_is_refused():
    model = build()

    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states, **_kwargs):
            return hidden_states, None

    for layer in model.model.layers:
        layer.self_attn = OwnAttention()
    with pytest.raises(shipsfast.UnsupportedModelError, match="LlamaForCausalLM has no attention heads"):
        shipsfast.scan(model, PROMPTS, progress=False)


def test_a_model_that_answers_differently_when_packed_is_refused():
    """A layer that looks at the length of the sequence, which packing changes: the alarm, not the probe, notices."""
    model = build()
    mlp = model.model.layers[1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x + 0.1 * x.shape[1] * x[..., :1])
    with pytest.raises(shipsfast.UnsupportedModelError, match="when its prompts are packed"):
        shipsfast.scan(model, [[5, 6, 7, 8], [9, 10], [11, 12, 13]], progress=False)


def test_rows_that_disturb_each_other_are_refused():
    """A layer that mixes rows gives wrong scores and a right unablated row: the spot check notices."""
    model = build()
    mlp = model.model.layers[1].mlp
    original = mlp.forward

    def forward(x):
        mixed = x.clone()
        mixed[1:] = x[1:] + 0.5 * x[:1]
        return original(mixed)

    mlp.forward = forward
    with pytest.raises(shipsfast.UnsupportedModelError, match="a plain forward pass gives"):
        shipsfast.scan(model, PROMPTS, progress=False)


def test_not_finite_logits_are_refused():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(shipsfast.UnsupportedModelError, match="not finite"):
        shipsfast.scan(model, PROMPTS, progress=False)
