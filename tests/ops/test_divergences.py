"""divergence_rows, both backends, against the definitions: in float64, and in 60 digits where divergences are small.

Tolerances: ATOL is absolute, for logits of ordinary range, and scales with the logits' range, whose rounding to
float64 it is. RTOL is relative, for rows that are close, where no common offset hides their difference. An
error e near 1e-16 in a row's log sum of exps adds e^2 / 2, or some 1e-31, to a divergence.
"""

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shipsfast.ops.divergences import DIVERGENCES, divergence_rows, kl_rows
from tests.support.divergence_cases import (
    BACKENDS,
    INF,
    NAN,
    N,
    P,
    draw,
    each_backend,
    each_dtype,
    needs_extension,
)
from tests.support.divergence_cases import run_divergences as run
from tests.support.numerics import assert_close_abs

ATOL = 1e-13
RTOL = 1e-11
LN2 = math.log(2.0)
KL, REVERSE_KL, JS, TV = range(4)
# Hypothesis tests run once, so they go over the backends of this machine themselves.
BACKENDS_ON_CPU = [backend.values[0] for backend in BACKENDS if backend.values[1] == "cpu"]


def one(base, ablated, backend, device="cpu"):
    """The four divergences of two rows of numbers, as floats."""
    pair = [torch.as_tensor(row, dtype=torch.float64)[None] for row in (base, ablated)]
    return run(*pair, torch.zeros(1, dtype=torch.int64), backend, device)[:, 0].tolist()


def oracle(base, ablated, row_map):
    """[4, N] as the definitions say, in float64; 0 log 0 = 0."""

    def kl(log_p, log_q):
        return torch.where(log_p == -INF, 0.0, log_p.exp() * (log_p - log_q)).sum(dim=-1)

    log_b = torch.log_softmax(base.double(), dim=-1)[row_map]
    log_a = torch.log_softmax(ablated.double(), dim=-1)
    log_m = torch.logaddexp(log_a, log_b) - LN2
    js = 0.5 * kl(log_b, log_m) + 0.5 * kl(log_a, log_m)
    return torch.stack(
        [kl(log_b, log_a), kl(log_a, log_b), js, 0.5 * (log_a.exp() - log_b.exp()).abs().sum(dim=-1)]
    )


def digits_oracle(base, ablated):
    """The same of two rows of finite logits, as floats, in 60 digits: what is small keeps some 20 of them."""
    with localcontext() as context:
        context.prec = 60

        def softmax(row):
            weights = [Decimal(x).exp() for x in row]
            return [weight / sum(weights) for weight in weights]

        def kl(p, q):
            return sum(x * (x / y).ln() for x, y in zip(p, q, strict=True))

        p_b, p_a = softmax(base), softmax(ablated)
        m = [(x + y) / 2 for x, y in zip(p_b, p_a, strict=True)]
        tv = sum(abs(x - y) for x, y in zip(p_b, p_a, strict=True)) / 2
        return [float(value) for value in (kl(p_b, p_a), kl(p_a, p_b), (kl(p_b, m) + kl(p_a, m)) / 2, tv)]


@each_backend
@each_dtype
@pytest.mark.parametrize("vocab", [1, 2, 7, 1023, 2047, 2049, 32001], ids=lambda v: f"V{v}")
def test_matches_the_definitions(vocab, dtype, backend, device):
    arguments = draw(vocab, dtype)
    assert_close_abs(run(*arguments, backend, device), oracle(*arguments), ATOL)


@each_backend
@pytest.mark.parametrize("spread", [100.0, 1e4], ids=["spread100", "spread10000"])
def test_wide_logits(spread, backend, device):
    base, ablated, row_map = draw(1023, spread=spread, change=spread)
    size = float(ablated.abs().max() + base.abs().max())
    assert_close_abs(
        run(base, ablated, row_map, backend, device), oracle(base, ablated, row_map), ATOL * size
    )


