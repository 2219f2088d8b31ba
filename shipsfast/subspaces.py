"""Principal angles between the leading left singular subspaces of many matrices and that of one.

X [P, d] holds one hidden state per prompt, U its left singular vectors. Dataset-level Ships (arXiv 2410.13708,
eq. 11) is the sum of the r principal angles between span(U_base[:, :r]) and span(U_ablated[:, :r]), in degrees.

All N matrices go through batched calls on their device: products to the Gram matrix X X^T [P, P] (or X^T X
[d, d] where P > d), one batched eigendecomposition, and singular values of [P, r] and [r, r] matrices. With
n = min(P, d) that is N (2 P d n + O(n^3)) operations in float64, and 8 N n^2 bytes, cut into batches of at most
SCRATCH_BYTES.
"""

from __future__ import annotations

import torch

from .errors import InputError

SCRATCH_BYTES = 256 << 20


def leading_subspace(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors: x [N, P, d] -> float64 [N, P, rank], orthonormal columns."""
    x = x.double()
    prompts, width = x.shape[1:]
    if prompts <= width:
        _, vectors = torch.linalg.eigh(_unit(x @ x.transpose(1, 2)))
        return vectors[:, :, -rank:].flip(2)
    _, vectors = torch.linalg.eigh(_unit(x.transpose(1, 2) @ x))
    # X v is sigma u; an orthonormal basis of their span is all that angles need.
    basis, _ = torch.linalg.qr(x @ vectors[:, :, -rank:].flip(2))
    return basis


def _unit(gram: torch.Tensor) -> torch.Tensor:
    """Scaled to trace 1, so that nothing depends on the size of the hidden states."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return gram / torch.where(trace == 0, 1, trace)


def principal_angles(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Principal angles in degrees, float64 [N, r]; base [P, r], other [N, P, r], orthonormal columns.

    Cosines are the singular values of base^T other, sines those of other - base base^T other. Each angle comes
    from whichever is smaller, as in Knyazev & Argentati 2002 (and scipy.linalg.subspace_angles): the cosine is
    blind to small angles, the sine to those near 90 degrees.
    """
    overlap = base.T @ other  # [N, r, r]
    cosine = torch.linalg.svdvals(overlap).clamp(max=1)  # falling, so angles rise
    residual = other - base @ overlap
    residual = residual - base @ (base.T @ residual)  # once more: the first product leaves rounding along base
    sine = torch.linalg.svdvals(residual).clamp(max=1).flip(1)  # rising
    small = cosine.square() >= 0.5
    return torch.rad2deg(torch.where(small, torch.asin(sine), torch.acos(cosine)))


def subspace_angle_deg(base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Dataset-level Ships of N matrices: base [P, r] (from `leading_subspace`), x [N, P, d] -> float64 [N], degrees."""
    rank = base.shape[1]
    n = min(x.shape[1:])
    step = max(1, SCRATCH_BYTES // (8 * (3 * n * n + 2 * x.shape[1] * x.shape[2])))
    parts = [
        principal_angles(base, leading_subspace(part, rank)).sum(1) for part in x.split(step)
    ]
    return torch.cat(parts)


def check_rank(rank: int, num_prompts: int, width: int) -> None:
    """Raises InputError for a rank that P prompts of a hidden size cannot have."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank must be a whole number of at least 1, got {rank!r}")
    if rank > num_prompts:
        raise InputError(
            f"rank {rank} needs at least {rank} prompts, and there are {num_prompts}: lower the rank or add prompts"
        )
    if rank > width:
        raise InputError(f"rank {rank} is above the model's hidden size of {width}: lower it")


def singular_values(x: torch.Tensor) -> torch.Tensor:
    """Singular values of one matrix [P, d], falling, float64."""
    return torch.linalg.svdvals(x.double())
