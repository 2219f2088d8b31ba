"""Principal angles between the leading left singular subspaces of many matrices and that of one.

X [P, d] holds one hidden state per prompt, U its left singular vectors. Dataset-level Ships (arXiv 2410.13708,
eq. 11) is the sum of the r principal angles between span(U_base[:, :r]) and span(U_ablated[:, :r]), in degrees.

Two ways, by device (`LAPACK_ON`), equally exact; tests of angles run both on a CPU:

- on CPUs a QR decomposition that leaves [n, n], n = min(P, d), and LAPACK's singular value decomposition of that:
  N (4 max(P, d) n^2 + O(n^3)) operations in float64;
- elsewhere ops/jacobi.py, because torch's QR and SVD go through the matrices one by one on CUDA: matrix products and
  rotations of all matrices at once. On a CPU it takes three to eight times as long.

Both in batches of at most SCRATCH_BYTES. Gram matrices X X^T alone would be two to four times as fast, but they square
the ratio of the singular values: with sigma_2 a thousandth of sigma_1, which one strong common direction of the prompts is
enough for, angles of rank 2 were off by 1e-9 degrees, with a millionth by 2e-3.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from ..progress import Bar
from .jacobi import SCRATCH_BYTES, left_singular_vectors, orthogonal_rows

LAPACK_ON = ("cpu",)  # types of devices


def leading_subspace(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors: x [N, P, d] -> float64 [N, P, rank], orthonormal columns.

    Raises:
        torch.linalg.LinAlgError: x is not finite.
    """
    if x.device.type not in LAPACK_ON:
        return left_singular_vectors(x, rank)
    n = min(x.shape[1:])
    step = max(1, SCRATCH_BYTES // (8 * (4 * n * n + 3 * x.shape[1] * x.shape[2])))
    return torch.cat([_by_lapack(part.double(), rank) for part in x.split(step)])


def _by_lapack(x: torch.Tensor, rank: int) -> torch.Tensor:
    if x.shape[1] <= x.shape[2]:  # U of X is that of R^T, with X^T = Q R
        r = torch.linalg.qr(x.transpose(1, 2), mode="r")[1]
        return torch.linalg.svd(r.transpose(1, 2))[0][:, :, :rank]
    q, r = torch.linalg.qr(x)
    return q @ torch.linalg.svd(r)[0][:, :, :rank]


def _singular_values(x: torch.Tensor) -> torch.Tensor:
    """x [N, m, r], m >= r -> [N, r], falling."""
    if x.device.type not in LAPACK_ON:
        return orthogonal_rows(x.mT).norm(dim=2)
    return torch.linalg.svdvals(x)


def principal_angles(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Principal angles in degrees, float64 [N, r]; base [P, r], other [N, P, r], orthonormal columns.

    Cosines are the singular values of base^T other, sines those of other - base base^T other. Each angle comes
    from whichever is smaller, as in Knyazev & Argentati 2002: the cosine is blind to small angles,
    the sine to those near 90 degrees. (scipy.linalg.subspace_angles 1.17 pairs them in opposite orders, and is off
    by about 1e-6 degrees where some angles exceed 45 degrees and others do not.)
    """
    overlap = base.T @ other  # [N, r, r]
    cosine = _singular_values(overlap).clamp(max=1)  # falling, so angles rise
    residual = other - base @ overlap
    # Once more: the first product leaves rounding along base.
    residual = residual - base @ (base.T @ residual)
    sine = _singular_values(residual).clamp(max=1).flip(1)  # rising
    small = cosine.square() >= 0.5
    return torch.rad2deg(torch.where(small, torch.asin(sine), torch.acos(cosine)))


def subspace_angle_deg(base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Dataset-level Ships of N matrices: base [P, r] (from `leading_subspace`), x [N, P, d] -> float64 [N], degrees."""
    rank = base.shape[1]
    step = max(1, SCRATCH_BYTES // (8 * 6 * base.numel()))
    parts = leading_subspace(x, rank).split(step)
    return torch.cat([principal_angles(base, part).sum(1) for part in parts])


def gram_matrices(x: torch.Tensor) -> torch.Tensor:
    """x [N, P, d] -> x x^T, float64 [N, P, P]."""
    step = max(1, SCRATCH_BYTES // (8 * x.shape[1] * x.shape[2]))
    return torch.cat([wide @ wide.mT for wide in (part.double() for part in x.split(step))])


def resampled_angle_deg(
    base: torch.Tensor, grams: torch.Tensor, rank: int, counts: torch.Tensor, progress: bool = False
) -> torch.Tensor:
    """Dataset-level Ships of resampled prompts: float64 [R, N], degrees.

    base [P, P], grams [N, P, P]: Gram matrices without and with each head switched off; counts [R, P]: how often
    each resample holds each prompt, at least `rank` of them distinct.

    With c_i copies of prompt i, X becomes diag(sqrt(c)) X up to a rotation that both sides share: the copies of a
    row are sqrt(c_i) times a unit vector. So the singular subspaces are the leading eigenvectors of
    diag(sqrt(c)) X X^T diag(sqrt(c)). Squared singular values cost digits (see above), which resampling, unlike
    the scores themselves, does not need. R (N + 1) eigenvalue problems of size P.
    """
    threads = torch.get_num_threads()
    step = max(1, SCRATCH_BYTES // (8 * 4 * threads * base.numel()))

    def one(count: torch.Tensor) -> torch.Tensor:
        both = count.sqrt()[:, None] * count.sqrt()
        own = _leading_eigenvectors((base * both)[None], rank)[0]
        parts = [principal_angles(own, _leading_eigenvectors(g * both, rank)) for g in grams.split(step)]
        return torch.cat(parts).sum(1)

    # torch goes through a batch of small matrices one by one
    with ThreadPoolExecutor(threads) as pool:
        found = Bar(
            pool.map(one, counts),
            desc="resampling",
            total=len(counts),
            unit="resamples",
            progress=progress,
            leave=False,
        )
        return torch.stack(list(found))


def _leading_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(gram)[1][:, :, -rank:]
