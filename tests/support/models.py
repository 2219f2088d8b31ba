"""Tiny random models of many families, and the brute-force scan they are checked against."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask

VOCAB = 61
LAYERS, HEADS = 3, 4
_COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GQA = _COMMON | dict(num_key_value_heads=2)
_WINDOW = dict(sliding_window=4)

FAMILIES = {
    "llama-mha": LlamaConfig(**_COMMON),
    "llama-gqa": LlamaConfig(**_GQA),
    "llama-mqa": LlamaConfig(**(_COMMON | dict(num_key_value_heads=1))),
    "mistral-window": MistralConfig(**_GQA, **_WINDOW),
    "qwen2-gqa": Qwen2Config(**_GQA),
    "qwen3-qknorm": Qwen3Config(**_GQA, head_dim=8),
    "gemma2-softcap-window": Gemma2Config(**_GQA, **_WINDOW, head_dim=8, attn_logit_softcapping=2.0),
    "gemma3-qknorm-window": Gemma3TextConfig(
        **_GQA, **_WINDOW, head_dim=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3-fused-window": Phi3Config(**_GQA, **_WINDOW),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


def build(family: str = "llama-gqa", dtype: torch.dtype = torch.float64, seed: int = 0, **more):
    """A model whose attention is far from uniform, so that ablations show. more: of its configuration."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in more.items():
        setattr(config, name, value)
    # transformers up to 5.13 or so gives Gemma 2 an attention that leaves the softcap out, unless told.
    how = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases, and weights of norms, which would be 0 and 1
                parameter += torch.empty_like(parameter).normal_(std=0.1)
    return model.eval()


# What one ablated head sees: set by `brute_force`, read by `_oracle_attention`.
_target: dict = {}


def _oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_kwargs):
    """Attention by its definition, one softmax over dense logits, with one head of one module ablated."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = query @ key.transpose(2, 3) * scaling
    here = _target.get("module") is module
    if here:
        logits[:, _target["head"]] *= _target["logit_scale"]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    out = torch.softmax(logits, -1) @ value
    if here:
        out[:, _target["head"]] *= _target["output_scale"]
    return out.transpose(1, 2).contiguous(), None


SCALES = {
    "undifferentiated": lambda eps: (eps, 1.0),
    "uniform": lambda eps: (0.0, 1.0),
    "scale": lambda eps: (1.0, eps),
    "zero": lambda eps: (1.0, 0.0),
}


@torch.no_grad()
def brute_force(model, prompts, ablation="undifferentiated", eps=1e-5) -> torch.Tensor:
    """Ships by its definition: one ablation, one prompt, one forward pass each. float64 [P, L, H]."""
    AttentionInterface.register("test_oracle", _oracle_attention)
    AttentionMaskInterface.register("test_oracle", eager_mask)
    before = model.config._attn_implementation
    attention = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    assert len(attention) == LAYERS
    _target["logit_scale"], _target["output_scale"] = SCALES[ablation](eps)
    out = torch.zeros(len(prompts), LAYERS, HEADS, dtype=torch.float64)
    model.set_attn_implementation("test_oracle")
    try:
        for p, ids in enumerate(prompts):
            base = next_log_probs(model, ids)
            for layer, module in enumerate(attention):
                for head in range(HEADS):
                    _target.update(module=module, head=head)
                    other = next_log_probs(model, ids)
                    _target["module"] = None
                    out[p, layer, head] = (base.exp() * (base - other)).sum()
    finally:
        _target.clear()
        model.set_attn_implementation(before)
    return out


def next_log_probs(model, ids) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].double(), -1)
