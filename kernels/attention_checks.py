"""What the Triton attention kernels refuse, before anything is launched and without waiting for the GPU.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch

from shipsfast.replacements import require_replacements

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_arguments(
    q, k, v, logit_scale, output_scale, position, subtree_end, query_index, softcap, window
) -> None:
    """The arguments of every call of tree_attention. Raises TypeError for a dtype, ValueError for anything else."""
    tensors = {"q": q, "k": k, "v": v}
    _check_dtypes(tensors)
    _check_mask_vectors(logit_scale, output_scale, "[B, H]")
    rows, heads = logit_scale.shape
    for name, x in tensors.items():
        if x.dim() != 4 or x.shape[0] not in (1, rows):
            raise ValueError(f"{name} must be [{rows} or 1, heads, tokens, D], got {tuple(x.shape)}")
    _check_head_sizes(tensors)
    if q.shape[1] != heads or k.shape[1:] != v.shape[1:] or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"the heads do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mask vectors "
            f"{tuple(logit_scale.shape)}; q must have as many as the mask vectors, k and v a divisor of that"
        )
    if query_index is None and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: pass query_index, the packed index of each query"
        )
    _check_int32("position", position, k.shape[2])
    _check_int32("subtree_end", subtree_end, k.shape[2])
    if query_index is not None:
        _check_int32("query_index", query_index, q.shape[2])
    _check_softcap_and_window(softcap, window)
    _check_devices(q, k, v, logit_scale, output_scale, position, subtree_end)


def check_replacements(replace, q_alt, k_alt, out_alt, q, k, logit_scale) -> None:
    """The replacements of a call whose other arguments passed. Raises as `check_arguments` does.

    Whether the flags have their vectors is looked at only where that waits for nothing, on a CPU.
    """
    rows, heads = logit_scale.shape
    num_queries, head_dim = q.shape[2:]
    shapes = {
        "q_alt": (q_alt, ((rows, 1), (num_queries,), (head_dim,))),
        "k_alt": (k_alt, ((rows, 1), (k.shape[2],), (head_dim,))),
        "out_alt": (out_alt, ((heads, 1), (1, num_queries), (head_dim,))),
    }
    _check_flags_and_vectors(replace, shapes, q, logit_scale)


def check_decode_arguments(
    q, k_cache, v_cache, slot, length, logit_scale, output_scale, softcap, window
) -> None:
    """The arguments of every call of decode_attention. Raises as `check_arguments` does.

    Whether slots and lengths are in range is looked at only where that waits for nothing, on a CPU.
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    _check_dtypes(tensors)
    _check_mask_vectors(logit_scale, output_scale, "[N, H]")
    entries, heads = logit_scale.shape
    if q.dim() != 3 or q.shape[:2] != logit_scale.shape:
        raise ValueError(f"q must be [{entries}, {heads}, D], got {tuple(q.shape)}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [slots, key/value heads, positions, D], got {tuple(x.shape)}")
    _check_head_sizes(tensors)
    slots, kv_heads, positions = k_cache.shape[:3]
    if k_cache.shape != v_cache.shape or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the caches do not fit: k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, {heads} query "
            "heads; the caches must have one shape, and a number of heads that divides that of the queries"
        )
    _check_int32("slot", slot, entries)
    _check_int32("length", length, entries)
    _check_softcap_and_window(softcap, window)
    _check_devices(q, k_cache, v_cache, slot, length, logit_scale, output_scale)
    if q.device.type == "cpu":
        _check_range("slot", slot, 0, slots - 1)
        _check_range("length", length, 1, positions)


def check_decode_replacements(replace, q_alt, k_alt, out_alt, q, k_cache, logit_scale) -> None:
    """`check_replacements` for decode_attention."""
    entries, heads, head_dim = q.shape
    slots, _, positions, _ = k_cache.shape
    shapes = {
        "q_alt": (q_alt, ((entries, 1), (head_dim,))),
        "k_alt": (k_alt, ((slots,), (positions,), (head_dim,))),
        "out_alt": (out_alt, ((heads, 1), (head_dim,))),
    }
    _check_flags_and_vectors(replace, shapes, q, logit_scale)


