"""The tolerance rule of the attention kernels, in one place.

Per row and head: the output is finite, and its largest error against the float64 oracle is at most twice
that of plain torch in the same dtype, plus a floor. The floor is one unit in the last place of the head's
largest output: results are stored in the input dtype, and the Triton interpreter truncates to bfloat16
where the GPU rounds, so half a unit would blame the kernel for the interpreter.
"""

from __future__ import annotations

import torch

from shipsfast import reference

FACTOR = 2.0
FLOOR_ULPS = 1.0


def oracle(q, k, v, logit_scale, output_scale, position, subtree_end, **options) -> torch.Tensor:
    """shipsfast.reference.tree_attention in float64, from the same rounded inputs."""
    wide = [x.double() for x in (q, k, v, logit_scale, output_scale)]
    return reference.tree_attention(*wide, position, subtree_end, **options)


def assert_close_per_head(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """actual, plain: [B, TQ, H, D] in one dtype; exact: the same in float64."""
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all(), "the output has NaN or infinite elements"
    per_head = lambda x: x.abs().amax(dim=(1, 3))
    error, plain_error = per_head(actual.double() - exact), per_head(plain.double() - exact)
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * per_head(exact)
    bound = FACTOR * plain_error + floor
    bad = error > bound
    assert not bad.any(), "\n".join(
        f"row {b} head {h}: error {error[b, h]:.3e} is more than {FACTOR} x {plain_error[b, h]:.3e} "
        f"(plain torch) + {floor[b, h]:.3e} (floor)"
        for b, h in bad.nonzero().tolist()[:8]
    )
