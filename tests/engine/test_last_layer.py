"""The last layer's first pass wants keys and values alone: no query is projected there, and nothing else changes."""

import pytest
import torch

import shipsfast
from shipsfast.models.anatomy import inspect_model
from shipsfast.models.layer_call import no_queries
from tests.support.models import HEADS, LAYERS, brute_force, build

PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 9], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    "family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "opt", "gpt2", "phi3-fused-window"]
)
def test_scores_are_those_of_a_pass_per_head(family):
    model = build(family)
    got = shipsfast.scan(model, PROMPTS, progress=False, layers="model", chunk_tokens=30).kl
    assert abs(torch.from_numpy(got) - brute_force(model, PROMPTS)).max() < 1e-10
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_queries_are_projected_at_prompt_ends_alone():
    """Counted by (rows x tokens) that reach the projection of the last layer."""
    model = build("llama-gqa")
    last = model.model.layers[LAYERS - 1].self_attn.q_proj
    calls: list[int] = []
    real = torch.nn.Linear.forward

    def forward(self, x):
        if self is last:
            calls.append(x.shape[0] * x.shape[1])
        return real(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", forward)
        shipsfast.scan(model, PROMPTS, progress=False, layers="model")
    rows = 1 + LAYERS * HEADS
    assert rows * 3 in calls  # three prompts' ends
    assert rows * 10 not in calls  # of ten packed tokens


def test_a_projection_that_is_watched_or_foreign_is_left_alone():
    model = build("llama-gqa")
    attention = inspect_model(model, [1, 2], 8).layers[0].attention
    x = torch.randn(1, 2, 32, dtype=torch.float64)
    with no_queries(attention):
        assert attention.q_proj(x).abs().max() == 0 and attention.k_proj(x).abs().max() > 0
    handle = attention.q_proj.register_forward_hook(lambda *_: None)
    with no_queries(attention):
        assert attention.q_proj(x).abs().max() > 0
    handle.remove()

    class Lora(torch.nn.Linear):
        pass

    attention.q_proj = Lora(32, 32).double()
    with no_queries(attention):
        assert attention.q_proj(x).abs().max() > 0
