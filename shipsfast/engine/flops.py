"""The arithmetic a scan is made of, and how fast a device does such arithmetic.

    FLOPs = sum over layers of rows alive x tokens x FLOPs of the layer per token
            (the last layer: keys and values everywhere, the rest at the prompts' ends) + the output head

Attention counts the keys each token really sees. A multiplication with its addition is two FLOPs; norms, rotary
embeddings and activations are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..models.anatomy import Anatomy
from ..ops.prefix_tree import PackedPrompts


@dataclass(frozen=True)
class LayerFlops:
    """keys_values, rest: per token, of the key and value projections and of all other weights; per_key: per query
    token and key that it sees, all heads together; window: sliding window in tokens."""

    keys_values: int
    rest: int
    per_key: int
    window: int | None = None


@dataclass(frozen=True)
class ModelFlops:
    """head: the output head, per row and prompt end; products: (inputs, outputs) of one layer's matrix products."""

    layers: tuple[LayerFlops, ...]
    head: int
    products: tuple[tuple[int, int], ...]


def model_flops(model: torch.nn.Module, anatomy: Anatomy) -> ModelFlops:
    """What the weights of a loaded model's layers cost per token. Experts count as many times as a token takes."""
    kv_width = 2 * anatomy.num_kv_heads * anatomy.head_dim
    layers = []
    for layer in anatomy.layers:
        total = 2 * sum(round(a * b * share) for a, b, share in _products(layer.module, model.config))
        keys_values = min(total, 2 * anatomy.hidden_size * kv_width)
        per_key = 4 * anatomy.num_heads * anatomy.head_dim
        layers.append(LayerFlops(keys_values, total - keys_values, per_key, layer.window))
    products = tuple((a, b) for a, b, _ in _products(anatomy.layers[0].module, model.config))
    return ModelFlops(tuple(layers), 2 * anatomy.hidden_size * anatomy.vocab_size, products)


def _products(layer: torch.nn.Module, config) -> list[tuple[int, int, float]]:
    """(inputs, outputs, how often a token passes it) of every weight matrix in a layer."""
    text = config.get_text_config()
    taken = getattr(text, "num_experts_per_tok", None) or 1
    out = []
    for module in layer.modules():
        # Quantised weights have other shapes.
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            out.append((module.in_features, module.out_features, 1.0))
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() == 2:
                out.append((*weight.shape, 1.0))
            elif weight.dim() == 3:  # [experts, ., .]
                out.append((*weight.shape[1:], float(min(taken, weight.shape[0]))))
    return out


def gated_model_flops(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocabulary: int,
    windows: Sequence[int | None] | None = None,
) -> ModelFlops:
    """The same from a shape: separate q, k, v and o projections, an MLP of gate, up and down."""
    q, kv = heads * head_dim, kv_heads * head_dim
    products = (
        (hidden, q), (hidden, kv), (hidden, kv), (q, hidden),
        (hidden, intermediate), (hidden, intermediate), (intermediate, hidden),
    )  # fmt: skip
    total, keys_values = 2 * sum(a * b for a, b in products), 4 * hidden * kv
    each = [
        LayerFlops(keys_values, total - keys_values, 4 * q, window) for window in windows or [None] * layers
    ]
    return ModelFlops(tuple(each), 2 * hidden * vocabulary, products)


def scan_flops(
    costs: ModelFlops,
    packs: Sequence[PackedPrompts],
    units: Sequence[tuple[int, int]],
    *,
    rows_per_block: int | None = None,
    head: bool = True,
) -> int:
    """FLOPs of a scan that switches off `units`, (layer, index) pairs, over groups of packed prompts.

    rows_per_block: as in the plan: the unablated row passes once per block; None for a single block, the least there
    is. head: whether logits are computed (a dataset-level scan needs none).
    """
    num_layers = len(costs.layers)
    blocks = -(-len(units) // (rows_per_block or max(1, len(units)))) if units else 1
    forks = np.bincount([layer for layer, _ in units], minlength=num_layers)
    alive = blocks + np.cumsum(forks)
    total = 0
    for packed in packs:
        ends = np.unique(packed.last_index)
        for index, (layer, rows) in enumerate(zip(costs.layers, alive.tolist(), strict=True)):
            last = index == num_layers - 1
            queries = packed.position[ends] if last else packed.position
            seen = np.minimum(queries + 1, layer.window or np.iinfo(np.int32).max)
            work = packed.num_tokens * layer.keys_values + len(queries) * layer.rest
            total += rows * (work + layer.per_key * int(seen.sum()))
        if head:
            total += int(alive[-1]) * len(ends) * costs.head
    return int(total)


@torch.inference_mode()
def gemm_flops_per_s(
    products: Sequence[tuple[int, int]],
    tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    repeats: int = 4,
    seconds: float | None = None,
) -> float:
    """FLOP/s of one layer's matrix products, alone, with `tokens` rows of input: the median of `repeats`.

    seconds: sustained instead, which is what a long run gets from a device that slows down at its power limit: the mean
    of the second half of so many seconds.
    """
    device = torch.device(device)
    inputs = {
        n: torch.randn(tokens, n, device=device).to(dtype) for n in sorted({inputs for inputs, _ in products})
    }
    weights = [torch.empty(b, a, dtype=dtype, device=device).normal_(std=0.02) for a, b in products]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def layer() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    flops = 2 * tokens * sum(a * b for a, b in products)
    layer()
    wait()
    start = time.perf_counter()
    layer()
    wait()
    # Long enough that the clock and the launch of a product do not count, also for tiny models.
    inner = max(1, min(100, int(0.02 / max(1e-6, time.perf_counter() - start))))
    times: list[float] = []
    while len(times) <= repeats if seconds is None else sum(times) * inner < seconds:
        start = time.perf_counter()
        for _ in range(inner):
            layer()
        wait()
        times.append((time.perf_counter() - start) / inner)
    if seconds is not None:
        return flops / statistics.mean(times[len(times) // 2 :])
    return flops / statistics.median(times[1:])
