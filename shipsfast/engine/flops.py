"""The arithmetic a scan is made of, and how fast a device does such arithmetic.

    FLOPs = sum over layers of rows alive x tokens x FLOPs of the layer per token
            (the last layer: keys and values everywhere, the rest at the prompts' ends) + the output head

Attention counts the keys each token really sees. A multiplication with its addition is two FLOPs; norms, rotary
embeddings and activations are not counted. In fused layers a row that forks does not pass the layer in full: it takes
the base row's queries, keys and values, and what follows from the change of its own heads (fused_layer.py,
forked_rows.py). That is counted as it is done.

With an ablation at the end only, a row has as many tokens as the tree is read at, and the unablated one passes beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..models.anatomy import Anatomy
from ..ops.prefix_tree import PackedPrompts
from .forked_rows import pays


@dataclass(frozen=True)
class FusedForks:
    """Of a layer of form fused_layer.py. rank: numbers of the heads that a fork adds, R; gate_up, down: outputs of gate and
    up together, and inputs of down; second_norm: one stands between the output projection and the residual stream."""

    hidden: int
    rank: int
    gate_up: int
    down: int
    second_norm: bool
    dtype: torch.dtype

    def flops(self, tokens: int, forks: int) -> int:
        """Of `forks` rows with `tokens` tokens that are read, without attention."""
        wide = tokens * self.hidden
        if pays(tokens, self.hidden, self.rank, forks, second_norm=self.second_norm, dtype=self.dtype):
            products = forks * self.rank * (self.hidden + tokens) + self.second_norm * wide
        else:
            products = forks * wide
        return 2 * (forks * wide * (self.rank + self.down) + products * self.gate_up)


@dataclass(frozen=True)
class LayerFlops:
    """keys_values, rest: per token, of the key and value projections and of all other weights; per_key: per query
    token and key that it sees, all heads together; window: sliding window in tokens; forks: how rows that fork pass, None if
    as all others do."""

    keys_values: int
    rest: int
    per_key: int
    window: int | None = None
    forks: FusedForks | None = None


@dataclass(frozen=True)
class ModelFlops:
    """head: the output head, per row and prompt end; products: (inputs, outputs) of one layer's matrix products."""

    layers: tuple[LayerFlops, ...]
    head: int
    products: tuple[tuple[int, int], ...]

    def up_to(self, layers: int) -> ModelFlops:
        """Of a pass that ends behind so many layers, at the tokens that are read, and needs no logits."""
        return replace(self, layers=self.layers[:layers], head=0)


def model_flops(
    model: torch.nn.Module, anatomy: Anatomy, *, fused: bool = False, unit_heads: int = 1
) -> ModelFlops:
    """What the weights of a loaded model's layers cost per token. Experts count as many times as a token takes.

    fused: rows pass the layers by fused_layer.py, which must be able to; unit_heads: query heads that a fork adds.
    """
    kv_width = 2 * anatomy.num_kv_heads * anatomy.head_dim
    layers = []
    for layer in anatomy.layers:
        total = 2 * sum(round(a * b * share) for a, b, share in _products(layer.module, model.config))
        keys_values = min(total, 2 * anatomy.hidden_size * kv_width)
        per_key = 4 * anatomy.num_heads * anatomy.head_dim
        forks = None
        if fused:
            mlp = layer.module.mlp
            forks = FusedForks(
                anatomy.hidden_size, unit_heads * anatomy.head_dim, 2 * mlp.gate_proj.out_features,
                mlp.down_proj.in_features, hasattr(layer.module, "pre_feedforward_layernorm"), model.dtype,
            )  # fmt: skip
        layers.append(LayerFlops(keys_values, total - keys_values, per_key, layer.window, forks))
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
    fused: bool = False,
    second_norm: bool = False,
) -> ModelFlops:
    """The same from a shape: separate q, k, v and o projections, an MLP of gate, up and down.

    fused, and if so second_norm: as in `model_flops` and `FusedForks`, for one head switched off at a time in a model that is
    not in float64.
    """
    q, kv = heads * head_dim, kv_heads * head_dim
    products = (
        (hidden, q), (hidden, kv), (hidden, kv), (q, hidden),
        (hidden, intermediate), (hidden, intermediate), (intermediate, hidden),
    )  # fmt: skip
    total, keys_values = 2 * sum(a * b for a, b in products), 4 * hidden * kv
    forks = None
    if fused:
        forks = FusedForks(hidden, head_dim, 2 * intermediate, intermediate, second_norm, torch.float32)
    each = [
        LayerFlops(keys_values, total - keys_values, 4 * q, window, forks)
        for window in windows or [None] * layers
    ]
    return ModelFlops(tuple(each), 2 * hidden * vocabulary, products)


def scan_flops(
    costs: ModelFlops,
    packs: Sequence[PackedPrompts],
    units: Sequence[tuple[int, int]],
    *,
    blocks: Sequence[Sequence[tuple[int, int]]] | None = None,
    head: bool = True,
    ends_alone: bool = False,
) -> int:
    """FLOPs of a scan that switches off `units`, (layer, index) pairs, over groups of packed prompts.

    blocks: the units as a plan cuts them: the unablated row passes once per block; None for a single block, the least there
    is. head: whether logits are computed (a dataset-level scan needs none). ends_alone: rows are as wide as there are reads.
    """
    num_layers = len(costs.layers)
    # [blocks, layers]: rows that fork, and all that are alive then
    forks = np.stack(
        [np.bincount([layer for layer, _ in block], minlength=num_layers) for block in blocks or [units]]
    )
    alive = 1 + np.cumsum(forks, 1)
    total = 0
    for packed in packs:
        ends = np.unique(packed.read_index)
        for index, layer in enumerate(costs.layers):
            last = index == num_layers - 1
            window = layer.window or np.iinfo(np.int32).max
            queries = packed.position[ends] if last or ends_alone else packed.position
            seen = int(np.minimum(queries + 1, window).sum())
            tokens = packed.num_tokens
            if ends_alone:
                of_all = 0 if last else int(np.minimum(packed.position + 1, window).sum())
                base = tokens * (layer.keys_values + (not last) * layer.rest) + layer.per_key * of_all
                total += len(alive) * base
                tokens = len(ends)
            work = tokens * layer.keys_values + len(queries) * layer.rest + layer.per_key * seen
            if layer.forks is None:
                total += int(alive[:, index].sum()) * work
                continue
            total += int((alive - forks)[:, index].sum()) * work
            for new in forks[:, index].tolist():
                # All heads off in one row gives every fork's change in attention.
                total += layer.forks.flops(len(queries), new) + (new > 0) * layer.per_key * seen
        if head:
            total += int(alive[:, -1].sum()) * len(ends) * costs.head
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
