"""The published code's own numbers: the same heads in the same order, and the same scores as far as float32 goes.

tests/data/published_reference.json was recorded by running that code (its `origin` says how), which computes in
float32 and takes the arccosine of a float32 cosine. shipsfast runs here in float64 as well as in float32.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shipsfast
from shipsfast import Ablation
from shipsfast.demo.run import MODEL
from tests.support.places import DATA

RECORDED = json.loads((DATA / "published_reference.json").read_text("utf-8"))
KINDS = {"q": "undifferentiated", "k": "undifferentiated", "v": "scale"}  # of scale_mask
FLOAT32 = 2.0**-24  # half a unit in the last place of a number in [1, 2)


def ablation(run) -> Ablation:
    if run["mask_type"] == "scale_mask":
        return Ablation(KINDS[run["mask_qkv"]], scale=run["scale_factor"])
    return Ablation(f"head_mean_{run['mask_qkv']}")


def name(run) -> str:
    return f"{run['mask_type']}-{run['mask_qkv']}"


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("run", RECORDED["sahara"], ids=name)
def test_sahara_finds_the_same_heads_in_the_same_order(model, tokenizer, run):
    got = shipsfast.sahara(
        model,
        RECORDED["prompts"],
        tokenizer,
        template=RECORDED["sahara_template"],
        ablation=ablation(run),
        group_size=3,
        rank=1,
        progress=False,
    )
    assert [list(head) for head in got.heads] == run["chosen"]
    want = np.array(run["angle_deg"], dtype=np.float64)  # null, for heads already chosen, becomes NaN
    assert (np.isnan(got.angle_deg) == np.isnan(want)).all()
    # its cosine is a sum of eight products of vectors that carry a float32 model's rounding
    error = np.abs(np.cos(np.deg2rad(got.angle_deg)) - np.cos(np.deg2rad(want)))
    if run["mask_type"] == "mean_mask":
        # Two heads of one layer: it takes the second head's mean with the first one already replaced, so its score
        # depends on the order of the group; shipsfast takes both means before replacing either.
        for step in (1, 2):
            error[step, sorted({layer for layer, _ in run["chosen"][:step]})] = np.nan
    assert np.nanmax(error) <= 10 * FLOAT32
    assert np.nanmax(want) > 0.7 and (error < 1).sum() > 30, "nothing to compare"


@pytest.mark.parametrize("run", RECORDED["ships"], ids=name)
def test_ships_of_single_prompts(model, tokenizer, run):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in run["texts"]]
    got = shipsfast.scan(model, ids, ablation=ablation(run), progress=False).kl
    want = np.array(run["kl_nats"])
    # it adds 1e-12 to 768 float32 probabilities, so scores of 1e-6 nats and less are noise
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=2e-6)
    assert want.max() > 0.1, "nothing to compare"
    for mine, theirs in zip(got, want, strict=True):
        clear = int((theirs > 1e-3).sum())
        assert (np.argsort(-mine, axis=None)[:clear] == np.argsort(-theirs, axis=None)[:clear]).all()
