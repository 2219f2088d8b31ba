"""Next tokens that a head raises and lowers, against one plain pass for each prompt and head inside `ablate`."""

import json

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Ablation
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.scans import top_tokens as module
from tests.support.metric_scans import PROMPTS
from tests.support.models import HEADS, LAYERS, VOCAB, build
from tests.support.numerics import assert_close_abs
from tests.support.overflowing import overflowing
from tests.support.tokenizers import like_sentencepiece, of_bytes

ASKED = [(0, 1), (1, 2), (2, 3)]
OTHERS = [[30, 31, 32, 4], [4, 4, 4], [44, 45], [50, 51, 52, 53]]
TOLERANCE = 1e-13  # of a probability


def how(kind, number=None) -> Ablation:
    """number: of the prompt that it is for, where it is for one."""
    sources = {"mean": OTHERS, "resample": OTHERS if number is None else [OTHERS[number]]}.get(kind)
    return Ablation(kind, 0.3 if kind == "scale" else 1e-5, sources)


def plain(model, head, kind="undifferentiated", unit="head", prompts=PROMPTS) -> np.ndarray:
    """Mean probabilities float64 [V] over prompts, one at a time; head: None for the model as it is."""
    out = []
    for number, ids in enumerate(prompts):
        heads = [] if head is None else [head]
        with shipsfast.ablate(model, heads, ablation=how(kind, number), unit=unit), torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        out.append(torch.softmax(logits.double(), -1).numpy())
    return np.mean(out, 0)


def decoded(model, head, kind="undifferentiated") -> np.ndarray:
    """The same with the head off in the newest step of a loop with a cache only."""
    out = []
    for ids in PROMPTS:
        with shipsfast.ablate(model, []), torch.no_grad():
            cache = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        with shipsfast.ablate(model, [] if head is None else [head], ablation=how(kind)), torch.no_grad():
            logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1]
        out.append(torch.softmax(logits.double(), -1).numpy())
    return np.mean(out, 0)


def found(model, head=ASKED, kind="undifferentiated", **more):
    return shipsfast.top_tokens(model, PROMPTS, None, head, ablation=how(kind), progress=False, **more)


def check(result, before, after, k=10):
    """before: probabilities [V]; after: of a head."""
    for head in result.heads:
        off = after(head)
        change = off - before
        assert result.moved[head] == pytest.approx(np.abs(change).sum() / 2, abs=VOCAB * TOLERANCE)
        for way, sign in ((result.raised, 1), (result.lowered, -1)):
            expected = [t for t in np.argsort(-sign * change)[:k] if sign * change[t] > 0]
            assert [each.token for each in way[head]] == expected
            for each in way[head]:
                got = np.array([each.before, each.after, each.difference])
                wanted = np.array([before[each.token], off[each.token], change[each.token]])
                assert_close_abs(got, wanted, TOLERANCE)


@pytest.mark.parametrize("kind", ["undifferentiated", "scale", "zero", "head_mean_v", "mean", "resample"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "gpt2"])
def test_every_ablation_equals_plain_passes(family, kind):
    model = build(family)
    result = found(model, kind=kind)
    assert result.heads == ASKED and result.prompts == len(PROMPTS)
    check(result, plain(model, None), lambda head: plain(model, head, kind))


