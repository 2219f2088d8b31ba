"""Singular vectors without LAPACK's loops (ops/jacobi.py) against exact ones, LAPACK's and scipy's, on the CPU.

A bound is what rounding X in its last bit would do, eps sigma_1 over the gap, times the square root of the sums' length
and the four steps that round.
"""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shipsfast.ops import jacobi, subspaces
from tests.support import hooks
from tests.support.largest_double import LargestDouble
from tests.support.numerics import assert_close_abs

EPS = 2.0**-52
CONTRACT_DEG = 1e-8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def with_spectrum(values, prompts: int, width: int, seed: int = 0) -> torch.Tensor:
    """[prompts, width] with these singular values, the rest zero."""
    values = torch.tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(normal(prompts, len(values), seed=seed))[0]
    right = torch.linalg.qr(normal(width, len(values), seed=seed + 1000))[0]
    return (left * values) @ right.T


def rounding_rad(values, rank: int, prompts: int, width: int) -> float:
    """How far the leading subspace may be turned; `values` are the singular values, falling."""
    gap = values[rank - 1] - (values[rank] if rank < len(values) else 0)
    if gap <= 0:
        return np.inf
    return 4 * (prompts + width) ** 0.5 * EPS * values[0] / gap


def turned_rad(expected: np.ndarray, found: torch.Tensor) -> float:
    """The sine of the largest angle between the spans of orthonormal columns."""
    apart = found.numpy() - expected @ (expected.T @ found.numpy())
    return float(np.linalg.norm(apart, 2))


