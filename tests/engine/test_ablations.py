"""Every kind of ablation against forward hooks on the model's own modules (tests/support/hooks.py), in float64."""

import functools

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Ablation
from shipsfast.engine.ablation import KINDS
from shipsfast.ops.extension import extension_status
from shipsfast.ops.masks import LayerMask
from tests.support import hooks
from tests.support.model_state import assert_same, state
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs

TOLERANCE_NATS = 1e-12
LOGIT_TOLERANCE = 1e-11  # logits of these models go up to about 30

FAMILIES = ["llama-mha", "llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "gpt2"]
LLAMAS = ["llama-mha", "llama-gqa"]
CASES = [(kind, 0.3 if kind == "scale" else 1e-5) for kind in KINDS] + [("undifferentiated", 0.3)]

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [7, 8, 40], SHARED + [7], SHARED + [7]]
# The last two prompts are the same, and the beginning of the first. Their sources are not: of the first two, the
# fifth tokens differ, and of the last two, the first.
SOURCES = [[30, 31, 32, 4, 11, 40, 8], [30, 31, 32, 4, 4], [1, 31, 32, 4, 4]]
OTHER_SET = [[44, 45, 46, 47, 48, 49], [44, 45], [44, 45], [50]]
CUT = dict(chunk_tokens=20, rows_per_block=5, prompts_per_group=2)

needs_extension = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)
model_of = functools.cache(build)
by_case = pytest.mark.parametrize(("kind", "eps"), CASES, ids=[f"{kind}-{eps:g}" for kind, eps in CASES])


def how(kind: str, eps: float = 1e-5, sources=None) -> Ablation:
    return Ablation(kind, eps, SOURCES if kind == "resample" and sources is None else sources)


@functools.cache
def oracle(family: str, kind: str, eps: float = 1e-5) -> hooks.Oracle:
    return hooks.Oracle(model_of(family), PROMPTS, kind, eps, SOURCES if kind == "resample" else None)


@functools.cache
def expected(family: str, kind: str, eps: float = 1e-5, unit: str = "head") -> np.ndarray:
    scores = oracle(family, kind, eps).ships(unit)
    assert (scores.max((0, 2)) > 1e-5).all(), "the ablations of this model do not show in every layer"
    return scores


def scan(family: str, ablation, prompts=PROMPTS, **options):
    return shipsfast.scan(model_of(family), prompts, ablation=ablation, progress=False, **options)


@by_case
@pytest.mark.parametrize("family", FAMILIES)
def test_scan_equals_hooks(family, kind, eps):
    got = scan(family, how(kind, eps), layers="model", backend="torch")
    assert got.record["layers"] == "model" and got.record["attention_backend"] == "torch"
    assert_close_abs(got.kl, expected(family, kind, eps), TOLERANCE_NATS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "gpt2"])
def test_cut_into_chunks_blocks_and_groups(family, kind):
    got = scan(family, how(kind), layers="model", **CUT)
    assert_close_abs(got.kl, expected(family, kind), TOLERANCE_NATS)


@needs_extension
@by_case
@pytest.mark.parametrize("family", LLAMAS)
def test_fused_layers_equal_hooks(family, kind, eps):
    for options in (CUT,) if family == "llama-mha" else ({}, CUT):
        got = scan(family, how(kind, eps), layers="fused", **options)
        assert got.record["layers"] == "fused"
        assert_close_abs(got.kl, expected(family, kind, eps), TOLERANCE_NATS, str(options))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_backend_equals_hooks(kind):
    got = scan("llama-gqa", how(kind), layers="model", backend="reference", rows_per_block=5)
    assert got.record["attention_backend"] == "reference"
    assert_close_abs(got.kl, expected("llama-gqa", kind), TOLERANCE_NATS)


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
def test_whole_key_value_groups(kind):
    """All query heads that share a key/value head are off together."""
    scores = expected("llama-gqa", kind, unit="kv_group")
    assert scores.shape == (len(PROMPTS), LAYERS, 2)
    for options in (dict(layers="model") | CUT, dict(layers="fused")):
        got = scan("llama-gqa", how(kind), unit="kv_group", **options)
        assert got.unit == "kv_group"
        assert_close_abs(got.kl, scores, TOLERANCE_NATS, str(options))


