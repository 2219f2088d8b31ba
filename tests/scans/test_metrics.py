"""Metrics: names, tokens, callables, what they refuse, and the scores of logit_diff and refusal_logit."""

import functools
import json
import math

import numpy as np
import pytest
import torch

from shipsfast.errors import InputError
from shipsfast.ops import divergences
from shipsfast.ops.divergences import DIVERGENCES, divergence_rows, kl_rows
from shipsfast.scans.metrics import Metric, as_metric, logit_diff, parse_metric, refusal_logit
from tests.support.divergence_cases import INF, NAN, N, draw, each_dtype, on_gpu
from tests.support.numerics import assert_close_abs

WORDS = ["Sorry", "I", " I", "Sure", "12", "a,b", "can", "'t"]


class Tokenizer:
    """The words are tokens; other text is taken apart from the left. Adds a special token unless told not to."""

    def __call__(self, text, add_special_tokens=True):
        ids = [99] if add_special_tokens else []
        while text:
            word = max((word for word in WORDS if text.startswith(word)), key=len)
            ids.append(WORDS.index(word))
            text = text[len(word) :]
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


def test_the_divergences_by_name():
    base, ablated, row_map = draw(65)
    for name in DIVERGENCES:
        metric = as_metric(name)
        assert metric == as_metric(name.replace("_", "-")) == as_metric(metric)
        assert metric.name == name and metric.describe() == {"name": name}
        assert not metric.signed and not metric.sees_all_prompts
        assert metric.unit == ("" if name == "total_variation" else "nats")
        expected = divergence_rows(base, ablated, row_map, names=[name])[0]
        assert torch.equal(metric.rows(base, ablated, row_map), expected)
    assert as_metric("kl").label == "KL(base || ablated)"
    assert as_metric("reverse-kl").label == "KL(ablated || base)"
    assert torch.equal(as_metric("kl").rows(base, ablated, row_map), kl_rows(base, ablated, row_map))


@each_dtype
def test_logit_diff(dtype):
    base, ablated, row_map = draw(65, dtype)
    metric = as_metric(logit_diff(12, 7), vocab_size=65)
    assert metric.name == "logit_diff(12, 7)" and metric.unit == "logits" and metric.signed
    assert metric.describe() == {"name": "logit_diff", "tokens": [12, 7]}
    b, a = base.double()[row_map], ablated.double()
    result = metric.rows(base, ablated, row_map)
    assert result.dtype == torch.float64
    assert torch.equal(result, (a[:, 12] - a[:, 7]) - (b[:, 12] - b[:, 7]))
    assert torch.equal(as_metric(logit_diff(7, 12)).rows(base, ablated, row_map), -result)
    assert torch.equal(metric.rows(base, base[row_map], row_map), torch.zeros(N, dtype=torch.float64))
    ablated[2, 12] = -INF
    assert metric.rows(base, ablated, row_map)[2] == -INF
    ablated[2, 7] = -INF
    assert metric.rows(base, ablated, row_map).isnan().tolist() == [i == 2 for i in range(N)]


@each_dtype
@pytest.mark.parametrize("tokens", [[3], [0, 64, 12], list(range(64))], ids=["one", "three", "all-but-one"])
def test_refusal_logit(tokens, dtype):
    base, ablated, row_map = draw(65, dtype)
    metric = as_metric(refusal_logit(tokens), vocab_size=65)
    assert metric.unit == "logits" and metric.signed
    result = metric.rows(base, ablated, row_map)
    assert result.dtype == torch.float64

    def log_odds(row):
        weights = [math.exp(x) for x in row.double().tolist()]
        inside = math.fsum(weights[token] for token in tokens)
        return math.log(inside) - math.log(math.fsum(w for i, w in enumerate(weights) if i not in tokens))

    expected = [log_odds(a) - log_odds(base[p]) for a, p in zip(ablated, row_map.tolist(), strict=True)]
    assert_close_abs(result, torch.tensor(expected, dtype=torch.float64), 1e-13)
    assert torch.equal(metric.rows(base, base[row_map], row_map), torch.zeros(N, dtype=torch.float64))


def test_refusal_logit_far_from_even_odds():
    """1 - p would round to 0 or 1 here."""
    base = torch.tensor([[800.0, 0.0, 0.0], [-800.0, 0.0, 0.0]], dtype=torch.float64)
    ablated = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -INF]], dtype=torch.float64)
    metric = as_metric(refusal_logit([0]))
    result = metric.rows(base, ablated, torch.tensor([0, 1]))
    assert_close_abs(result, torch.tensor([-800.0, 800.0 + math.log(2.0)], dtype=torch.float64), 1e-12)


def test_refusal_logit_of_infinities_and_nan():
    base = torch.tensor([[0.0, 0.0, 0.0]])
    rows = torch.tensor([[-INF, 0, 0], [0, -INF, -INF], [NAN, 0, 0], [0, 0, INF], [INF, 0, 0], [-INF] * 3])
    result = as_metric(refusal_logit([0])).rows(base, rows, torch.zeros(6).long())
    assert result[:2].tolist() == [-INF, INF] and result[2:].isnan().all()


