"""The work of a scan in floating-point operations, and the rate at which a device does such work.

    FLOPs = sum over blocks and layers of rows alive x (T x the layer's matrix products + attention) + the head

A multiplication and an addition are two. The last layer has keys and values of every token, and the rest at the prompts'
ends only. Attention is counted with the keys that each token sees. Nothing is counted for what is no product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from .ablation import Head
from .anatomy import Anatomy, Layer
from .packing import PackedPrompts
from .planner import even_slices

LARGEST_BYTES = 64 << 20  # of a matrix whose rate is measured: larger ones are cut, their rate is the same
SECONDS = 1.0


def active_share(config) -> float:
    """The share of a layer's experts that a token passes, 1 without experts."""
    text = config.get_text_config()
    count = next(
        (
            n
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (n := getattr(text, name, None))
        ),
        None,
    )
    used = getattr(text, "num_experts_per_tok", None)
    return 1.0 if not count or not used else min(1.0, used / count)


def layer_products(layer: Layer, share: float) -> float:
    """FLOPs per token of a layer's matrix products; share: of the experts that a token passes."""
    total = 0.0
    for p in layer.module.parameters():
        if p.dim() >= 2:
            total += 2 * p.numel() * (share if p.dim() > 2 else 1.0)
    return total


def scan_flops(
    anatomy: Anatomy,
    packs: Sequence[PackedPrompts],
    units: Sequence[Head],
    rows_per_block: int,
    share: float = 1.0,
) -> float:
    """Of one scan of `units`, cut into blocks, over these packs."""
    products = [layer_products(layer, share) for layer in anatomy.layers]
    return sum(
        block_flops(anatomy, products, packed, units[part])
        for packed in packs
        for part in even_slices(len(units), rows_per_block)
    )


def block_flops(
    anatomy: Anatomy, products: list[float], packed: PackedPrompts, units: Sequence[Head]
) -> float:
    tokens, last = packed.num_tokens, sorted(set(packed.last_index.tolist()))
    width = 4 * anatomy.num_heads * anatomy.head_dim  # q k^T and the weighted sum of v, per key that is seen
    keys_values = 4 * anatomy.hidden_size * anatomy.num_kv_heads * anatomy.head_dim
    alive = 1 + np.cumsum(
        np.bincount(np.array([at for at, _ in units], dtype=int), minlength=anatomy.num_layers)
    )
    total, rows = 0.0, 1
    for index, layer in enumerate(anatomy.layers):
        rows = int(alive[index])
        seen = packed.position.astype("int64") + 1
        if layer.window is not None:
            seen = seen.clip(max=layer.window)
        if index < anatomy.num_layers - 1:
            total += rows * (tokens * products[index] + width * int(seen.sum()))
        else:
            rest = max(0.0, products[index] - keys_values)
            total += rows * (tokens * keys_values + len(last) * rest + width * int(seen[last].sum()))
    return total + rows * len(last) * 2 * anatomy.hidden_size * anatomy.vocab_size


@torch.inference_mode()
def products_per_s(anatomy: Anatomy, chunk_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the matrix products of the first layer at the chunk's size, measured in about a second."""
    matrices = [tuple(p.shape[-2:]) for p in anatomy.layers[0].module.parameters() if p.dim() >= 2]
    size = torch.empty((), dtype=dtype).element_size()
    most = max(1, LARGEST_BYTES // size)
    shapes = [(min(a, max(1, most // b)), b) if a * b > most else (a, b) for a, b in matrices]
    pairs = [
        (
            torch.randn(min(chunk_tokens, 16384), b, device=device).to(dtype),
            torch.randn(a, b, device=device).to(dtype),
        )
        for a, b in dict.fromkeys(shapes)
    ]

    def once() -> float:
        start = time.perf_counter()
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    taken, began = [once()], time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        taken.append(once())
    work = sum(2.0 * len(x) * w.numel() for x, w in pairs)
    return work / statistics.median(taken)