@pytest.mark.parametrize("family", ["gemma2-softcap-window", "gpt2"])
def test_key_value_groups_of_other_families(family):
    """GPT-2 has a key/value head for every query head: its groups are its heads."""
    for kind in ("undifferentiated", "head_mean_k", "head_mean_v"):
        got = scan(family, how(kind), unit="kv_group", layers="model")
        assert got.kl.shape[2] == (4 if family == "gpt2" else 2)
        assert_close_abs(got.kl, expected(family, kind, unit="kv_group"), TOLERANCE_NATS, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_some_heads_only(kind):
    chosen = [(2, 0), (0, 3), (1, None)]
    got = scan("llama-gqa", how(kind), heads=chosen).kl
    scanned = np.zeros((LAYERS, HEADS), bool)
    scanned[2, 0] = scanned[0, 3] = scanned[1] = True
    assert np.array_equal(~np.isnan(got), np.broadcast_to(scanned, got.shape))
    assert_close_abs(got[:, scanned], expected("llama-gqa", kind)[:, scanned], TOLERANCE_NATS)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_resample_from_one_prompt_for_all(family):
    prompts = [SHARED + [3], SHARED + [7], [50, 9, 17, 23, 3], SHARED + [3]]
    source = [[30, 31, 32, 4, 4]]
    scores = hooks.Oracle(model_of(family), prompts, "resample", sources=source).ships()
    for options in ({}, dict(layers="model") | CUT):
        got = scan(family, how("resample", sources=source), prompts, **options)
        assert_close_abs(got.kl, scores, TOLERANCE_NATS, str(options))


def test_resample_from_the_prompt_itself_changes_nothing():
    got = scan("llama-gqa", how("resample", sources=PROMPTS))
    assert_close_abs(got.kl, np.zeros_like(got.kl), TOLERANCE_NATS)


def test_sources_of_equal_prompts_are_kept_apart():
    got = scan("llama-gqa", how("resample")).kl
    assert (abs(got[1] - got[2]) > 1e-6).any()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_mean_over_another_set(family, monkeypatch):
    """The set has a duplicate and shared tokens: every prompt's tokens count, once for each prompt."""
    scores = hooks.Oracle(model_of(family), PROMPTS, "mean", sources=OTHER_SET).ships()
    assert abs(scores - expected(family, "mean")).max() > 1e-3
    for tokens in (8192, 3):
        monkeypatch.setattr("shipsfast.engine.replacement_values.MEAN_TOKENS", tokens)
        for options in ({}, dict(layers="model") | CUT):
            got = scan(family, how("mean", sources=OTHER_SET), **options)
            assert_close_abs(got.kl, scores, TOLERANCE_NATS, str(options))


def test_mean_does_not_depend_on_which_heads_are_scanned():
    got = scan("llama-gqa", how("mean"), heads=[(2, 1)], prompts_per_group=1).kl[:, 2, 1]
    assert_close_abs(got, expected("llama-gqa", "mean")[:, 2, 1], TOLERANCE_NATS)


# --- ablate -----------------------------------------------------------------------------------------------------

HEADS_OFF = [(0, 1), (0, 2), (1, 3), (2, 0)]  # two in one layer: under GQA of two key/value heads


def off(family: str, kind: str, heads, eps: float = 1e-5) -> hooks.Off:
    """As `inside(kind)` in `ablate`: `mean` over OTHER_SET, `resample` from the first of SOURCES."""
    model, values = model_of(family), None
    if kind == "mean":
        values = hooks.mean_values(model, OTHER_SET)
    elif kind == "resample":
        values = hooks.resample_values(model, SOURCES[0])
    return hooks.Off(tuple(heads), kind, eps, values)


def inside(kind: str, eps: float = 1e-5) -> Ablation:
    return Ablation(kind, eps, {"mean": OTHER_SET, "resample": SOURCES[:1]}.get(kind))


@by_case
@pytest.mark.parametrize("family", FAMILIES)
def test_ablate_equals_hooks(family, kind, eps):
    """Logits of every position, in a batch of two rows; and the model afterwards is as before."""
    model, rows = model_of(family), [PROMPTS[0], [2, 2, 40, 41, 7, 7, 9]]
    before = state(model)
    with torch.no_grad(), shipsfast.ablate(model, HEADS_OFF, ablation=inside(kind, eps)):
        got = model(torch.tensor(rows), use_cache=False).logits
    assert_same(before, state(model))
    for row, ids in zip(got, rows, strict=True):
        logits = hooks.forward(model, ids, off(family, kind, HEADS_OFF, eps)).logits
        assert abs(logits - hooks.forward(model, ids).logits).max() > 1e-3
        assert_close_abs(row, logits, LOGIT_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_ablate_a_key_value_group(kind):
    model, ids = model_of("llama-gqa"), PROMPTS[0]
    with torch.no_grad(), shipsfast.ablate(model, [(1, 1), (2, 0)], ablation=inside(kind), unit="kv_group"):
        got = model(torch.tensor([ids])).logits[0]
    heads = [(1, 2), (1, 3), (2, 0), (2, 1)]
    assert_close_abs(got, hooks.forward(model, ids, off("llama-gqa", kind, heads)).logits, LOGIT_TOLERANCE)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "resample"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "gpt2"])
