"""Singular vectors of many matrices at once, without a loop over them: for devices whose own routines have one.

On CUDA torch's float64 QR, SVD and eigh go through the matrices of a batch one by one as soon as a side is longer than 32
(256 for QR): some 10 ms each. Batched are matrix products, Cholesky, triangular solves and everything elementwise, so of
these alone

    X [P, d] -> V^T X -> lower triangular L [P, P] -> L J = U S       left singular vectors of X: V U

1. V holds the left singular vectors of the first matrix. Ablated matrices are close to it, so that V^T X has nearly
   orthogonal rows and L is nearly diagonal, which spares more than half of step 3. Any orthogonal V is right.
2. Cholesky-QR three times, each time shifted: L1 = chol(X X^T + s), W = L1^-1 X, L2 = chol(W W^T + s), and so on,
   L = L1 L2 L3. A shift changes no singular vector: if sigma is a singular value of X, L1 has sqrt(sigma^2 + s) with the
   same left vector, and W has sigma / sqrt(sigma^2 + s) where L1 ends. So s may be as large as the bound on what
   rounding does to X X^T, no Cholesky breaks down, whatever the rank of X, and no small singular value drowns in the
   squares of large ones: W has them at eps^-1/2 times the size. What the shifts leave where X has nothing is
   (s1 s2 s3)^1/2, below 1e-16 of its norm for 100 prompts of 4,096 numbers. After two it is up to 1e-11.
3. One-sided Jacobi turns pairs of columns of L until all are orthogonal: their lengths are then the singular values,
   their directions the left vectors. It needs no gap, and is as exact for small singular values as for large ones.
   P/2 pairs are turned at once, and P - 1 steps make a sweep. 2 to 5 sweeps are enough where heads change hidden
   states by a millionth to a tenth, 12 for matrices that have nothing in common.

Every step is orthogonal or backward stable, so singular vectors are as exact as LAPACK's: off by about eps sigma_1 over the
gap. A matrix takes 10 P^2 d operations in products and solves; a sweep moves 12 P^3 float64 numbers. That traffic is why
LAPACK stays on CPUs, and why P should be hundreds, not thousands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = torch.finfo(torch.float64).eps
SCRATCH_BYTES = 256 << 20
SWEEPS = 30  # 12 are enough for matrices that are nothing alike


def left_singular_vectors(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors: x [N, P, d] of any float dtype -> float64 [N, P, rank], orthonormal columns.

    rank <= P. Beyond the rank of x the vectors are any that are orthonormal.

    Raises:
        torch.linalg.LinAlgError: x is not finite.
    """
    prompts, width = x.shape[1:]
    first = x[0].double()
    start = torch.linalg.eigh(first @ first.T)[1].flip(1)  # the largest first
    step = max(1, SCRATCH_BYTES // (8 * (4 * prompts * width + 4 * prompts**2)))
    factors = torch.cat([triangular_factor(start.T @ part.double()) for part in x.split(step)])
    step = max(1, SCRATCH_BYTES // (8 * 4 * prompts**2))
    found = torch.cat([orthogonal_rows(part.mT)[:, :rank] for part in factors.split(step)])
    return start @ F.normalize(found, dim=2, eps=torch.finfo(found.dtype).tiny).mT


def triangular_factor(x: torch.Tensor) -> torch.Tensor:
    """Lower triangular L with the left singular vectors of x: float64 x [N, P, d] -> [N, P, P].

    Its singular values are those of x, each larger by less than eps P (P + d) of itself and rounding.
    """
    prompts, width = x.shape[1:]
    factor, rest = None, x
    for more in (True, True, False):
        gram = rest @ rest.mT
        diagonal = gram.diagonal(dim1=1, dim2=2)
        trace = diagonal.sum(1, keepdim=True)
        # Rounding moves the products' eigenvalues by less than eps d / 2 of the trace, and Cholesky's by less than eps P.
        diagonal += EPS * (width + prompts) * torch.where(trace > 0, trace, 1)
        lower = torch.linalg.cholesky(gram)
        factor = lower if factor is None else factor @ lower
        if more:
            rest = torch.linalg.solve_triangular(lower, rest, upper=False)
    return factor


def orthogonal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows turned until they are orthogonal, the longest first: float64 [N, k, m] -> J rows [N, k, m], J orthogonal.

    Lengths are the singular values, each to a few eps of itself where the rows' directions are well conditioned,
    and directions the right singular vectors. `k <= m`, or the last k - m are rounding.

    Raises:
        torch.linalg.LinAlgError: rows are not finite.
    """
    count, size = rows.shape[1:]
    floor = EPS * size**0.5  # rounding of a product of two rows, over their lengths
    # Rows play a tournament: row i of the upper half against row i of the lower, and all but the first of the upper move
    # one seat on. Rows of zeros meet nobody.
    half = (count + 1) // 2
    rows = F.pad(rows, (0, 0, 0, 2 * half - count))
    for _ in range(SWEEPS):
        if _largest_cosine(rows) <= 4 * floor:
            order = rows.norm(dim=2).argsort(dim=1, descending=True, stable=True)[:, :count]
            return rows.gather(1, order[:, :, None].expand(-1, -1, size))
        upper, lower = rows.split(half, 1)
        for _ in range(2 * half - 1):
            upper, lower = _turned(upper, lower, floor)
            if half > 1:
                upper, lower = (
                    torch.cat((upper[:, :1], lower[:, :1], upper[:, 1:-1]), 1),
                    torch.cat((lower[:, 1:], upper[:, -1:]), 1),
                )
        rows = torch.cat((upper, lower), 1)
    raise torch.linalg.LinAlgError(f"singular values were not found in {SWEEPS} sweeps; are rows finite?")


def _largest_cosine(rows: torch.Tensor) -> float:
    """Of the angles between two rows of one matrix; NaN if rows are not finite."""
    unit = F.normalize(rows, dim=2, eps=torch.finfo(rows.dtype).tiny)
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=1, dim2=2).zero_()
    return float(cosines.abs().max())


def _turned(a: torch.Tensor, b: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, h, m] of both, each pair turned by the smaller angle that makes it orthogonal, if it is not."""
    aa, bb, ab = a.square().sum(2), b.square().sum(2), (a * b).sum(2)
    slope = (bb - aa) / (2 * ab)
    tangent = torch.copysign(1 / (slope.abs() + (1 + slope.square()).sqrt()), slope)
    tangent = torch.where(ab.abs() > floor * aa.sqrt() * bb.sqrt(), tangent, 0)
    cosine = (1 + tangent.square()).rsqrt()[:, :, None]
    sine = cosine * tangent[:, :, None]
    return torch.addcmul(cosine * a, sine, b, value=-1), torch.addcmul(cosine * b, sine, a)
