"""Scores at the tokens of a given answer: against plain passes over prompt and answer, one for each unit, and one for each token
too where heads are off at the end only (tests/support/reads_oracle.py)."""

import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast import Ablation
from shipsfast.ops.extension import extension_status
from tests.support.models import HEADS, LAYERS, build
from tests.support.numerics import assert_close_abs
from tests.support.read_cases import (
    ANSWERS,
    CASES,
    CUT,
    FUSED,
    MODELS,
    OTHERS,
    PROMPTS,
    TOLERANCE,
    expected,
    how,
    model_of,
)  # fmt: skip
from tests.support.reads_oracle import METRICS, Off, Reads, decode, with_answers
from tests.support.rounding import kl_bound
from tests.support.tokenizers import of_bytes

EXTENSION = extension_status()[0]
BACKENDS = ["torch", "reference", *["cpp"] * EXTENSION]
LENGTHS = [len(answer) for answer in ANSWERS]
both_ends = pytest.mark.parametrize("at", ["all", "end"])
needs_extension = pytest.mark.skipif(not EXTENSION, reason=f"needs the extension: {extension_status()[1]}")


def scan(name: str, ablation="zero", prompts=PROMPTS, answers=ANSWERS, **options):
    return shipsfast.scan(
        model_of(name), prompts, ablation=ablation, answers=answers, progress=False, **options
    )


def assert_equal_scores(got, reads: Reads, metric: str = "kl", what: str = "") -> None:
    """Every token's scores, and their mean."""
    wanted = reads.scores(metric)
    assert [len(each) for each in got.by_token] == [len(each) for each in wanted]
    for number, (mine, each) in enumerate(zip(got.by_token, wanted, strict=True)):
        assert_close_abs(mine, each, TOLERANCE, f"{what} {metric} of prompt {number}")
    assert_close_abs(got.scores, reads.means(metric), TOLERANCE, f"{what} {metric}, means")


@pytest.mark.parametrize(("kind", "eps"), CASES, ids=[kind for kind, _ in CASES])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_at_the_end_equals_plain_passes(name, kind, eps):
    got = scan(name, how(kind, eps))
    assert isinstance(got.by_token, list) and [len(each) for each in got.by_token] == LENGTHS
    assert_equal_scores(got, expected(name, kind, eps, answered=True))