def test_ablate_with_a_cache(family, kind):
    """Prefill of four tokens and three decode steps, beyond the sliding window of Gemma 2."""
    model, ids = model_of(family), PROMPTS[0]
    how_off = off(family, kind, HEADS_OFF)
    with torch.no_grad(), shipsfast.ablate(model, HEADS_OFF, ablation=inside(kind)):
        out = model(torch.tensor([ids[:4]]), use_cache=True)
        for length in range(4, len(ids) + 1):
            logits = hooks.forward(model, ids[:length], how_off).logits  # its attention is its own, here too
            assert_close_abs(out.logits[0, -1], logits[-1], LOGIT_TOLERANCE, f"{length} tokens")
            if length < len(ids):
                out = model(
                    torch.tensor([[ids[length]]]), past_key_values=out.past_key_values, use_cache=True
                )


# Pairs of (outer, inner) kinds. `mean` and `resample` must be the outermost.
NESTED = [
    ("undifferentiated", "zero"), ("zero", "undifferentiated"), ("head_mean_q", "scale"),
    ("head_mean_k", "head_mean_q"), ("uniform", "head_mean_k"), ("mean", "head_mean_k"), ("mean", "zero"),
    ("resample", "undifferentiated"), ("resample", "scale"), ("undifferentiated", "head_mean_q"),
]  # fmt: skip


@pytest.mark.parametrize(("outer", "inner"), NESTED, ids=["-in-".join(pair[::-1]) for pair in NESTED])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window"])
def test_nested_ablations_equal_hooks(family, outer, inner):
    """Two kinds at once, in layers of their own and in layer 1 together."""
    first, second = [(0, 1), (1, 0)], [(1, 3), (2, 2)]
    _nested_equals_hooks(family, outer, inner, first, second)


@pytest.mark.parametrize("other", [k for k in KINDS if k != "head_mean_v"])
def test_head_mean_v_nested_in_another_layer(other):
    _nested_equals_hooks("llama-gqa", other, "head_mean_v", [(0, 1), (2, 1)], [(1, 3)])


@pytest.mark.parametrize("other", ["zero", "scale", "mean", "resample"])
def test_head_mean_v_is_over_what_the_heads_give_themselves(other):
    """Not over what stands in for the output of another head that is off."""
    _nested_equals_hooks("llama-gqa", other, "head_mean_v", [(1, 0)], [(1, 3)])


def _nested_equals_hooks(family, outer, inner, first, second) -> None:
    model, ids = model_of(family), PROMPTS[0]
    tokens = torch.tensor([ids])
    before = state(model)
    with torch.no_grad(), shipsfast.ablate(model, first, ablation=inside(outer, 0.3)):
        alone = model(tokens).logits[0]
        with shipsfast.ablate(model, second, ablation=inside(inner, 0.3)):
            both = model(tokens).logits[0]
        assert torch.equal(model(tokens).logits[0], alone)
    assert_same(before, state(model))
    a, b = off(family, outer, first, 0.3), off(family, inner, second, 0.3)
    assert_close_abs(alone, hooks.forward(model, ids, a).logits, LOGIT_TOLERANCE, "the outer alone")
    assert_close_abs(both, hooks.forward(model, ids, a, b).logits, LOGIT_TOLERANCE, "both")


# --- bad input --------------------------------------------------------------------------------------------------


