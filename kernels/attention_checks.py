"""What the Triton tree attention refuses, before anything is launched and without waiting for the GPU.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch

from shipsfast.reference import require_replacements

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_arguments(
    q, k, v, logit_scale, output_scale, position, subtree_end, query_index, softcap, window
) -> None:
    """The arguments of every call. Raises TypeError for a dtype, ValueError for anything else."""
    if q.dtype not in DTYPES:
        raise TypeError(
            f"the Triton kernel takes bfloat16, float16 and float32, not {q.dtype}: use backend='reference'"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}: cast them")
    for name, x in (("logit_scale", logit_scale), ("output_scale", output_scale)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {x.dtype}: call .float() on it")
        if x.shape != logit_scale.shape or x.dim() != 2:
            raise ValueError(f"logit_scale and output_scale must both be [B, H], got {name} {tuple(x.shape)}")
    rows, heads = logit_scale.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] not in (1, rows):
            raise ValueError(f"{name} must be [{rows} or 1, heads, tokens, D], got {tuple(x.shape)}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(
                f"q, k and v must have one head size, got {q.shape[3]} in q and {x.shape[3]} in {name}: "
                "use backend='reference'"
            )
        _check_last_dimension(name, x)
    if q.shape[1] != heads or k.shape[1:] != v.shape[1:] or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"the heads do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mask vectors "
            f"{tuple(logit_scale.shape)}; q must have as many as the mask vectors, k and v a divisor of that"
        )
    tree = [("position", position, k.shape[2]), ("subtree_end", subtree_end, k.shape[2])]
    if query_index is not None:
        tree.append(("query_index", query_index, q.shape[2]))
    elif q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: pass query_index, the packed index of each query"
        )
    for name, x, size in tree:
        if x.dtype != torch.int32 or x.shape != (size,) or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 [{size}], got {x.dtype} {tuple(x.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}: pass None for no softcap")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}: pass None for no window")
    if any(x.device != q.device for x in (k, v, logit_scale, output_scale, position, subtree_end)):
        raise ValueError(f"all tensors must be on {q.device}, where q is")


def check_replacements(replace, q_alt, k_alt, out_alt, q, k, logit_scale) -> None:
    """The replacements of a call whose other arguments passed. Raises as `check_arguments` does.

    Whether the flags have their vectors is looked at only where that waits for nothing, on a CPU.
    """
    rows, heads = logit_scale.shape
    if replace.dtype != torch.int8:
        raise TypeError(f"replace must be int8, got {replace.dtype}: call .to(torch.int8) on it")
    if replace.shape != logit_scale.shape:
        raise ValueError(f"replace must be [{rows}, {heads}], got {tuple(replace.shape)}")
    if replace.device != q.device:
        raise ValueError(f"replace must be on {q.device}, where q is, got {replace.device}")
    for name, x, first, tokens in (
        ("q_alt", q_alt, rows, (q.shape[2],)),
        ("k_alt", k_alt, rows, (k.shape[2],)),
        ("out_alt", out_alt, heads, (1, q.shape[2])),
    ):
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype}, as q is, got {x.dtype}: cast it")
        if (
            x.dim() != 3
            or x.shape[0] not in (1, first)
            or x.shape[1] not in tokens
            or x.shape[2] != q.shape[3]
        ):
            size = " or ".join(map(str, tokens))
            raise ValueError(f"{name} must be [{first} or 1, {size}, {q.shape[3]}], got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, where q is, got {x.device}")
        _check_last_dimension(name, x)
    if replace.device.type == "cpu":
        require_replacements(replace, q_alt, k_alt, out_alt)


def _check_last_dimension(name: str, x: torch.Tensor) -> None:
    if x.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous: call .contiguous() on it")
