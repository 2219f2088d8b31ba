"""KL(base || ablated) of rows of logits, both backends, against float64 oracles written here.

Tolerances, absolute, in nats: KL_ATOL is for logits of ordinary range, and scales with the logits' range where
that is larger, since log-probabilities have that size and float64 carries 1.1e-16 of it. The CUDA kernel computes in
sums of float32 terms, none of them negative, but for float64 logits: kl_atol allows KL_RTOL of the KL there.
"""

import math

import pytest
import torch

from shipsfast.ops.divergences import kl_rows
from tests.support.divergence_cases import (
    INF,
    KL_ATOL,
    NAN,
    SPECIAL,
    N,
    P,
    draw,
    each_backend,
    each_dtype,
    kl_atol,
    oracle,
    run,
)
from tests.support.numerics import assert_close_abs

NEAR_ATOL = 1e-15  # for rows one rounding step apart, whose KL is near 1e-14


def exact_oracle(base_row, ablated_row):
    """log1p(sum p_b expm1(d)) - sum p_b d with d = x_a - x_b, in exactly rounded sums: its error is a few
    1e-16 of |d|, however small the KL. The logits must be close."""
    x_b, x_a = base_row.double().tolist(), ablated_row.double().tolist()
    top = max(x_b)
    weights = [math.exp(x - top) for x in x_b]
    total = math.fsum(weights)
    d = [a - b for a, b in zip(x_a, x_b, strict=True)]
    shift = math.fsum(w * math.expm1(x) for w, x in zip(weights, d, strict=True)) / total
    mean = math.fsum(w * x for w, x in zip(weights, d, strict=True)) / total
    return math.log1p(shift) - mean


@each_backend
@each_dtype
@pytest.mark.parametrize("vocab", [1, 2, 7, 1023, 32000], ids=lambda v: f"V{v}")
def test_matches_the_oracle(vocab, dtype, backend, device):
    base, ablated, row_map = draw(vocab, dtype)
    expected = oracle(base, ablated, row_map)
    atol = kl_atol(expected, base, backend, device)
    assert_close_abs(run(base, ablated, row_map, backend, device), expected, atol)


@each_backend
@pytest.mark.parametrize("vocab", [2047, 2048, 2049, 4096 + 5], ids=lambda v: f"V{v}")
def test_block_boundaries(vocab, backend, device):
    base, ablated, row_map = draw(vocab, torch.bfloat16)
    expected = oracle(base, ablated, row_map)
    atol = kl_atol(expected, base, backend, device)
    assert_close_abs(run(base, ablated, row_map, backend, device), expected, atol)


@each_backend
def test_float16_subnormals(backend, device):
    base = torch.tensor([[2.0**-24, -(2.0**-15), 3 * 2.0**-24, 2.0**-14, 0.0]], dtype=torch.float16)
    ablated = torch.tensor([[-(2.0**-24), 2.0**-16, 1.0, -65504.0, 2.0**-20]], dtype=torch.float16)
    row_map = torch.zeros(1, dtype=torch.int64)
    atol = KL_ATOL * 65504
    assert_close_abs(run(base, ablated, row_map, backend, device), oracle(base, ablated, row_map), atol)
    gap = kl_rows(base, base.flip(1), row_map, backend="reference")
    atol = kl_atol(gap, base, backend, device, floor=1e-15)
    assert_close_abs(run(base, base.flip(1), row_map, backend, device), gap, atol)


@each_backend
@each_dtype
def test_strided_rows(dtype, backend, device):
    base, ablated, row_map = draw(1023, dtype)
    wide_base = torch.full((P, 1031), torch.nan, dtype=dtype, device=device)
    wide_ablated = torch.full((2 * N, 1029), torch.nan, dtype=dtype, device=device)
    wide_base[:, 3:1026] = base.to(device)
    wide_ablated[::2, 5:1028] = ablated.to(device)
    wide_map = torch.full((2 * N,), P - 1, device=device)
    wide_map[::2] = row_map.to(device)
    result = kl_rows(wide_base[:, 3:1026], wide_ablated[::2, 5:1028], wide_map[::2], backend=backend)
    expected = oracle(base, ablated, row_map)
    assert_close_abs(result, expected, kl_atol(expected, base, backend, device))