@pytest.mark.parametrize("kind", ["undifferentiated", "head_mean_q", "mean", "resample"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_that_are_off_everywhere_equal_plain_passes(name, kind):
    assert_equal_scores(scan(name, how(kind, at="all")), expected(name, kind, at="all", answered=True))


def test_where_heads_are_off_matters_only_after_the_first_token():
    """An answer's first token is read where the prompt ends, whatever follows."""
    for at in ("all", "end"):
        answered = scan("llama-gqa", how("scale", 0.3, at)).by_token
        first = scan("llama-gqa", how("scale", 0.3, at), answers=None).kl
        assert_close_abs(np.stack([each[0] for each in answered]), first, TOLERANCE, at)
    end, every = (expected("llama-gqa", "scale", 0.3, at, answered=True).scores()[0] for at in ("end", "all"))
    assert abs(end[1:] - every[1:]).max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
@both_ends
def test_metrics(name, at):
    """All that there are, in one pass."""
    got = scan(name, how("scale", 0.3, at), metric=list(METRICS))
    reads = expected(name, "scale", 0.3, at, answered=True)
    for metric, each in zip(METRICS, [got, *got.also.values()], strict=True):
        assert_equal_scores(each, reads, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_alone_is_what_it_is_among_others(metric):
    reads = expected("llama-gqa", "scale", 0.3, "end", answered=True)
    got = scan("llama-gqa", how("scale", 0.3), metric=metric, **CUT)
    assert_equal_scores(got, reads, metric)
    assert got.signed == (metric not in ("kl", "js", "prob", "abs_log_prob_diff", "abs_prob_diff"))


def test_a_callable_sees_every_token_that_is_read():
    """They count as prompts: base logits are those at all of them, in order."""

    def own(base_logits, ablated_logits, index):
        assert len(base_logits) == sum(LENGTHS)
        return 100 * index + ablated_logits[:, 3] - base_logits[index, 3]

    got = scan("llama-gqa", how("zero"), metric=own, **CUT).by_token
    change = scan("llama-gqa", how("zero"), metric="logit_diff:3,7").by_token
    other = scan("llama-gqa", how("zero"), metric=lambda b, a, i: a[:, 7] - b[i, 7]).by_token
    starts = np.cumsum([0, *LENGTHS])
    for mine, a, b, start in zip(got, change, other, starts, strict=False):
        index = start + np.arange(len(mine))[:, None, None]
        assert_close_abs(mine, 100.0 * index + a + b, 1e-10)


@pytest.mark.parametrize("align", ["end", "template"])
@both_ends
def test_resample_has_the_same_answer_behind_the_other_prompt(align, at):
    for name in ("llama-gqa", "gpt2"):
        got = scan(name, how("resample", at=at, align=align))
        assert_equal_scores(got, expected(name, "resample", 1e-5, at, align, answered=True), what=name)


@pytest.mark.parametrize("kind", ["undifferentiated", "head_mean_k", "resample"])
@pytest.mark.parametrize("name", MODELS)
def test_at_the_end_it_is_what_a_decoder_with_a_cache_does(name, kind):
    """The head is off in the newest step only; the cache is the unablated model's."""
    model, reads = model_of(name), expected(name, kind, answered=True)
    got = scan(name, how(kind), heads=[(0, 1)])
    _, places = with_answers(PROMPTS, ANSWERS)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        values = reads.values[number] if reads.values else None
        base = decode(model, prompt, answer)
        off = []
        for step, at in enumerate(places[number]):  # values of a decoder's step are those of its token
            own = None if values is None else [x if len(x) == 1 else x[at : at + 1] for x in values]
            off.append(decode(model, prompt, answer, Off([(0, 1)], kind, values=own))[step])
        kl = METRICS["kl"](base, torch.stack(off), None)
        assert_close_abs(got.by_token[number][:, 0, 1], kl, TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@both_ends
def test_cut_into_chunks_blocks_and_groups(backend, at):
    for name, kind in [
        ("llama-gqa", "mean"),
        ("gemma2-softcap-window", "head_mean_k"),
        ("gpt_oss", "resample"),
    ]:
        got = scan(name, how(kind, at=at), backend=backend, layers="model", **CUT)
        assert got.record["attention_backend"] == backend
        assert_equal_scores(got, expected(name, kind, 1e-5, at, answered=True), what=name)


@needs_extension
@pytest.mark.parametrize("name", FUSED)
@both_ends
def test_layers_named(name, at):
    for kind in ("undifferentiated", "head_mean_q", "resample"):
        for options in (dict(layers="model"), dict(layers="fused") | CUT):
            got = scan(name, how(kind, at=at), **options)
            assert_equal_scores(got, expected(name, kind, 1e-5, at, answered=True), what=f"{kind} {options}")


@pytest.mark.parametrize("seed", range(4))
def test_prompts_and_answers_of_few_tokens(seed):
    """They begin and go on alike in every way: one ends where another's answer does, within it, or where it branches."""
    draw = random.Random(seed)
    some = lambda most: [draw.choice([3, 4]) for _ in range(draw.randint(1, most))]
    prompts = [some(6) for _ in range(5)]
    answers = [some(5) for _ in prompts]
    name = FUSED[seed % len(FUSED)]
    for at, options in (("all", CUT), ("end", {}), ("end", CUT)):
        got = scan(name, how("head_mean_q", at=at), prompts, answers, **options)
        reads = Reads(model_of(name), *with_answers(prompts, answers), "head_mean_q", at=at)
        assert_equal_scores(got, reads, what=f"{name} {at} {options}")


@both_ends
def test_whole_key_value_groups_and_some_heads(at):
    reads = expected("llama-gqa", "head_mean_v", 1e-5, at, unit="kv_group", answered=True)
    assert_equal_scores(scan("llama-gqa", how("head_mean_v", at=at), unit="kv_group"), reads)
    got = scan("llama-gqa", how("head_mean_v", at=at), heads=[(1, 2)])
    one = expected("llama-gqa", "head_mean_v", 1e-5, at, answered=True).scores()
    for mine, each in zip(got.by_token, one, strict=True):
        assert_close_abs(mine[:, 1, 2], each[:, 1, 2], TOLERANCE)
        assert np.isfinite(mine).sum() == len(mine)


def test_answers_of_one_length_are_one_array():
    answers = [[11, 12], [8, 40], [8, 40], [13, 14]]
    got = scan("llama-gqa", how("zero"), answers=answers)
    assert isinstance(got.by_token, np.ndarray) and got.by_token.shape == (4, 2, LAYERS, HEADS)
    assert np.array_equal(got.by_token[1], got.by_token[2])  # one prompt, one answer, twice
    assert np.array_equal(got.kl, got.by_token.mean(1))


@pytest.mark.parametrize("at", ["all", "end"])
def test_the_last_token_of_an_answer_only_counts_as_what_is_read(at):
    """Its own keys and values are of no use: a model with no room for it behind the others takes it."""
    answers = [[11, 12, 13, 14, token] for token in (15, 16)]
    kl, log_prob = [], []
    for answer in answers:
        got = scan("llama-gqa", how("zero", at=at), PROMPTS[:1], [answer], metric=["kl", "log_prob"])
        kl.append(got.kl)
        log_prob.append(got.also["log_prob"].by_token)
    assert np.array_equal(*kl)
    assert np.array_equal(log_prob[0][:, :-1], log_prob[1][:, :-1])
    assert abs(log_prob[0][:, -1] - log_prob[1][:, -1]).min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@both_ends
def test_narrower_dtypes(dtype, at):
    """Errors of a mean over an answer are no larger than those of a single score may be."""
    narrow, wide = build("llama-gqa", dtype), build("llama-gqa", dtype).double()
    ablation = Ablation("scale", 0.3, at=at)
    got = shipsfast.scan(narrow, PROMPTS, ablation=ablation, answers=ANSWERS, progress=False).kl
    wanted = Reads(wide, *with_answers(PROMPTS, ANSWERS), "scale", 0.3, at).means()
    whole = [ids + answer for ids, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert_close_abs(got, wanted, kl_bound(narrow, whole, wanted))


# --- text -------------------------------------------------------------------------------------------------------


def of_text(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("template", ["none", "chat", "Q: {prompt} A:"])
def test_texts_are_put_behind_the_prompt_without_special_tokens(template):
    tokenizer = of_bytes("<s> $A </s>")
    model, prompts, answers = of_text(tokenizer), ["mend the kettle", "hi"], [" Sure.", "No, thanks"]
    got = shipsfast.scan(
        model, prompts, tokenizer, template=template, answers=answers, at="end", progress=False
    )
    ids = shipsfast.prompts.tokens.tokenize(tokenizer, prompts, template)
    answer_ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    assert [len(each) for each in answer_ids] == [6, 10]
    wanted = shipsfast.scan(model, ids, answers=answer_ids, at="end", progress=False)
    for mine, each in zip(got.by_token, wanted.by_token, strict=True):
        assert np.array_equal(mine, each)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(metric="log_prob", answers=None), "log_prob.*answers"),
        (dict(metric=["kl", "abs_prob_diff"], answers=None), "abs_prob_diff.*answers"),
        (dict(answers=[[11], [], [12], [13]]), "answer.*1.*(empty|no token)"),
        (dict(answers=[[11], [1_000], [12], [13]]), "answer 1 .*vocabulary of"),
        (dict(answers=ANSWERS[:3]), "3 answers.*4 prompts|4 prompts.*3 answers"),
        (dict(answers=[]), "answers"),
        (dict(answers=[[11], [12], [13], [61]]), "vocabulary of 61"),
        (dict(answers=[[11], [12], [13], [-1]]), "vocabulary of 61"),
        (dict(answers=[[11], [12], [13], ["14"]]), "answer"),
        (dict(answers="text"), "answers"),
        (dict(answers=["a", "b", "c", "d"]), "tokenizer"),
        (dict(answers=[[11] * 60, *ANSWERS[1:]]), "context|64"),
    ],
)
def test_refused(options, words):
    with pytest.raises(shipsfast.InputError, match=words) as caught:
        scan("llama-gqa", **options)
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_refused():
    tokenizer = of_bytes()
    with pytest.raises(shipsfast.InputError, match="answer.*1"):
        shipsfast.scan(of_text(tokenizer), ["hi", "you"], tokenizer, answers=["Yes", ""], progress=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda **how: shipsfast.generate(*_speaking(), groups=[[(0, 1)]], **how),
        lambda **how: shipsfast.evaluate(*_speaking(), groups=[[(0, 1)]], judge="keywords", **how),
        lambda **how: shipsfast.scan_asr(*_speaking(), judge="keywords", **how),
        lambda **how: shipsfast.ablate(_speaking()[0], [(0, 1)], **how).__enter__(),
    ],
    ids=["generate", "evaluate", "scan_asr", "ablate"],
)
def test_an_ablation_at_the_end_is_for_scans_of_the_next_token(call):
    with pytest.raises(shipsfast.InputError, match="at the end only.*at='end'"):
        call(ablation=Ablation("zero", at="end"))


def _speaking():
    tokenizer = of_bytes()
    return of_text(tokenizer), ["mend the kettle"], tokenizer


def test_no_such_place():
    with pytest.raises(shipsfast.InputError, match="at 'start'.*all.*end|all, end"):
        Ablation("zero", at="start")


def test_the_sources_of_a_resample_are_matched_before_the_answers():
    """As long as the prompts, not as prompts and answers."""
    with pytest.raises(shipsfast.InputError, match="prompt 0 has 7 tokens.* 6"):
        scan("llama-gqa", Ablation("resample", prompts=OTHERS))
