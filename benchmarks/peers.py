"""The same scan done the ways others do it, each at its best, on plain transformers.

All return KL(base || ablated) in nats, float64 [L, H, P], of undifferentiated attention with eps = 1e-5,
for prompts of equal length (nothing is padded, which flatters the peers). A Llama's query projection is
linear up to the logits, so its output is what is scaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaForCausalLM

EPS = 1e-5


def kl_nats(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of logits [..., V] in float32, as peers compute it."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(other.float(), -1),
        torch.log_softmax(base.float(), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)


@contextlib.contextmanager
def hooked(module: torch.nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def scale_head(head: int, size: int) -> Callable:
    def hook(_module, _args, out):
        out = out.clone()
        out[..., head * size : (head + 1) * size] *= EPS
        return out

    return hook


@torch.inference_mode()
def hooks_batched(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """One forward pass per head, all prompts in one batch, a forward hook on q_proj."""
    layers, heads, size = _shape(model)
    out = torch.empty(layers, heads, len(ids), dtype=torch.float64)
    base = _next(model, ids)
    for i in range(layers):
        for h in range(heads):
            with hooked(model.model.layers[i].self_attn.q_proj, scale_head(h, size)):
                out[i, h] = kl_nats(base, _next(model, ids))
    return out


@torch.inference_mode()
def row_masks(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """One forward pass per layer: heads x prompts rows, each row with its own head scaled by one hook."""
    layers, heads, size = _shape(model)
    out = torch.empty(layers, heads, len(ids), dtype=torch.float64)
    base = _next(model, ids)
    rows = ids.repeat(heads, 1)  # head-major
    mask = torch.ones(heads, len(ids), 1, heads, 1)
    mask[torch.arange(heads), :, :, torch.arange(heads)] = EPS
    mask = mask.flatten(0, 1).to(base.dtype)

    def hook(_module, _args, out):
        return (out.unflatten(-1, (heads, size)) * mask).flatten(-2)

    for i in range(layers):
        with hooked(model.model.layers[i].self_attn.q_proj, hook):
            logits = _next(model, rows).unflatten(0, (heads, len(ids)))
        out[i] = kl_nats(base[None].expand_as(logits), logits)
    return out


@torch.inference_mode()
def skip_lower_layers(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """One pass per head through the layers from its own upwards, on the base run's cached hidden states.

    What nnsight's `.skip()` and HookedTransformer's `start_at_layer` do, without their overhead.
    """
    layers, heads, size = _shape(model)
    decoder = model.model
    out = torch.empty(layers, heads, len(ids), dtype=torch.float64)
    hidden = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    position_ids = torch.arange(ids.shape[1])[None]
    rotary = decoder.rotary_emb(hidden[0], position_ids)

    def upwards(x: torch.Tensor, start: int) -> torch.Tensor:
        for layer in decoder.layers[start:]:
            x = layer(x, attention_mask=None, position_embeddings=rotary, position_ids=position_ids)
        return model.lm_head(decoder.norm(x[:, -1]))

    base = upwards(hidden[0], 0)
    for i in range(layers):
        for h in range(heads):
            with hooked(decoder.layers[i].self_attn.q_proj, scale_head(h, size)):
                out[i, h] = kl_nats(base, upwards(hidden[i], i))
    return out


@torch.inference_mode()
def one_at_a_time(
    model: LlamaForCausalLM, ids: torch.Tensor, heads_per_layer: int | None = None
) -> torch.Tensor:
    """The loop of the paper's published code: one prompt and one head per forward pass, eager attention, a
    key/value cache built in each, logits of every position. Heads beyond `heads_per_layer` stay NaN."""
    layers, heads, size = _shape(model)
    out = torch.full((layers, heads, len(ids)), float("nan"), dtype=torch.float64)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for p, prompt in enumerate(ids[:, None]):
            base = model(prompt, use_cache=True).logits[:, -1]
            for i in range(layers):
                for h in range(heads if heads_per_layer is None else heads_per_layer):
                    with hooked(model.model.layers[i].self_attn.q_proj, scale_head(h, size)):
                        out[i, h, p] = kl_nats(base, model(prompt, use_cache=True).logits[:, -1])[0]
    finally:
        model.set_attn_implementation(before)
    return out


def _next(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def _shape(model: LlamaForCausalLM) -> tuple[int, int, int]:
    config = model.config
    return config.num_hidden_layers, config.num_attention_heads, config.head_dim