CUTS = [
    {"prompts_per_group": 2, "rows_per_block": 2, "chunk_tokens": 8},
    {"prompts_per_group": 1, "rows_per_block": 1},
    {"layers": "model"},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_however_it_is_cut(cut):
    model = build()
    result = found(model, [(layer, None) for layer in range(LAYERS)], k=3, **cut)
    check(result, plain(model, None), lambda head: plain(model, head), k=3)


def test_groups_of_key_value_heads():
    model = build()
    result = found(model, [(0, 1), (2, 0)], unit="kv_group")
    assert result.unit == "kv_group"
    check(result, plain(model, None), lambda head: plain(model, head, unit="kv_group"))


@pytest.mark.parametrize("kind", ["undifferentiated", "zero", "mean"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_off_at_the_end_only(family, kind):
    model = build(family)
    result = found(model, kind=kind, at="end")
    assert "at the end only" in result.record["ablation"]
    check(result, decoded(model, None), lambda head: decoded(model, head, kind))


def test_behind_other_positions_of_the_prompts():
    model = build()
    result, first = found(model, at=1), [ids[:2] for ids in PROMPTS]
    check(result, plain(model, None, prompts=first), lambda head: plain(model, head, prompts=first))
    # Each prompt counts once, however many of its positions are looked at.
    result = found(model, at=[(0, 1, 2), 1, (0, 1), 3])
    parts = [
        [ids[: n + 1] for n in own] for ids, own in zip(PROMPTS, [(0, 1, 2), (1,), (0, 1), (3,)], strict=True)
    ]

    def mean(head):
        return np.mean([plain(model, head, prompts=own) for own in parts], 0)

    check(result, mean(None), mean)


def test_logits_are_float32_and_probabilities_float64():
    model = build(dtype=torch.float32)
    result = found(model, k=VOCAB)
    before = plain(model, None)
    for head in ASKED:
        tokens = [each.token for each in result.raised[head] + result.lowered[head]]
        assert sorted(tokens) == list(range(VOCAB))
        got = np.array([each.before for each in result.raised[head] + result.lowered[head]])
        assert got.sum() == pytest.approx(1, abs=1e-14)
        assert_close_abs(got, before[tokens], 1e-6)
    assert 0 < result.noise_floor < 1e-5


def test_one_head_and_several_are_given_alike():
    model = build()
    one = found(model, (1, 2))
    for same in (
        [1, 2],
        [(1, 2)],
        np.array([1, 2]),
        torch.tensor([1, 2]),
        shipsfast.HeadScore(1, 2, 0.5),
        [iter((1, 2))],
    ):
        assert found(model, same) == one
    assert found(model, (1, None)).heads == [(1, head) for head in range(HEADS)]
    assert shipsfast.top_tokens(model, PROMPTS, None, head=(1, 2), progress=False) == one


def test_a_head_that_moves_nothing():
    """Scaled by 1."""
    result = shipsfast.top_tokens(build(), PROMPTS, None, (1, 2), ablation="scale", scale=1.0, progress=False)
    assert result.moved[1, 2] < 1e-14
    assert all(x.difference > 0 for x in result.raised[1, 2]) and all(
        x.difference < 0 for x in result.lowered[1, 2]
    )


def test_out_of_memory_makes_smaller_blocks(monkeypatch):
    model, real, calls = build(), GrowingBatch.run, []
    whole = found(model)

    def run(self, mask, *args, **how):
        calls.append(len(mask))
        if len(mask) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, mask, *args, **how)

    monkeypatch.setattr(GrowingBatch, "run", run)
    result = found(model)
    assert max(calls) == 4 and calls[-1] == 2
    for head in ASKED:
        assert [x.token for x in result.raised[head]] == [x.token for x in whole.raised[head]]
        assert result.moved[head] == pytest.approx(whole.moved[head], abs=1e-12)


def test_an_overflow_is_named():
    model = overflowing()
    message = "the next token of prompt 0 with head 1-2 off has no probabilities, with zero: infinity first appears in layer 1"
    with pytest.raises(shipsfast.InputError, match=message):
        found(model, [(0, 0), (1, 2)], "zero")
    assert found(model, [(0, 0), (1, 1)], "zero").heads == [(0, 0), (1, 1)]
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(shipsfast.UnsupportedModelError, match="not finite without any head off"):
        found(model, (0, 0))


def test_a_pass_that_is_not_the_models_own_is_refused(monkeypatch):
    real = module.ablated_outputs
    monkeypatch.setattr(module, "ablated_outputs", lambda *args: {None: real(*args)[None] * 1.01})
    with pytest.raises(
        shipsfast.UnsupportedModelError, match="with head 1-2 off differs by .* cannot be scanned exactly"
    ):
        found(build())


@pytest.mark.parametrize(
    ("head", "how", "message"),
    [
        ((1, 9), {}, "head 1-9 does not exist"),
        ([], {}, "list of heads is empty"),
        ("1-2", {}, "is not a .layer, head. pair"),
        (3, {}, "heads must be a list"),
        ((1, 2), {"k": 0}, "k must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_refused(head, how, message):
    with pytest.raises(shipsfast.InputError, match=message):
        found(build(), head, **how)
    with pytest.raises(TypeError, match="missing a required argument: 'head'"):
        shipsfast.top_tokens(build(), PROMPTS, None)


def test_texts_of_tokens():
    # U+0120 is what byte-level tokenizers write for a space, U+2581 what SentencePiece does.
    for tokenizer, space in ((of_bytes(), "\u0120"), (like_sentencepiece(), "\u2581")):
        ids = tokenizer.convert_tokens_to_ids(["a", space, "</s>"])
        assert [module.token_text(tokenizer, token) for token in ids] == ["a", " ", "</s>"]
        assert module.token_text(tokenizer, len(tokenizer)) == "" == module.token_text(None, 5)
    assert module.token_text(of_bytes(), of_bytes()("\u00e9")["input_ids"][1]) == "\u00c3"  # half a letter
    assert (
        module.token_text(like_sentencepiece(), like_sentencepiece().convert_tokens_to_ids("<0xC3>"))
        == "<0xC3>"
    )


def test_what_it_shows(capsys):
    result = found(build(), ASKED[:2], k=3)
    frame = result.to_pandas()
    assert list(frame.columns) == [
        "layer",
        "head",
        "way",
        "rank",
        "token",
        "text",
        "before",
        "after",
        "difference",
    ]
    assert len(frame) == 12 and frame["rank"].tolist() == [1, 2, 3] * 4
    first = result.raised[0, 1][0]
    assert tuple(frame.loc[0, ["token", "before", "after", "difference"]]) == (
        first.token,
        first.before,
        first.after,
        first.difference,
    )
    assert repr(result).startswith("TopTokens(4 prompts)\n0-1: raised '' +0.") and "lowered '' -0." in repr(
        result
    )
    body = json.loads(json.dumps(result.to_json()))
    assert body["heads"][1]["head"] == 2 and body["heads"][0]["raised"][0]["token"] == first.token
    result.show()
    text = capsys.readouterr().out
    assert (
        "head 0-1 off" in text
        and f"{first.after:.4g}" in text
        and "mean probability of the next token over 4 prompts" in text
    )
