"""How far a run in float32 or half precision may be from float64: from the dtype and the length of its sums.

An error of another path on the same numbers is no measure: it is one draw, and another processor draws another. A sum of
n rounded terms is off by about eps sqrt(n) of its size, and so is a chain of sums with n terms in all. Half precision
adds in float32, and rounds what it stores: eps of its own for each of these roundings.
"""

from __future__ import annotations

import numpy as np
import torch

STORED = 10  # results of a layer that are stored, one after the other


def sum_eps(dtype: torch.dtype) -> float:
    """The unit of what sums are kept in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def run_rounding(model, tokens: int) -> float:
    """The error of a hidden state or a logit over its size, after all layers of a Llama-like model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = head_dim + tokens + config.num_attention_heads * head_dim
    layer = 4 * config.hidden_size + attention + config.intermediate_size  # two norms, q k v, gate and up
    terms = config.num_hidden_layers * layer + 2 * config.hidden_size
    stored = config.num_hidden_layers * STORED + 2
    return torch.finfo(model.dtype).eps * stored**0.5 + sum_eps(model.dtype) * terms**0.5


@torch.no_grad()
def kl_bound(model, prompts, exact) -> np.ndarray:
    """For each score of `exact`, a KL in nats, as a scan of `model` in its own dtype gives it.

    KL moves by the ablated logits' errors times p_a - p_b, and by the base row's times p_b (log p_b / p_a - KL). Both
    are about sqrt(2 KL) at most, and the two errors are independent: sqrt(2) of one.
    """
    logits = [model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() for ids in prompts]
    size = max(float(x.pow(2).mean().sqrt()) for x in logits)
    error = size * run_rounding(model, max(map(len, prompts)))
    return 2 * np.sqrt(np.maximum(np.asarray(exact), 0)) * error + error**2


def angle_bound_deg(model, prompts, singular_values) -> float:
    """For angles between subspaces of rank 1: two bases, each turned by the error over the gap beside its value."""
    first, second = singular_values[:2]
    error = run_rounding(model, max(map(len, prompts))) * len(prompts) ** 0.5 * first
    return float(np.degrees(2 * error / (first - second)))