@each_backend
def test_transposed_and_expanded_logits(backend, device):
    base, ablated, row_map = draw(65)
    columns = ablated.t().contiguous().t().to(device)
    result = kl_rows(base.to(device), columns, row_map.to(device), backend=backend)
    assert_close_abs(result, run(base, ablated, row_map, backend, device), 1e-15)
    expanded = kl_rows(
        base[:1].expand(P, -1).to(device), ablated.to(device), row_map.to(device), backend=backend
    )
    expected = oracle(base[:1].expand(P, -1), ablated, row_map)
    assert_close_abs(expanded, expected, kl_atol(expected, base, backend, device))


@each_backend
@pytest.mark.parametrize("spread", [100.0, 1e4], ids=["spread100", "spread10000"])
def test_wide_logits(spread, backend, device):
    base, ablated, row_map = draw(1023, spread=spread, change=spread)
    size = float(ablated.abs().max() + base.abs().max())
    result = run(base, ablated, row_map, backend, device)
    assert_close_abs(result, oracle(base, ablated, row_map), KL_ATOL * size)


@each_backend
@pytest.mark.parametrize("offset", [-1e4, 1e4], ids=["below", "above"])
def test_a_shifted_row_is_the_same_distribution(offset, backend, device):
    base, ablated, row_map = draw(1023, torch.float64)
    result = run(base, ablated + offset, row_map, backend, device)
    # Adding the offset rounds the logits themselves, to 1e-12.
    assert_close_abs(result, oracle(base, ablated, row_map), KL_ATOL * 1e2)


@each_backend
def test_another_logit_far_above_the_base_maximum(backend, device):
    base = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0]])
    ablated = torch.tensor(
        [[0.0, 0.0, 2000.0, 0.0, 0.0], [0.0, 688.0, 0.0, 0.0, 709.5], [-3e4, 0.0, 1.0, 60.0, 90.0]]
    )
    row_map = torch.zeros(3, dtype=torch.int64)
    expected = oracle(base, ablated, row_map)
    assert_close_abs(run(base, ablated, row_map, backend, device), expected, 1e-13 * expected)


@each_backend
def test_flat_base_against_a_peak(backend, device):
    """sum e_a / sum e_b is near 1e-5 here, which a log1p of the difference would resolve to 1e-11 only."""
    base = torch.linspace(0.5, 0.0, 100_003, dtype=torch.float32)[None]
    peaks = torch.tensor([25.0, 31.0, 40.0])
    ablated = torch.cat([peaks[:, None], torch.zeros(3, 100_002)], dim=1)
    weights = [math.exp(x) for x in base[0].double().tolist()]
    total = math.fsum(weights)
    mean_log_b = math.fsum(w * x for w, x in zip(weights, base[0].double().tolist(), strict=True)) / total
    expected = [  # mean of log p_b, less mean of log p_a, under p_b
        mean_log_b
        - math.log(total)
        - weights[0] / total * peak
        + peak
        + math.log1p(100_002 * math.exp(-peak))
        for peak in peaks.tolist()
    ]
    result = run(base, ablated, torch.zeros(3, dtype=torch.int64), backend, device)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close_abs(result, expected, kl_atol(expected, base, backend, device))


@each_backend
@each_dtype
def test_rows_one_rounding_step_apart(dtype, backend, device):
    base, _, row_map = draw(4001, dtype)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(-1, 2, (N, 4001), generator=generator)
    if dtype == torch.float64:  # one step would be below everything: take a float32 step
        ablated = base[row_map] + steps * 2.0**-23
    else:
        finer = base[row_map].view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        ablated = (finer + steps.to(finer.dtype)).view(dtype)
    expected = torch.tensor(
        [exact_oracle(base[p], ablated[i]) for i, p in enumerate(row_map.tolist())], dtype=torch.float64
    )
    if dtype.itemsize >= 4:
        assert 1e-16 < float(expected.max()) < 1e-12
    floor = NEAR_ATOL if dtype.itemsize >= 4 else KL_ATOL
    atol = kl_atol(expected, base, backend, device, floor)
    assert_close_abs(run(base, ablated, row_map, backend, device), expected, atol)