def exact(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [P, min(P, d)] and singular values of x [P, d], computed with 60 digits."""
    with mpmath.workdps(60):
        left, values, _ = mpmath.svd_r(mpmath.matrix(x.tolist()))
        shape = left.rows, left.cols
        return np.array(left.tolist(), float).reshape(shape), np.array([float(v) for v in values])


def assert_orthonormal(found: torch.Tensor) -> None:
    """To what products of its columns round to."""
    size = found.shape[1]
    assert_close_abs(
        found.mT @ found, torch.eye(found.shape[2]).expand(len(found), -1, -1), 8 * EPS * size**0.5
    )


SPECTRA = {
    "equal": [1] * 6,
    "even": [6, 5, 4, 3, 2, 1],
    **{f"each {ratio:g} of the one before": [ratio**i for i in range(6)] for ratio in (0.5, 1e-3, 1e-6, 1e-9, 1e-12)},
    **{f"one and {small:g}": [1, *(small * i for i in (5, 4, 3, 2, 1))] for small in (1e-3, 1e-6, 1e-9, 1e-12)},
    "clusters": [1, 1, 1e-7, 1e-7, 1e-7 * (1 - 1e-6), 1e-12],
    "a gap of 1e-9": [1, 1 - 1e-9, 0.5, 0.4, 0.3, 0.2],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 9), (8, 6), (6, 6)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_vectors_are_as_exact_as_rounding_lets_them_be(spectrum, shape):
    """Alone, and beside strangers from whose singular vectors the search starts."""
    x = with_spectrum(SPECTRA[spectrum], *shape)
    left, values = exact(x)
    alone, beside = (
        x[None],
        torch.stack([normal(*shape, seed=5), x, with_spectrum([1, 1e-9], *shape, seed=7)]),
    )
    for rank in range(1, 7):
        determined = rounding_rad(values, rank, *shape) < 0.1
        for batch, at in ((alone, 0), (beside, 1)):
            found = jacobi.left_singular_vectors(batch, rank)
            assert_orthonormal(found)
            if determined:
                allowed = rounding_rad(values, rank, *shape)
                assert turned_rad(left[:, :rank], found[at]) <= allowed, (rank, at)


@pytest.mark.parametrize(("prompts", "width"), [(100, 640), (50, 576), (100, 4096), (33, 20), (1, 7), (2, 1)])
def test_lapack_finds_the_same(prompts, width):
    """Five directions down to 1e-12 of the first above a floor of 1e-15: two Cholesky decompositions are not enough."""
    few = min(prompts, width, 5)
    values = [1e-3**i for i in range(few)] + [1e-15] * (min(prompts, width) - few)
    x = torch.stack([with_spectrum(values, prompts, width, seed) for seed in range(2)])
    for rank in range(1, few + 1):
        found = jacobi.left_singular_vectors(x, rank)
        assert_orthonormal(found)
        allowed = rounding_rad(values, rank, prompts, width)
        assert allowed < 0.1
        for one, each in zip(subspaces.leading_subspace(x, rank), found, strict=True):
            assert turned_rad(one.numpy(), each) <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("prompts", "width"), [(100, 640), (50, 576), (40, 32), (4, 5)])
def test_angles_are_those_of_scipy(monkeypatch, prompts, width, rank, dtype):
    """Where scipy 1.17 is right: one angle, or none above 45 degrees."""
    base = with_spectrum([20, 15, 12, *([1.0] * (min(prompts, width) - 3))], prompts, width)
    sizes = [0, 1e-9, 1e-6, 1e-3, 0.1, 0.3]
    noise = normal(len(sizes), prompts, width, seed=1) * 10 / (prompts**0.5 + width**0.5)
    x = (base + torch.tensor(sizes, dtype=torch.float64)[:, None, None] * noise).to(dtype)
    lefts = [np.linalg.svd(each.double().numpy(), full_matrices=False)[0][:, :rank] for each in x]
    expected = [np.rad2deg(scipy.linalg.subspace_angles(lefts[0], left)) for left in lefts]
    assert max(angles.max() for angles in expected) < 45
    monkeypatch.setattr(subspaces, "LAPACK_ON", ())
    got = subspaces.subspace_angle_deg(subspaces.leading_subspace(x[:1], rank)[0], x)
    assert_close_abs(got, np.array([angles.sum() for angles in expected]), CONTRACT_DEG)
    assert got[0] < 1e-13 * rank and got[-1] > 0.2


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_principal_angles_between_any_subspaces(monkeypatch, rank):
    """All of the range at once, where scipy pairs sines and cosines wrongly: against atan2."""
    base, *others = (torch.linalg.qr(normal(20, rank, seed=i))[0] for i in range(5))
    expected = np.stack([hooks.principal_angles_deg(base.numpy(), other.numpy()) for other in others])
    monkeypatch.setattr(subspaces, "LAPACK_ON", ())
    assert_close_abs(subspaces.principal_angles(base, torch.stack(others)), expected, 1e-12)


def test_duplicates_and_zeros():
    """Matrices of low rank: leading vectors as ever, and any orthonormal ones beyond."""
    x = normal(3, 4, 30)
    x = torch.cat((x, x, x[:, :3]), 1)  # rank 4 of 11
    x[2] = 0
    found = jacobi.left_singular_vectors(x, 11)
    assert_orthonormal(found)
    for each, expected in zip(found[:2], torch.linalg.svd(x[:2])[0], strict=True):
        assert turned_rad(expected[:, :4].numpy(), each[:, :4]) < 1e-14


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    x = normal(2, 9, 14).float()
    found = jacobi.left_singular_vectors(x * scale, 2)
    for one, each in zip(jacobi.left_singular_vectors(x, 2), found, strict=True):
        assert turned_rad(one.numpy(), each) < 1e-6  # float32 has rounded


def test_others_in_the_batch_do_not_matter(monkeypatch):
    """Nor how it is cut."""
    x = normal(5, 30, 50)
    together = jacobi.left_singular_vectors(x, 3)
    values = torch.linalg.svdvals(x).numpy()
    monkeypatch.setattr(jacobi, "SCRATCH_BYTES", 1)
    cut = jacobi.left_singular_vectors(x, 3)
    for i in range(5):
        alone = jacobi.left_singular_vectors(x[i : i + 1], 3)[0]
        for found in (together[i], cut[i]):
            assert turned_rad(alone.numpy(), found) <= 2 * rounding_rad(values[i], 3, 30, 50)


def test_scratch_is_bounded(monkeypatch):
    """Four arrays as large as the largest are alive at once."""
    monkeypatch.setattr(jacobi, "SCRATCH_BYTES", 2**20)
    for shape in ((40, 20, 300), (200, 20, 25)):
        x = normal(*shape).float()
        with LargestDouble() as largest:
            jacobi.left_singular_vectors(x, 1)
        assert 2**16 < 8 * largest.elements <= max(2**18, 8 * shape[0] * shape[1] ** 2)


@pytest.mark.parametrize(("prompts", "width"), [(7, 9), (9, 7), (1, 4), (60, 300)])
def test_the_factor_has_the_singular_values(prompts, width):
    """Beside what three shifts add: each grows by the same function of itself, and by rounding where x has none."""
    shared = normal(prompts, 1, seed=1) * normal(1, width, seed=2)
    x = torch.stack([normal(prompts, width), shared, shared * 1e-3])
    x[2, : prompts // 2] += normal(prompts // 2, width, seed=3)
    factor = jacobi.triangular_factor(x)
    assert torch.equal(factor, factor.tril()) and (factor.diagonal(dim1=1, dim2=2) > 0).all()
    values = torch.linalg.svdvals(x)
    expected = torch.nn.functional.pad(values / values[:, :1], (0, prompts - values.shape[1]))
    got = torch.linalg.svdvals(factor) / values[:, :1]
    size = prompts + width
    assert_close_abs(got, expected, EPS * (prompts * size * expected + 4 * size**0.5))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_rows_are_turned_until_they_are_orthogonal(count):
    """Lengths each to a few eps of itself, down to 1e-12 of the first and less."""
    mixed = normal(2, count, 9)
    sizes = torch.tensor([1e-4**i for i in range(count)], dtype=torch.float64)
    rows = (mixed * sizes[:, None]).flip(1)
    found = jacobi.orthogonal_rows(rows)
    lengths = found.norm(dim=2)
    assert (lengths[:, :-1] >= lengths[:, 1:]).all()
    unit = found / lengths[:, :, None]
    assert_orthonormal(unit.mT)
    # Turned, not changed: J rows has the products of columns that rows has.
    assert_close_abs(found.mT @ found, rows.mT @ rows, 1e-13)
    for each, length in zip(rows, lengths, strict=True):
        assert_close_abs(length / torch.from_numpy(exact(each)[1]), torch.ones(count), 1e-13)


def test_rows_that_are_orthogonal_already_stay_as_they_are():
    rows = torch.diag(torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64))[None]
    assert torch.equal(jacobi.orthogonal_rows(rows), rows[:, [1, 3, 0, 2]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value):
    x = normal(3, 5, 7)
    x[1, 2, 3] = value
    with pytest.raises(torch.linalg.LinAlgError):
        jacobi.left_singular_vectors(x, 1)
    with pytest.raises(torch.linalg.LinAlgError, match="not found in 30 sweeps"):
        jacobi.orthogonal_rows(x)


def test_an_end_without_convergence_is_told(monkeypatch):
    monkeypatch.setattr(jacobi, "SWEEPS", 2)
    with pytest.raises(torch.linalg.LinAlgError, match="not found in 2 sweeps"):
        jacobi.orthogonal_rows(normal(3, 20, 20))


def test_a_near_start_saves_sweeps(monkeypatch):
    """Heads that move the hidden states by a thousandth: 3 sweeps, and strangers take 9."""
    real, looked = jacobi._largest_cosine, []
    monkeypatch.setattr(jacobi, "_largest_cosine", lambda rows: looked.append(1) or real(rows))
    base, more = normal(40, 64), normal(6, 40, 64, seed=1)
    more[0] = 0
    jacobi.left_singular_vectors(base + 1e-3 * more, 1)
    assert len(looked) - 1 <= 4


def test_nothing_goes_through_matrices_one_by_one(monkeypatch):
    """What torch loops over on CUDA is called for single matrices alone."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name.startswith(("_linalg", "linalg", "svd", "qr", "geqrf")):
                called.append((name, args[0].dim()))
            return func(*args, **(kwargs or {}))

    x = normal(4, 40, 50)
    monkeypatch.setattr(subspaces, "LAPACK_ON", ())
    with Watch():
        subspaces.subspace_angle_deg(subspaces.leading_subspace(x[:1], 2)[0], x)
    batched = {name for name, dims in called if dims > 2}
    assert ("_linalg_eigh", 2) in called
    assert batched == {"linalg_cholesky_ex", "linalg_solve_triangular", "linalg_vector_norm"}
