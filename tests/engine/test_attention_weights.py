"""output_attentions inside `ablate`: the weights of the ablated model, against their definition."""

import pytest
import torch

import shipsfast
from tests.support.models import build
from tests.support.numerics import assert_close_abs

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def eager(family):
    model = build(family)
    model.set_attn_implementation("eager")
    return model


def weights(model, heads, ablation="undifferentiated", **how):
    with shipsfast.ablate(model, heads, ablation=ablation), torch.no_grad():
        return model(TOKENS, **how).attentions


@pytest.mark.parametrize(
    "family", ["llama-gqa", "gpt2", "gemma2-softcap-window", "gemma3-qknorm-window", "opt"]
)
def test_without_a_head_off_they_are_the_models_own(family):
    model = eager(family)
    with torch.no_grad():
        expected = model(TOKENS, output_attentions=True).attentions
    for own, got in zip(expected, weights(model, [], output_attentions=True), strict=True):
        assert_close_abs(got, own, 1e-6)  # eager attention rounds its softmax to float32


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_of_a_head_that_is_off(implementation):
    model = build()
    model.set_attn_implementation(implementation)
    plain = weights(model, [], output_attentions=True)
    off = weights(model, [(1, 2)], "uniform", output_attentions=True)
    seen = torch.ones(6, 6, dtype=torch.float64).tril()
    assert_close_abs(off[1][0, 2], seen / seen.sum(-1, keepdim=True), 1e-12)
    assert_close_abs(off[0], plain[0], 1e-14)
    assert_close_abs(off[1][0, [0, 1, 3]], plain[1][0, [0, 1, 3]], 1e-14)
    # An output that is scaled away had these weights.
    assert_close_abs(weights(model, [(1, 2)], "zero", output_attentions=True)[1], plain[1], 1e-14)


def test_asked_for_by_the_config_and_in_generate():
    model = eager("llama-gqa")
    asked = weights(model, [(1, 2)], output_attentions=True)
    with shipsfast.ablate(model, [(1, 2)]):
        out = model.generate(
            TOKENS, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    assert [[tuple(x.shape) for x in step] for step in out.attentions] == [
        [(1, 4, 6, 6)] * 3, [(1, 4, 1, 7)] * 3, [(1, 4, 1, 8)] * 3
    ]  # fmt: skip
    for step, once in zip(out.attentions[0], asked, strict=True):
        assert torch.equal(step, once)
    model.config.output_attentions = True
    for by_config, once in zip(weights(model, [(1, 2)]), asked, strict=True):
        assert torch.equal(by_config, once)
    shipsfast.scan(model, TOKENS.tolist(), progress=False)