@each_backend
@each_dtype
@pytest.mark.parametrize("vocab", [1, 7, 1023, 32001], ids=lambda v: f"V{v}")
def test_equal_rows_give_exactly_zero(vocab, dtype, backend, device):
    base, _, row_map = draw(vocab, dtype)
    assert torch.equal(
        run(base, base[row_map], row_map, backend, device), torch.zeros(N, dtype=torch.float64)
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("copies", [1, 500], ids=["V4", "V2000"])
@pytest.mark.parametrize("case", SPECIAL)
def test_infinities_and_nan(case, copies, dtype, backend, device):
    """`copies` puts ordinary logits behind the case, so that it meets the vector code too."""
    base, ablated, expected = SPECIAL[case]
    x_b, x_a = torch.tensor([base]), torch.tensor([ablated])
    if copies > 1:
        plain = torch.linspace(-8, -1, 4 * (copies - 1))[None]
        masked = torch.full_like(plain, -INF)
        x_b = torch.cat([x_b, masked if case == "base-all-masked" else plain], dim=1)
        x_a = torch.cat([x_a, masked if case == "ablated-all-masked" else plain.flip(1)], dim=1)
    x_b, x_a, row_map = x_b.to(dtype), x_a.to(dtype), torch.zeros(1, dtype=torch.int64)
    result = run(x_b, x_a, row_map, backend, device)
    if expected is None:
        finite = oracle(x_b, x_a.clamp(min=-1e4), row_map)
        assert_close_abs(result, finite, kl_atol(finite, x_b, backend, device))
    elif math.isnan(expected):
        assert result.isnan().all()
    else:
        assert torch.equal(result, torch.tensor([expected], dtype=torch.float64))


@each_backend
def test_a_bad_row_leaves_the_others_alone(backend, device):
    base, ablated, row_map = draw(1023)
    expected = run(base, ablated, row_map, backend, device)
    ablated[2, 100] = NAN
    result = run(base, ablated, row_map, backend, device)
    keep = torch.arange(N) != 2
    assert result[2].isnan() and torch.equal(result[keep], expected[keep])


@each_backend
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_base_row_is_bad_for_its_rows_only(bad, backend, device):
    base, ablated, _ = draw(1023)
    row_map = torch.arange(N) % P
    expected = run(base, ablated, row_map, backend, device)
    base[bad, 100] = INF
    result = run(base, ablated, row_map, backend, device)
    keep = row_map != bad
    assert result[~keep].isnan().all() and torch.equal(result[keep], expected[keep])


@each_backend
def test_empty(backend, device):
    base, ablated, row_map = draw(7)
    assert run(base, ablated[:0], row_map[:0], backend, device).shape == (0,)
    assert run(base[:0], ablated[:0], row_map[:0], backend, device).shape == (0,)


@each_backend
@each_dtype
def test_the_arguments_stay_as_they_are(dtype, backend, device):
    arguments = [tensor.to(device) for tensor in draw(65, dtype)]
    copies = [tensor.clone() for tensor in arguments]
    kl_rows(*arguments, backend=backend)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, copies, strict=True))


@each_backend
def test_repeated_calls_are_equal(backend, device):
    base, ablated, row_map = draw(5003, num_ablated=50)
    first = run(base, ablated, row_map, backend, device)
    for _ in range(3):
        assert torch.equal(run(base, ablated, row_map, backend, device), first)


@each_backend
def test_rows_do_not_depend_on_their_company(backend, device):
    base, ablated, row_map = draw(1023)
    together = run(base, ablated, row_map, backend, device)
    for i in range(N):
        alone = run(
            base[row_map[i] : row_map[i] + 1], ablated[i : i + 1], torch.zeros(1).long(), backend, device
        )
        if backend == "cpp":
            assert torch.equal(alone, together[i : i + 1])
        else:
            assert_close_abs(alone, together[i : i + 1], 1e-15)
