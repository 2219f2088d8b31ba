"""Steering vectors: at every token they are a part of the model, at some places only the model looks at places, and that is
seen in every dtype, however small they are beside rounding."""

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.models.anatomy import inspect_model, with_ends
from tests.support import family_oracle
from tests.support.models import build
from tests.support.numerics import assert_close_abs
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 17, 23, 33, 8], [5, 9, 17, 7], [5, 9, 17, 23, 11]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))


def last(out, vector):
    out[:, -1] += vector


def by_place(out, vector):
    out += torch.arange(out.shape[1])[:, None] * vector


def prompt_only(out, vector):
    if out.shape[1] > 1:
        out[:, -1] += vector


def third(out, vector):
    out[:, 2] += vector  # which a single token has not


def everywhere(out, vector):
    out += vector


PLACES = [last, by_place, prompt_only, third]


def steered(model, add, norm, layer=0):
    def hook(_module, _args, out):
        out = out.clone()
        add(out, (norm * VECTOR / VECTOR.norm()).to(out.dtype))
        return out

    model.model.layers[layer].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", PLACES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_place_is_seen(family, add, dtype):
    model = steered(tiny_model(family, dtype), add, 0.1)
    assert inspect_model(model, PROMPTS[0], 6).looks_beyond


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_rounding_is_not_taken_for_it(family, dtype):
    """Routers round in half precision, by more than the vectors above."""
    model = tiny_model(family, dtype)
    assert not inspect_model(model, PROMPTS[0], 6).looks_beyond
    assert not inspect_model(steered(model, everywhere, 0.1), PROMPTS[0], 6).looks_beyond


@pytest.mark.parametrize("add", [everywhere, last, by_place])
def test_scores_are_those_of_the_steered_model(add):
    model = steered(build(), add, 0.5)
    expected = family_oracle.ships(model, PROMPTS)
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert_close_abs(result.kl, expected, 1e-12)
    assert ("packs" in result.record) == (add is not everywhere)
    assert (expected - family_oracle.ships(build(), PROMPTS)).abs().max() > 1e-3


@pytest.mark.parametrize("layers", ["fused", "model"])
@pytest.mark.parametrize("layer", [0, -1])
def test_prompts_side_by_side_are_steered_each_at_its_last_token(layer, layers):
    model, prompts = steered(build(), last, 0.5, layer), [ids[:4][::-1] for ids in PROMPTS]
    result = shipsfast.scan(model, prompts, layers=layers, progress=False)
    assert result.record["plan"]["prompt_groups"] == [3]
    assert_close_abs(result.kl, family_oracle.ships(model, prompts), 1e-12)


@pytest.mark.parametrize("at", ["all", "end"])
@pytest.mark.parametrize("add", [last, by_place])
def test_along_answers_every_read_is_the_last_token_of_a_sequence(add, at):
    """Where a hook looks for it: read in the midst of a longer sequence, a token would go without the vector."""
    model, answers = steered(build(), add, 0.5), [[3, 14, 7], [33, 8], [6]]
    reads = [p + a[:n] for p, a in zip(PROMPTS, answers, strict=True) for n in range(len(a))]
    result = shipsfast.scan(model, PROMPTS, answers=answers, at=at, progress=False)
    assert_close_abs(
        np.concatenate(result.by_token), family_oracle.ships(model, reads, end=at == "end"), 1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_looks_for_the_last_token_is_taken_for_it(dtype):
    def seen(model) -> bool:
        return with_ends(model, inspect_model(model, PROMPTS[0], 6), PROMPTS[0]).looks_at_end

    assert seen(steered(tiny_model("llama", dtype), last, 0.1))
    assert seen(steered(tiny_model("lfm2", dtype), last, 0.1))
    assert not seen(tiny_model("llama", dtype))
    assert not any(seen(tiny_model(family, dtype)) for family in ("lfm2", "qwen3_next", "falcon_h1"))


def test_bf16_scores_of_a_small_vector():
    """No pack is shared, as the hook wants it: off from the same model's float64 scores by rounding."""
    result = shipsfast.scan(steered(build(dtype=torch.bfloat16), last, 0.3), PROMPTS, progress=False)
    exact = family_oracle.ships(steered(build(dtype=torch.bfloat16).double(), last, 0.3), PROMPTS)
    assert "side by side" in result.record["packs"]
    assert ((torch.as_tensor(result.kl) - exact).abs() <= 0.15 * (1 + exact)).all()


def test_heads_off_at_the_end_only_are_refused_with_a_hook_between_layers():
    model = steered(tiny_model("llama", torch.float64), everywhere, 0.1)
    shipsfast.scan(model, PROMPTS, progress=False)
    with pytest.raises(
        shipsfast.UnsupportedModelError, match="or a hook on its layers, changes hidden states"
    ):
        shipsfast.scan(model, PROMPTS, at="end", progress=False)
