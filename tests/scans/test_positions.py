"""Scores before the last token of a prompt: by index, from the end, and at a text that is found in it."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast import Ablation
from tests.support.numerics import assert_close_abs
from tests.support.read_cases import CUT, MODELS, PROMPTS, SOURCES, TOLERANCE, how, model_of
from tests.support.reads_oracle import Reads, mean_values, resample_values
from tests.support.tokenizers import of_bytes, of_words

LONG = PROMPTS[:3]  # of five tokens and more
KINDS = ["undifferentiated", "head_mean_k", "mean", "resample", "zero"]


def scan(name, at, prompts=LONG, ablation="zero", **options):
    return shipsfast.scan(model_of(name), prompts, at=at, ablation=ablation, progress=False, **options)


def oracle(name, reads, kind="zero", at="all", prompts=LONG) -> Reads:
    model, values = model_of(name), None
    if kind == "mean":
        values = [mean_values(model, prompts)] * len(prompts)  # of whole prompts, also behind what is read
    elif kind == "resample":
        values = [resample_values(model, *pair) for pair in zip(prompts, SOURCES, strict=False)]
    return Reads(model, prompts, reads, kind, at=at, values=values)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama-gqa", kind) for kind in KINDS), *((name, "head_mean_k") for name in MODELS[1:])],
)
@pytest.mark.parametrize("where", ["all", "end"])
def test_one_place_for_all_prompts(name, kind, where):
    ablation = Ablation(kind, prompts=SOURCES[:3] if kind == "resample" else None, at=where)
    for at, reads in [(2, [[2]] * 3), (-3, [[4], [2], [2]]), (0, [[0]] * 3)]:
        got = scan(name, at, ablation=ablation)
        assert_close_abs(got.kl, oracle(name, reads, kind, where).means(), TOLERANCE, str(at))


@pytest.mark.parametrize("where", ["all", "end"])
def test_a_place_for_each_prompt(where):
    at, reads = [1, -2, 4], [[1], [3], [4]]
    wanted = oracle("llama-gqa", reads, at=where)
    for options in (
        {},
        CUT,
        dict(layers="model", backend="torch") | CUT,
        dict(layers="model", backend="reference"),
    ):
        got = scan("llama-gqa", at, ablation=how("zero", at=where), **options)
        assert_close_abs(got.kl, wanted.means(), TOLERANCE, str(options))


@pytest.mark.parametrize("where", ["all", "end"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcap-window", "gpt_oss", "lfm2"])
def test_several_places_of_a_prompt(name, where):
    """Scores of each, in the order in which they were asked for, and their mean."""
    at, reads = [(1, -1, 2), (-5,), (0, 4)], [[1, 6, 2], [0], [0, 4]]
    wanted = oracle(name, reads, at=where)
    one_by_one = CUT | dict(prompts_per_group=1)  # a model with convolutions takes no other packs
    for options in ({}, one_by_one if name == "lfm2" else CUT):
        got = scan(name, at, ablation=how("zero", at=where), **options)
        for mine, each in zip(got.by_token, wanted.scores(), strict=True):
            assert_close_abs(mine, each, TOLERANCE, str(options))
        assert_close_abs(got.kl, wanted.means(), TOLERANCE, str(options))


def test_the_last_place_is_what_is_read_by_default():
    assert np.array_equal(scan("llama-gqa", -1).kl, scan("llama-gqa", "all").kl)


# --- texts ------------------------------------------------------------------------------------------------------


def with_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).double().eval(), tokenizer


TEXTS = ["mend the kettle", "the kettle sings, ok"]


@pytest.mark.parametrize("template", ["none", "chat", "Q: {prompt} A:"])
def test_a_text_is_read_at_its_last_token(template):
    """Bytes are tokens here, after a token that the tokenizer puts before."""
    model, tokenizer = with_model(of_bytes())
    ids = shipsfast.prompts.tokens.tokenize(tokenizer, TEXTS, template)
    places = []
    for each in ids:
        text = tokenizer.convert_ids_to_tokens(each)
        found = [i for i in range(len(text)) if text[i : i + 6] == list("kettle")]
        assert len(found) == 1
        places.append(found[0] + 5)
    got = shipsfast.scan(model, TEXTS, tokenizer, template=template, at="kettle", progress=False)
    wanted = shipsfast.scan(model, ids, at=places, progress=False)
    assert np.array_equal(got.kl, wanted.kl)


def test_a_text_for_each_prompt_and_among_numbers():
    model, tokenizer = with_model(of_words("mend", "the", "kettle", "now", "or", "never"))
    prompts = ["mend the kettle now or never", "mend the kettle or never"]
    got = shipsfast.scan(
        model, prompts, tokenizer, at=["the kettle", ("now", -1)][:1] + [("or", -1)], progress=False
    )
    ids = shipsfast.prompts.tokens.tokenize(tokenizer, prompts, "none")
    wanted = shipsfast.scan(model, ids, at=[2, (3, 4)], progress=False)
    assert np.array_equal(got.kl, wanted.kl)
    part = shipsfast.scan(model, prompts, tokenizer, at="kett", progress=False)  # a part of a token
    assert np.array_equal(part.kl, shipsfast.scan(model, ids, at=2, progress=False).kl)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("teapot", "teapot.*prompt 0"),
        ("mend", "mend.*prompt 1"),
        ("e", "prompt 0.*(times|twice|more than once|once)"),
        (["kettle"], "1.*2 prompts|2 prompts.*1"),
        (99, "99.*prompt 0.*token"),
        (-99, "-99.*prompt 0.*token"),
        ([0, (3, 99)], "99.*prompt 1"),
        ([0, ()], "prompt 1"),
        ([0, (3, 4, -len("the kettle sings, ok") + 2)], "prompt 1.*3 and -18 are one position"),
        ([0, ("kettle", 10)], "prompt 1.*'kettle' and 10 are one position, 10"),
        (1.5, "1.5"),
        (True, "True"),
        ("", "at"),
    ],
)
def test_refused(at, words):
    model, tokenizer = with_model(of_bytes())
    with pytest.raises(shipsfast.InputError, match=words) as caught:
        shipsfast.scan(model, TEXTS, tokenizer, at=at, progress=False)
    assert "\n" not in str(caught.value)


def test_token_ids_have_no_text_to_be_found():
    with pytest.raises(shipsfast.InputError, match="kettle"):
        scan("llama-gqa", "kettle")


def test_a_place_and_answers():
    """An answer's tokens are the places."""
    with pytest.raises(shipsfast.InputError, match="answers"):
        scan("llama-gqa", 2, answers=[[5], [6], [7]])