def refused(words: str):
    return pytest.raises(shipsfast.InputError, match=words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ablation("resample"), "resample needs prompts"),
        (lambda: Ablation("resample", prompts=[]), "at least one prompt"),
        (lambda: Ablation("mean", prompts=[]), "at least one prompt"),
        (lambda: Ablation("mean", prompts="a prompt"), "must be a list"),
        (lambda: Ablation("zero", prompts=[[5, 6]]), "zero takes no prompts"),
        (lambda: Ablation("head_mean_v", prompts=[[5, 6]]), "head_mean_v takes no prompts"),
        (lambda: Ablation("knockout"), "unknown ablation 'knockout'.*undifferentiated"),
        (lambda: Ablation(scale=float("nan")), "finite"),
        (lambda: Ablation(scale=float("inf")), "finite"),
        (lambda: Ablation(scale="small"), "must be a number"),
        (lambda: Ablation(scale=True), "must be a number"),
    ],
)
def test_no_such_ablation(make, words):
    with refused(words):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(ablation="knockout"), "unknown ablation 'knockout'"),
        (dict(ablation="resample"), "resample needs prompts"),
        (dict(ablation=Ablation("resample", prompts=[[5, 6, 7, 8]])), "prompt 0 has 7 tokens.* has 4"),
        (dict(ablation=Ablation("resample", prompts=[*SOURCES[:2], [1, 2]])), "prompt 2 has 5 tokens.* has 2"),
        (dict(ablation=Ablation("resample", prompts=SOURCES[:2])), "has 2 prompts to take outputs from, and 3 prompts to scan"),
        (dict(ablation=Ablation("resample", prompts=[*SOURCES[:2], []])), "ablation resample.*prompt 2"),
        (dict(ablation=Ablation("mean", prompts=[[5], []])), "ablation mean.*prompt 1"),
        (dict(ablation=Ablation("mean", prompts=["text"])), "tokenizer"),
        (dict(ablation=Ablation("mean", prompts=[[5], [99]])), "vocabulary"),
        (dict(ablation="zero", unit="layer"), "unknown unit 'layer'.*head, kv_group"),
        (dict(ablation="zero", unit="kv_group", heads=[(0, 2)]), "kv_group 0-2 does not exist"),
    ],
)  # fmt: skip
def test_scan_refuses(options, words):
    with refused(words):
        scan("llama-gqa", **options)


@pytest.mark.parametrize(
    ("ablation", "options", "words"),
    [
        ("mean", {}, "mean needs prompts"),
        ("resample", {}, "resample needs prompts"),
        (Ablation("resample", prompts=SOURCES[:2]), {}, "from one prompt, and 2 were given"),
        (Ablation("mean", prompts=["text"]), {}, "tokenizer"),
        (Ablation("mean", prompts=[[5], [99]]), {}, "vocabulary"),
        (Ablation("resample", prompts=[[5] * 65]), {}, "65 tokens.*context is 64"),
        ("knockout", {}, "unknown ablation"),
        ("zero", dict(unit="layer"), "unknown unit"),
        ("zero", dict(unit="kv_group"), "kv_group 1-3 does not exist"),
    ],
)
def test_ablate_refuses(ablation, options, words):
    model = build("llama-gqa")
    before = state(model)
    with refused(words), shipsfast.ablate(model, [(1, 3)], ablation=ablation, **options):
        pytest.fail("it was let in")
    assert_same(before, state(model))


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_outputs_of_an_ablated_model_are_refused(kind):
    model = build("llama-gqa")
    with (
        shipsfast.ablate(model, [(0, 1)]),
        refused("outermost"),
        shipsfast.ablate(model, [(1, 3)], ablation=inside(kind)),
    ):
        pytest.fail("it was let in")


@pytest.mark.parametrize("source", [[5, 6, 7, 8, 9], [5]], ids=["five-tokens", "one-token"])
def test_resample_of_another_length_is_refused(source):
    """A source of one token too: it stands for position 0, not for every position."""
    model = build("llama-gqa")
    before = state(model)
    wrong = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), shipsfast.ablate(model, [(1, 3)], ablation=Ablation("resample", prompts=[source])):
        with refused(f"{len(source)} tokens?.*4 tokens"):
            model(wrong)
        model(torch.tensor([source]))
    assert_same(before, state(model))


@pytest.mark.parametrize("source", [[5, 6, 7, 8, 9], [5]], ids=["five-tokens", "one-token"])
def test_resample_in_a_decode_step_is_refused(source):
    model = build("llama-gqa")
    with torch.no_grad(), shipsfast.ablate(model, [(1, 3)], ablation=Ablation("resample", prompts=[source])):
        out = model(torch.tensor([source]), use_cache=True)
        with refused("without a cache"):
            model(torch.tensor([[3]]), past_key_values=out.past_key_values, use_cache=True)


def test_the_two_scales_of_a_mask_are_two_tensors():
    mask = LayerMask.untouched(2, 3, torch.float32, "cpu")
    mask.logit_scale[0, 0] = 0.5
    assert torch.equal(mask.output_scale, torch.ones(2, 3))