def test_refusal_logit_in_chunks(monkeypatch):
    base, ablated, row_map = draw(65)
    metric = as_metric(refusal_logit([3, 4]))
    together = metric.rows(base, ablated, row_map)
    monkeypatch.setattr(divergences, "SCRATCH_BYTES", 1)
    assert torch.equal(metric.rows(base, ablated, row_map), together)
    assert metric.rows(base, ablated[:0], row_map[:0]).shape == (0,)


def test_tokens_as_text():
    tokenizer = Tokenizer()
    metric = as_metric(logit_diff("Sure", "Sorry"), tokenizer, 65)
    assert metric == as_metric(logit_diff(3, 0)) and metric.name == "logit_diff(3, 0)"
    assert metric.describe() == {"name": "logit_diff", "tokens": [3, 0]}
    assert metric.label == "change of logit('Sure') - logit('Sorry')"
    assert as_metric(metric).label == metric.label
    refusal = as_metric(refusal_logit([" I", "I", 0, "Sorry"]), tokenizer)  # Sorry is 0
    assert refusal == as_metric(refusal_logit([2, 1, 0]))
    assert refusal.describe() == as_metric(refusal_logit([0, 1, 2])).describe()
    assert json.loads(json.dumps(refusal.describe())) == {"name": "refusal_logit", "tokens": [0, 1, 2]}
    base, ablated, row_map = draw(65)
    with pytest.raises(InputError, match="tokens as text.*as_metric"):
        logit_diff("Sure", "Sorry").rows(base, ablated, row_map)
    with pytest.raises(InputError, match="tokens as text.*as_metric"):  # one of them is enough
        logit_diff("Sure", 0).rows(base, ablated, row_map)


def test_tokens_that_are_refused():
    tokenizer = Tokenizer()
    for build, pattern in [
        (lambda: as_metric(logit_diff("Sure", "Sorry")), "'Sure'.*tokenizer"),
        (
            lambda: as_metric(refusal_logit(["I can't"[2:]]), tokenizer),
            "is 2 tokens.*'can', \"'t\".*ids .6, 7",
        ),
        (lambda: as_metric(logit_diff("Sorry", 0), tokenizer), "are the same, 0"),
        (lambda: logit_diff(4, 4), "are the same, 4"),
        (lambda: logit_diff("I", "I"), "are the same, 'I'"),
        (lambda: logit_diff(-1, 4), "token -1: expected a token id"),
        (lambda: logit_diff(1.0, 4), "token 1.0: expected"),
        (lambda: logit_diff(True, 4), "token True: expected"),
        (lambda: logit_diff("", 4), "token '': expected"),
        (lambda: logit_diff(None, 4), "token None: expected"),
        (lambda: refusal_logit([]), "at least one token"),
        (lambda: refusal_logit("Sorry"), r"write \['Sorry'\]"),
        (lambda: refusal_logit(5), r"write \[5\]"),
        (
            lambda: as_metric(logit_diff),
            r"logit_diff is not called yet: give it tokens, logit_diff\(\.\.\.\)",
        ),
        (lambda: as_metric(logit_diff(4, 65), vocab_size=65), r"logit_diff\(4, 65\).*below.*65, got 65"),
        (lambda: as_metric(refusal_logit(range(65)), vocab_size=65), "whole vocabulary of 65"),
        (lambda: as_metric(logit_diff(4, 65)).rows(*draw(65)), "below.*65, got 65"),
        (lambda: as_metric(refusal_logit(range(65))).rows(*draw(65)), "whole vocabulary"),
    ]:
        with pytest.raises(InputError, match=pattern) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_ids_from_numpy_and_torch():
    assert logit_diff(np.int64(3), torch.tensor(4)) == logit_diff(3, 4)
    assert refusal_logit(np.array([3, 4, 3])) == refusal_logit([3, 4])


def mean_logit_change(base, ablated, prompt_index):
    return ablated.mean(dim=1) - base[prompt_index].mean(dim=1)


class Scaled:
    def __call__(self, base, ablated, prompt_index):
        return 2 * mean_logit_change(base, ablated, prompt_index)


