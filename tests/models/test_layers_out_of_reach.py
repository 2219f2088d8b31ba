"""A layer whose attention cannot be reached is named, and the layers behind it are not counted in its place."""

import pytest
import torch

import shipsfast
from tests.support.models import build
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9]]


class Own(torch.nn.Module):
    """Holds parts of the model, and calls no attention."""

    def __init__(self, old):
        super().__init__()
        self.q_proj = old.q_proj

    def forward(self, hidden_states, **_kwargs):
        return self.q_proj(hidden_states), None


class Skips(torch.nn.Module):
    def forward(self, hidden_states, *_args, **_kwargs):
        return hidden_states


def own_forward(model):
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_kwargs: (hidden_states * 0.1, None)


def own_module(model):
    model.model.layers[0].self_attn = Own(model.model.layers[0].self_attn)


def layer_forward(model):
    model.model.layers[0].forward = lambda hidden_states, *_args, **_kwargs: hidden_states


def layer_replaced(model):
    model.model.layers[0] = Skips()


class Fewer(torch.nn.ModuleList):
    def __getitem__(self, _index):
        return list(self)[1:]


def layer_left_out(model):
    model.model.layers.__class__ = Fewer


@pytest.mark.parametrize("how", [own_forward, own_module, layer_forward, layer_replaced, layer_left_out])
def test_refused_and_named(how):
    model = build()
    how(model)
    with (
        pytest.raises(
            shipsfast.UnsupportedModelError, match=r"heads of model.layers.0 are out of reach"
        ) as told,
        shipsfast.ablate(model, [(0, 1)]),
    ):
        pass
    assert "LlamaForCausalLM: model.layers.0" in str(told.value)
    for call in (
        lambda: shipsfast.scan(model, PROMPTS, progress=False),
        lambda: shipsfast.generate(model, PROMPTS, groups=[[(0, 1)]], max_new_tokens=2, progress=False),
    ):
        with pytest.raises(
            shipsfast.UnsupportedModelError, match=r"heads of model.layers.0 are out of reach"
        ):
            call()


def test_in_a_hybrid_model_too():
    """Its layers without attention stay what they are."""
    model = tiny_model("lfm2")
    with shipsfast.ablate(model, [(0, 1)]):
        pass
    layer = next(x for x in model.model.layers if hasattr(x, "self_attn"))
    other = next(x for x in model.model.layers if not hasattr(x, "self_attn"))
    layer.self_attn.forward = lambda hidden_states, **_kwargs: (hidden_states, None)
    with (
        pytest.raises(shipsfast.UnsupportedModelError, match=r"no attention heads"),
        shipsfast.ablate(model, []),
    ):
        pass
    del layer.self_attn.forward
    other.conv = torch.compile(other.conv, backend="eager")  # a wrapper is no other module
    with shipsfast.ablate(model, [(0, 1)]):
        pass
