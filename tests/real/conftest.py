"""SmolLM2-135M-Instruct, a real chat model: fetched once, or every test here is skipped and says why."""

import copy
import os

import pytest

from tools.real.fetch import NotToBeHad, smollm2

# Mild, made up, of several lengths.
PROMPTS = (
    "How do I bake bread at home?",
    "Tell me a secret about the sea.",
    "Write a short poem about rain on a tin roof.",
    "My neighbour plays the trumpet at night. How do I ask him kindly to stop?",
)


@pytest.fixture(scope="session")
def gguf():
    """The path of the model's file. With SHIPSFAST_REAL=1 (make real) it must be there."""
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    try:
        return smollm2()
    except NotToBeHad as why:
        if os.environ.get("SHIPSFAST_REAL") == "1":
            raise
        pytest.skip(f"no real model: {why}")


@pytest.fixture(scope="session")
def tokenizer(gguf):
    from shipsfast.models.loading import load_tokenizer

    return load_tokenizer(str(gguf))


@pytest.fixture(scope="session")
def model(gguf):
    from shipsfast.models.loading import load_model

    return load_model(str(gguf), dtype="float32")


@pytest.fixture(scope="session")
def wide(model):
    """The same weights in float64, whose plain passes are the truth."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def ids(gguf):
    """The prompts in the model's chat template, as transformers itself makes tokens of them."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return [
        plain.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="session")
def scanned(model, tokenizer):
    """Every head on all prompts, in float32."""
    import shipsfast

    return shipsfast.scan(model, list(PROMPTS), tokenizer, template="chat", progress=False)