def test_a_callable():
    base, ablated, row_map = draw(65, torch.bfloat16)
    metric = as_metric(mean_logit_change, Tokenizer(), 65)
    assert metric.name == f"{__name__}.mean_logit_change" and metric.label == "mean_logit_change"
    assert metric.describe() == {"name": "callable", "function": metric.name}
    assert metric.signed and metric.sees_all_prompts and metric.unit == ""
    result = metric.rows(base, ablated, row_map)
    assert result.dtype == torch.float64
    assert torch.equal(result, mean_logit_change(base, ablated, row_map).double())
    assert as_metric(Scaled()).name == f"{__name__}.Scaled"
    assert as_metric(functools.partial(mean_logit_change)).name == metric.name
    assert torch.equal(as_metric(Scaled()).rows(base, ablated, row_map), 2 * result)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.double().numpy(),
        lambda t: t.tolist(),
        lambda t: t.float().requires_grad_(),
        lambda t: t.to(torch.int64),
        lambda t: torch.full_like(t, INF),
        lambda t: torch.full_like(t, NAN),
    ],
    ids=["numpy", "list", "with-gradient", "integers", "infinite", "nan"],
)
def test_what_a_callable_may_return(convert):
    base, ablated, row_map = draw(65)
    result = as_metric(lambda b, a, index: convert(a[:, 0])).rows(base, ablated, row_map)
    expected = torch.as_tensor(convert(ablated[:, 0])).detach().double()
    assert result.dtype == torch.float64 and not result.requires_grad
    assert torch.equal(result.nan_to_num(nan=5.0), expected.nan_to_num(nan=5.0))


@pytest.mark.parametrize(
    "convert, pattern",
    [
        (lambda t: t[:, None], r"shape \[7\], got shape \[7, 1\]"),
        (lambda t: t[:3], r"shape \[7\], got shape \[3\]"),
        (lambda t: t.mean(), r"shape \[7\], got shape \[\]"),
        (lambda t: float(t[0]), r"shape \[7\], got shape \[\]"),
        (lambda t: t > 0, "bool: return floating-point"),
        (lambda t: t.to(torch.complex64), "complex64: return floating-point"),
        (lambda t: None, "got NoneType: return a tensor"),
        (lambda t: ["a"] * 7, "got list: return a tensor"),
        (lambda t: np.array([None] * 7), "got ndarray: return a tensor"),
    ],
    ids=["column", "too-few", "mean", "float", "bool", "complex", "none", "text", "objects"],
)
def test_what_a_callable_may_not_return(convert, pattern):
    def bad_metric(base, ablated, prompt_index):
        return convert(ablated[:, 0])

    with pytest.raises(InputError, match=f"bad_metric: expected 7 real numbers.*{pattern}") as caught:
        as_metric(bad_metric).rows(*draw(65))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metric", [3, None, ["kl"], np.array(["kl", "js"]), "KL", "k", "", "kl:3", "logit-diff", "refusal_logit:"]
)
def test_what_is_no_metric(metric):
    with pytest.raises(InputError, match="metric.*expected.*kl, reverse_kl, js, total_variation"):
        as_metric(metric)


def test_metrics_as_text():
    for text, expected in [
        ("js", as_metric("js")),
        ("total-variation", as_metric("total_variation")),
        ("logit_diff:12,7", logit_diff(12, 7)),
        ("logit-diff:Sure,Sorry", logit_diff("Sure", "Sorry")),
        ("refusal_logit:Sorry,I, I,3", refusal_logit(["Sorry", "I", " I", 3])),
        ("refusal_logit:²", refusal_logit(["²"])),
    ]:
        assert parse_metric(text) == expected
    assert as_metric("logit_diff:Sure,0", Tokenizer()) == logit_diff(3, 0)
    for text in ("logit_diff:1", "logit_diff:1,2,3", "logit_diff:1,", "refusal_logit:1,,2", "kl,js"):
        with pytest.raises(InputError, match="metric '.*': expected .*logit_diff:TOKEN_A,TOKEN_B"):
            parse_metric(text)
    with pytest.raises(InputError, match="same"):
        parse_metric("logit_diff:4,4")


def test_wrong_rows_are_refused_by_every_metric():
    base, ablated, row_map = draw(7)
    for metric in ("kl", "js", logit_diff(1, 2), refusal_logit([1]), mean_logit_change):
        with pytest.raises(InputError, match=r"base \[3, 7\], ablated \[7, 7\], row_map \[3\]"):
            as_metric(metric).rows(base, ablated, row_map[:3])
        with pytest.raises(InputError, match="row_map names a row"):
            as_metric(metric).rows(base, ablated, row_map + 3)


def test_a_metric_of_another_kind():
    class Always(Metric):
        name = label = "always"

        def describe(self):
            return {"name": "always"}

        def rows(self, base_logits, ablated_logits, row_map):
            return torch.ones(len(row_map), dtype=torch.float64)

    metric = Always()
    assert as_metric(metric) is metric and metric.rows(*draw(7)).sum() == N


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_gpu, id="cuda")])
def test_on_the_gpu(marked):
    base, ablated, row_map = draw(65)
    for metric in map(as_metric, (*DIVERGENCES, logit_diff(1, 2), refusal_logit([1, 5]), mean_logit_change)):
        expected = metric.rows(base, ablated, row_map)
        result = metric.rows(base.cuda(), ablated.cuda(), row_map.cuda())
        assert result.device.type == "cuda"
        atol = 1e-6 if metric.sees_all_prompts else 1e-12
        assert_close_abs(result, expected, atol)