def check_sink(sink: torch.Tensor | None, q: torch.Tensor, logit_scale: torch.Tensor) -> None:
    """The sinks of a call, after its other arguments."""
    if sink is None:
        return
    if sink.dtype != torch.float32:
        raise TypeError(f"sink must be float32, got {sink.dtype}: call .float() on it")
    if sink.shape != logit_scale.shape[1:] or not sink.is_contiguous():
        raise ValueError(f"sink must be contiguous {list(logit_scale.shape[1:])}, got {tuple(sink.shape)}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on {q.device}, where q is, got {sink.device}")


def _check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    dtypes = [x.dtype for x in tensors.values()]
    if dtypes[0] not in DTYPES:
        raise TypeError(
            f"the Triton kernel takes bfloat16, float16 and float32, not {dtypes[0]}: use backend='reference'"
        )
    if len(set(dtypes)) > 1:
        raise TypeError(f"{_listed(tensors)} must have one dtype, got {_listed(dtypes)}: cast them")


def _check_mask_vectors(logit_scale: torch.Tensor, output_scale: torch.Tensor, shape: str) -> None:
    for name, x in (("logit_scale", logit_scale), ("output_scale", output_scale)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {x.dtype}: call .float() on it")
        if x.shape != logit_scale.shape or x.dim() != 2:
            raise ValueError(
                f"logit_scale and output_scale must both be {shape}, got {name} {tuple(x.shape)}"
            )


def _check_head_sizes(tensors: dict[str, torch.Tensor]) -> None:
    """One head size, in a contiguous last dimension."""
    head_dim = tensors["q"].shape[-1]
    for name, x in tensors.items():
        if x.shape[-1] != head_dim:
            raise ValueError(
                f"{_listed(tensors)} must have one head size, got {head_dim} in q and {x.shape[-1]} in {name}: "
                "use backend='reference'"
            )
        _check_last_dimension(name, x)


def _check_int32(name: str, x: torch.Tensor, size: int) -> None:
    if x.dtype != torch.int32 or x.shape != (size,) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 [{size}], got {x.dtype} {tuple(x.shape)}")


def _check_range(name: str, x: torch.Tensor, low: int, high: int) -> None:
    wrong = x[(x < low) | (x > high)].tolist()
    if wrong:
        raise ValueError(f"{name} must be between {low} and {high}, got {wrong[0]}")


def _check_softcap_and_window(softcap: float | None, window: int | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}: pass None for no softcap")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}: pass None for no window")


def _check_devices(q: torch.Tensor, *others: torch.Tensor) -> None:
    if any(x.device != q.device for x in others):
        raise ValueError(f"all tensors must be on {q.device}, where q is")


def _check_flags_and_vectors(replace: torch.Tensor, shapes: dict, q: torch.Tensor, logit_scale) -> None:
    """shapes: name -> (vectors or None, the sizes that each dimension may have)."""
    if replace.dtype != torch.int8:
        raise TypeError(f"replace must be int8, got {replace.dtype}: call .to(torch.int8) on it")
    if replace.shape != logit_scale.shape:
        raise ValueError(f"replace must be {list(logit_scale.shape)}, got {tuple(replace.shape)}")
    if replace.device != q.device:
        raise ValueError(f"replace must be on {q.device}, where q is, got {replace.device}")
    for name, (x, sizes) in shapes.items():
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype}, as q is, got {x.dtype}: cast it")
        if x.dim() != len(sizes) or any(
            size not in allowed for size, allowed in zip(x.shape, sizes, strict=True)
        ):
            wanted = ", ".join(" or ".join(map(str, dict.fromkeys(allowed))) for allowed in sizes)
            raise ValueError(f"{name} must be [{wanted}], got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, where q is, got {x.device}")
        _check_last_dimension(name, x)
    if replace.device.type == "cpu":
        require_replacements(replace, *(x for x, _ in shapes.values()))


def _check_last_dimension(name: str, x: torch.Tensor) -> None:
    if x.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous: call .contiguous() on it")


def _listed(names) -> str:
    """As in: a, b and c."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}"