@each_backend
def test_probabilities_below_the_smallest_float64(backend, device):
    """p_b of the token that ablation makes certain is e^-3000, and the other way round."""
    kl, reverse_kl, js, tv = one([0.0, -3000.0, -1.0], [-2000.0, 0.0, -1000.0], backend, device)
    p = 1 / (1 + math.exp(-1))
    assert kl == pytest.approx(p * (2000 + math.log(p)) + (1 - p) * (1000 + math.log(1 - p)), rel=1e-14)
    assert reverse_kl == pytest.approx(3000 - math.log(p), rel=1e-14)
    assert js == pytest.approx(LN2, rel=1e-14) and tv == pytest.approx(1.0, rel=1e-14)


CHANGES = {
    "fp64-1e-9": (torch.float64, 1e-9),
    "fp64-1e-6": (torch.float64, 1e-6),
    "fp32-1e-6": (torch.float32, 1e-6),
    "fp32-1e-3": (torch.float32, 1e-3),
    "bf16-0.01": (torch.bfloat16, 0.01),
    "fp16-0.2": (torch.float16, 0.2),
    "fp64-0.3": (torch.float64, 0.3),
    "fp64-30": (torch.float64, 30.0),
}


@each_backend
@pytest.mark.parametrize("dtype, change", CHANGES.values(), ids=CHANGES.keys())
def test_small_divergences_keep_their_digits(dtype, change, backend, device):
    base, ablated, row_map = draw(301, dtype, num_base=2, num_ablated=3, change=change)
    expected = torch.tensor(
        [
            digits_oracle(base[p].tolist(), row.tolist())
            for p, row in zip(row_map.tolist(), ablated, strict=True)
        ],
        dtype=torch.float64,
    ).T
    if change == 1e-9:
        assert 1e-20 < float(expected[KL].min()) < float(expected[KL].max()) < 1e-17
    assert_close_abs(run(base, ablated, row_map, backend, device), expected, RTOL * expected)


@each_backend
@pytest.mark.parametrize("gap", [1e-8, 0.1, 0.33999, 0.34001, 0.3466, 0.5, 1.0, 5.0, 40.0, 700.0])
def test_two_tokens_over_all_distances(gap, backend, device):
    """Through both ways of computing a term, at either sign."""
    for base, ablated in ([0.0, 0.0], [gap, 0.0]), ([-gap, 0.0], [0.0, 0.25]):
        expected = digits_oracle(base, ablated)
        got = one(base, ablated, backend, device)
        assert got == pytest.approx(expected, rel=1e-13, abs=0.0)


