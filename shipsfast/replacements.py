"""What of a head may come from elsewhere: the bits of `replace`, as every attention backend takes them."""

from __future__ import annotations

import torch

# Bits of `replace`: what of a query head is taken from elsewhere.
REPLACE_Q = 1
REPLACE_K = 2
REPLACE_OUT = 4


def require_replacements(
    replace: torch.Tensor,
    q_alt: torch.Tensor | None,
    k_alt: torch.Tensor | None,
    out_alt: torch.Tensor | None,
) -> None:
    """Raises ValueError if `replace` has a flag whose vectors are None, or one that means nothing.

    It looks at the flags, so on a GPU it waits for them.
    """
    flags = set(replace.unique().tolist())
    for flag, name, given in (
        (REPLACE_Q, "q_alt", q_alt),
        (REPLACE_K, "k_alt", k_alt),
        (REPLACE_OUT, "out_alt", out_alt),
    ):
        if given is None and any(value & flag for value in flags):
            raise ValueError(f"replace has heads flagged {flag}, and {name} is None: pass {name}")
    unknown = sorted(value for value in flags if value & ~(REPLACE_Q | REPLACE_K | REPLACE_OUT))
    if unknown:
        raise ValueError(
            f"replace must be sums of {REPLACE_Q}, {REPLACE_K} and {REPLACE_OUT}, got {unknown[0]}"
        )
