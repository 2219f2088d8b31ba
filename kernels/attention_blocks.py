"""What the Triton attention kernels share: constants, the steps of their inner loop, and how they are launched.

Per block of keys, of scores s in powers of two:

    s = softcap * tanh(s)                                       capped
    m' = max(m, max s), p = 2^(s - m'), l' = l 2^(m - m') + sum p, acc' = acc 2^(m - m') + p v      with_block

(Milakov & Gimelshein, arXiv 1805.02867). Nothing of size queries x keys leaves the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shipsfast import replacements

LOG2E = tl.constexpr(1.4426950408889634)
# Start of the running maximum. Finite, so that a row which sees nothing of a block gets
# exp2(-inf - pivot) = 0 instead of exp2(-inf + inf) = NaN.
LOWEST = tl.constexpr(-3.0e38)
# Below this |x|, 1 - exp(-2|x|) cancels and tanh is taken from its series, whose next term is below 2**-24.
TANH_SERIES = tl.constexpr(0.3)
MIN_DOT_SIZE = 16
REPLACE_Q = tl.constexpr(replacements.REPLACE_Q)
REPLACE_K = tl.constexpr(replacements.REPLACE_K)
REPLACE_OUT = tl.constexpr(replacements.REPLACE_OUT)


@triton.jit
def capped(s, post_scale):
    """tanh(s) * post_scale; s [BLOCK_M, BLOCK_N]."""
    a = tl.abs(s)
    e = tl.exp2(a * (-2.0 * LOG2E))
    a2 = a * a
    series = a * (1.0 + a2 * (-1.0 / 3 + a2 * (2.0 / 15 + a2 * (-17.0 / 315 + a2 * (62.0 / 2835)))))
    tanh = tl.where(a < TANH_SERIES, series, (1.0 - e) / (1.0 + e))
    return tl.where(s < 0.0, -tanh, tanh) * post_scale


@triton.jit
def with_block(
    s, v_ptrs, mask_kv, row_max, row_sum, acc, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr
):
    """Running maximum and sum [BLOCK_M] and output [BLOCK_M, BLOCK_D] with a block of scores [BLOCK_M, BLOCK_N] more."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = tl.load(v_ptrs, mask=mask_kv, other=0.0)
    acc = tl.dot(p.to(DOT_DTYPE), v.to(DOT_DTYPE), acc, input_precision=INPUT_PRECISION)
    return new_max, row_sum, acc


# With TRITON_INTERPRET=1 at import, triton.jit gives another class, which runs on the CPU.
INTERPRETED = not isinstance(capped, triton.runtime.JITFunction)


def check_device(q: torch.Tensor) -> None:
    """Raises RuntimeError where a kernel cannot run."""
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"the Triton kernel needs a CUDA device and q is on {q.device}: use backend='reference', "
            "or set TRITON_INTERPRET=1 before the import to run it slowly on the CPU"
        )


def given_vectors(replace, q_alt, k_alt, out_alt, q: torch.Tensor) -> tuple[list, int | None]:
    """The pointers of the replacement, and the flags whose vectors were given."""
    if replace is None:
        return [None] * 4, None
    given = {REPLACE_Q.value: q_alt, REPLACE_K.value: k_alt, REPLACE_OUT.value: out_alt}
    # What was not given is never used, but its address must be one that can be read.
    pointers = [replace, *(q if x is None else x for x in given.values())]
    return pointers, sum(flag for flag, x in given.items() if x is not None)


def scales(scaling: float, softcap: float | None) -> tuple[float, float]:
    """What scores are multiplied by before and after `capped`, to be powers of two."""
    return (scaling / softcap, softcap * LOG2E.value) if softcap else (scaling * LOG2E.value, 1.0)


def options(q: torch.Tensor, config, softcap, window, replace, sink) -> dict:
    """The compile-time arguments that both kernels have."""
    dot_dtype = torch.float32 if INTERPRETED else q.dtype  # the interpreter's bfloat16 dot is wrong
    head_dim = q.shape[-1]
    return dict(
        D=head_dim,
        BLOCK_N=config.block_n,
        BLOCK_D=max(MIN_DOT_SIZE, triton.next_power_of_2(head_dim)),
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_REPLACE=replace is not None,
        HAS_SINK=sink is not None,
        DOT_DTYPE=getattr(tl, str(dot_dtype).removeprefix("torch.")),
        INPUT_PRECISION=config.input_precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        enable_fp_fusion=True,  # the default changes after triton 3.9
    )