@each_backend
@each_dtype
@pytest.mark.parametrize("vocab", [1, 7, 1023, 32001], ids=lambda v: f"V{v}")
def test_equal_rows_give_exactly_zero(vocab, dtype, backend, device):
    base, _, row_map = draw(vocab, dtype)
    base[0, vocab // 2 + 1 :] = -INF
    zero = torch.zeros(4, N, dtype=torch.float64)
    assert torch.equal(run(base, base[row_map], row_map, backend, device), zero)
    wide = torch.full((N, vocab + 6), NAN, dtype=dtype)
    wide[:, 5:-1] = base[row_map]
    assert torch.equal(run(base, wide[:, 5:-1], row_map, backend, device), zero)
    columns = base[row_map].t().contiguous().t()
    assert torch.equal(run(base, columns, row_map, backend, device), zero)


@each_backend
@each_dtype
def test_strided_rows(dtype, backend, device):
    base, ablated, row_map = draw(1023, dtype)
    wide_base = torch.full((P, 1031), NAN, dtype=dtype, device=device)
    wide_ablated = torch.full((2 * N, 1029), NAN, dtype=dtype, device=device)
    wide_base[:, 3:1026] = base.to(device)
    wide_ablated[::2, 5:1028] = ablated.to(device)
    wide_map = row_map.to(device).repeat_interleave(2)
    result = divergence_rows(
        wide_base[:, 3:1026], wide_ablated[::2, 5:1028], wide_map[::2], names=DIVERGENCES, backend=backend
    )
    assert torch.equal(result.cpu(), run(base, ablated, row_map, backend, device))


# base, ablated and where kl and reverse_kl are then infinite; None: everything is NaN
SPECIAL = {
    "masked-in-both": ([0.0, 1.0, -INF, 2.0], [0.5, 1.0, -INF, 2.0], (False, False)),
    "masked-in-base": ([0.0, 1.0, -INF, 2.0], [0.5, 1.0, 3.0, 2.0], (False, True)),
    "masked-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, -INF, 3.0, 2.0], (True, False)),
    "masked-at-the-maximum": ([0.0, 1.0, 5.0, 2.0], [0.5, 1.0, -INF, 2.0], (True, False)),
    "masked-where-p-underflows": ([0.0, 1.0, -5e3, 2.0], [0.5, 1.0, -INF, 2.0], (True, False)),
    "base-masked-where-p-underflows": ([0.0, 1.0, -INF, 2.0], [0.5, 1.0, -5e3, 2.0], (False, True)),
    "masked-apart": ([0.0, 1.0, -INF, 2.0], [-INF, 1.0, 3.0, 2.0], (True, True)),
    "disjoint": ([0.0, 1.0, -INF, -INF], [-INF, -INF, 3.0, 2.0], (True, True)),
    "one-hot": ([-INF, -INF, -INF, 2.0], [0.5, 1.0, 3.0, 2.0], (False, True)),
    "same-one-hot": ([-INF, -INF, -INF, 2.0], [-INF, -INF, -INF, 7.0], (False, False)),
    "nan-in-base": ([0.0, NAN, 5.0, 2.0], [0.5, 1.0, 3.0, 2.0], None),
    "nan-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, NAN, 3.0, 2.0], None),
    "nan-where-base-is-masked": ([0.0, -INF, 5.0, 2.0], [0.5, NAN, 3.0, 2.0], None),
    "nan-where-ablated-is-masked": ([0.0, NAN, 5.0, 2.0], [0.5, -INF, 3.0, 2.0], None),
    "inf-in-base": ([0.0, INF, 5.0, 2.0], [0.5, 1.0, 3.0, 2.0], None),
    "inf-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, 1.0, INF, 2.0], None),
    "inf-in-both": ([0.0, 1.0, INF, 2.0], [0.5, 1.0, INF, 2.0], None),
    "base-all-masked": ([-INF] * 4, [0.5, 1.0, 3.0, 2.0], None),
    "ablated-all-masked": ([0.5, 1.0, 3.0, 2.0], [-INF] * 4, None),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("masked_behind", [0, 61, 2060], ids=["V4", "V65", "V2064"])
@pytest.mark.parametrize("case", SPECIAL)
def test_infinities_and_nan(case, masked_behind, dtype, backend, device):
    """Masked tokens in front, so that the case meets vector code and later blocks too."""
    base, ablated, infinite = SPECIAL[case]
    x_b, x_a = (
        torch.cat([torch.full((masked_behind,), -INF), torch.tensor(row)])[None].to(dtype)
        for row in (base, ablated)
    )
    row_map = torch.zeros(1, dtype=torch.int64)
    result = run(x_b, x_a, row_map, backend, device)
    if infinite is None:
        assert result.isnan().all()
        return
    for index, is_infinite in enumerate(infinite):
        assert (result[index].item() == INF) == is_infinite
    finite = [index for index in range(4) if index >= JS or not infinite[index]]
    expected = oracle(x_b, x_a, row_map)
    assert_close_abs(result[finite], expected[finite], ATOL)
    if case == "disjoint":
        assert result[JS:, 0].tolist() == pytest.approx([LN2, 1.0], rel=1e-15)


@each_backend
def test_a_bad_row_leaves_the_others_alone(backend, device):
    base, ablated, _ = draw(1023)
    row_map = torch.arange(N) % P
    expected = run(base, ablated, row_map, backend, device)
    ablated[2, 100], base[1, 100] = NAN, INF
    result = run(base, ablated, row_map, backend, device)
    keep = (torch.arange(N) != 2) & (row_map != 1)
    assert result[:, ~keep].isnan().all() and torch.equal(result[:, keep], expected[:, keep])


@each_backend
def test_any_names_in_any_order(backend, device):
    arguments = draw(1023)
    every = run(*arguments, backend, device)
    for count in (1, 2, 3, 4):
        for chosen in itertools.permutations(range(4), count):
            got = run(*arguments, backend, device, [DIVERGENCES[i] for i in chosen])
            assert_close_abs(got, every[list(chosen)], 1e-15)
    twice = run(*arguments, backend, device, ["js", "kl", "js"])
    assert torch.equal(twice[0], twice[2]) and torch.equal(twice[0], every[JS])
    alone = run(*arguments, backend, device, ["kl"])[0]
    device_arguments = [tensor.to(device) for tensor in arguments]
    assert torch.equal(alone, kl_rows(*device_arguments, backend=backend).cpu())


@each_backend
def test_empty(backend, device):
    base, ablated, row_map = draw(7)
    assert run(base, ablated[:0], row_map[:0], backend, device).shape == (4, 0)
    assert run(base[:0], ablated[:0], row_map[:0], backend, device, ["js"]).shape == (1, 0)


@needs_extension
@each_dtype
@pytest.mark.parametrize("change", [1e-6, 1e-2, 1.0, 10.0], ids=lambda c: f"change{c}")
def test_the_backends_agree(change, dtype):
    arguments = draw(5003, dtype, change=change)
    expected = run(*arguments, "reference", "cpu")
    assert_close_abs(run(*arguments, "cpp", "cpu"), expected, 1e-13 * expected + 1e-31)


rows_of_logits = st.integers(1, 40).flatmap(
    lambda vocab: st.tuples(
        *[
            st.lists(st.floats(-60.0, 60.0) | st.floats(-1e-3, 1e-3), min_size=vocab, max_size=vocab)
            for _ in range(2)
        ],
        st.permutations(range(vocab)),
    )
)


@settings(max_examples=200, deadline=None)
@given(rows_of_logits)
def test_properties(rows):
    base, ablated, order = rows
    for backend in BACKENDS_ON_CPU:
        kl, reverse_kl, js, tv = result = one(base, ablated, backend)
        swapped = one(ablated, base, backend)
        assert min(result) >= 0.0 and js <= LN2 and tv <= 1.0
        assert swapped[:3] == pytest.approx([reverse_kl, kl, js], rel=1e-13, abs=1e-30)
        # A probability near 1 has the rounding of its log sum, which is of the logits' size; each order has its own.
        size = max(map(abs, [*base, *ablated]), default=0.0) + 1.0
        rounding = size * 2.0**-52
        assert swapped[TV] == pytest.approx(tv, rel=1e-13, abs=rounding)
        slack = 1 + 1e-13
        assert js <= (tv + rounding) * LN2 * slack
        assert tv <= math.sqrt(min(kl, reverse_kl) / 2) * slack + rounding  # Pinsker
        assert js <= (kl + reverse_kl) / 4 * slack + 1e-30
        permuted = one([base[i] for i in order], [ablated[i] for i in order], backend)
        assert permuted[:3] == pytest.approx(result[:3], rel=1e-12, abs=1e-30)
        assert permuted[TV] == pytest.approx(tv, rel=1e-12, abs=rounding)
        pair = [torch.tensor([row], dtype=torch.float64) for row in (base, ablated)]
        expected = oracle(*pair, torch.zeros(1, dtype=torch.int64))[:, 0]
        assert_close_abs(torch.tensor(result, dtype=torch.float64), expected, 1e-14 * size)


@each_backend
@each_dtype
def test_the_arguments_stay_as_they_are(dtype, backend, device):
    arguments = [tensor.to(device) for tensor in draw(65, dtype)]
    copies = [tensor.clone() for tensor in arguments]
    divergence_rows(*arguments, names=DIVERGENCES, backend=backend)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, copies, strict=True))


@each_backend
def test_rows_do_not_depend_on_their_company(backend, device):
    base, ablated, row_map = draw(1023)
    together = run(base, ablated, row_map, backend, device)
    for i in range(N):
        p = int(row_map[i])
        alone = run(base[p : p + 1], ablated[i : i + 1], torch.zeros(1).long(), backend, device)
        assert_close_abs(alone, together[:, i : i + 1], 1e-15)
