"""Whole answers of a real chat model: what a broken one says is no success."""

import numpy as np
import pytest
import torch

import shipsfast

from .conftest import PROMPTS

pytestmark = [pytest.mark.real, pytest.mark.serial, pytest.mark.timeout(600)]

BREAKS, HARMLESS = [(0, None)], [(25, None)]  # seen: word salad and nothing; answers that read well


@pytest.fixture(scope="module")
def evaluated(model, tokenizer):
    return shipsfast.evaluate(
        model, list(PROMPTS), tokenizer, groups=[BREAKS, HARMLESS], template="chat", max_new_tokens=40, progress=False
    )  # fmt: skip


def test_word_salad_is_incoherent_and_what_reads_well_is_not(evaluated):
    broken, harmless = evaluated.labels
    assert "complied" not in broken and "incoherent" in broken
    assert set(harmless) <= {"complied", "refusal"}  # one begins with "I'm afraid of the sea"
    assert evaluated.perplexity[0] > 10 * evaluated.perplexity[1]
    assert evaluated.difference()[0, 0] == -evaluated.unablated.share("complied")[0] < 0


def test_likelihoods_are_those_of_a_plain_pass(model, tokenizer, ids, evaluated):
    texts = shipsfast.generate(
        model, ids[:1], groups=[[], HARMLESS], max_new_tokens=40, eos_token_id=tokenizer.eos_token_id, progress=False
    )  # fmt: skip
    with torch.inference_mode():
        for nll, (answer,) in zip(
            (evaluated.unablated.nll_nats[0, 0], evaluated.completions.nll_nats[1, 0]), texts, strict=True
        ):
            assert len(answer) == 40  # cut, so that no end is counted
            logits = model(torch.tensor([ids[0] + answer])).logits[0, len(ids[0]) - 1 : -1].double()
            expected = -logits.log_softmax(-1)[range(40), answer].mean().item()
            np.testing.assert_allclose(nll, expected, atol=1e-5)
