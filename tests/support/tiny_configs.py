"""Tiny models of every architecture of the installed transformers: its own configuration class, with sizes cut down.

A configuration is built from the names of its fields: SMALL says what each becomes wherever it occurs, in nested
configurations too, and OVERRIDES what a family needs beyond that.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 61
WINDOW = 5  # shorter than the test's prompts
MOST_PARAMETERS = 20_000_000  # a configuration that is still larger has not been cut down

SMALL = {
    # sizes
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "n_embd": 32, "d_model": 32, "emb_dim": 32, "n_layer": 2, "n_layers": 2, "num_layers": 2, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "attention_heads": 4, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "n_inner": 48,
    "ffn_dim": 48, "dff": 48, "word_embed_proj_dim": 32, "num_kv_heads": 2, "embedding_size": 32, "rotary_dim": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "shared_intermediate_size": 48,
    # multi-head latent attention
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "qk_head_dim": 12,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "intermediate_size_mlp": 48, "zero_expert_num": 1,
    "dense_intermediate_size": 48, "num_dense_layers": 1,
    # windows
    "sliding_window": WINDOW, "local_attention": 2 * WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW,
    "sliding_window_size": WINDOW, "keep_window_size": WINDOW, "attention_chunk_size": 32,
    # state space and linear attention
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_d_ssm": 64, "ssm_state_size": 8, "state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "lru_width": 32, "mamba_chunk_size": 16, "chunk_size": 16,
    # others
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "query_pre_attn_scalar": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
}  # fmt: skip

# Nested configurations that are not the language tower's.
SMALL_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_heads": 4,
    "depth": 1, "embed_dim": 32, "image_size": 16, "patch_size": 8, "out_hidden_size": 32, "projection_dim": 32,
    "num_channels": 3, "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": VOCAB, "num_layers": 1, "n_layers": 1, "layers": 1,
    "conf_num_attention_heads": 4, "mlp_dim": 48, "hidden_dim": 32,
}  # fmt: skip

LANGUAGE = ("text_config", "llm_config", "thinker_config", "decoder_config")

# What a family needs beyond SMALL; "text_config." is for the nested configuration.
_HYBRID = {
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_CONV = _HYBRID | {"layer_types": ["conv", "full_attention", "conv"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_MROPE_HALF = {
    "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
_HYBRID_TEXT, _CONV_TEXT, _MROPE_TEXT = ({"text_config.": x} for x in (_HYBRID, _CONV, _MROPE))
OVERRIDES: dict[str, dict] = {
    "aria": {"image_token_index": VOCAB - 1},  # its own is a token of prompts here
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "attention", "recurrent"]},
    "nemotron_h": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1,
    },
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONV),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), _CONV_TEXT),
    **dict.fromkeys(
        ("granitemoehybrid", "qwen3_next", "kimi_linear", "bailing_hybrid", "olmo_hybrid", "qwen3_5_text",
         "qwen3_5_moe_text", "qwen4_exp_text", "minimax"), _HYBRID),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _HYBRID_TEXT),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm_ocr", "glm4v", "glm46v", "glmga", "paddleocr_vl"),
        _MROPE_TEXT),
    "glm4v_moe": {"text_config.": _MROPE_HALF},
    # positions whose scaling shows within the prompts
    "llama4_text": {"floor_scale": 4, "attn_scale": 1.0, "no_rope_layers": [1, 0]},
    "llama4": {"text_config.": {"floor_scale": 4, "attn_scale": 1.0, "no_rope_layers": [1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4}, "dots3_note": {"text_config.": {"num_key_value_heads": 4}},
    "glm5_next": {"text_config.": {"num_key_value_heads": 4}},
    "unlimited_ocr": {"text_config.": {"num_key_value_heads": 4}},
    "gemma4_assistant": {"text_config.": {"hidden_size_per_layer_input": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 8},
}  # fmt: skip
# Random weights of this size make attention far from uniform; some families scale them down again.
STD = {"granite_docling": 1.0}


def families() -> list[str]:
    """Model types: the causal language models, then the chat models that also take images."""
    causal = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return causal + [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in causal]


def tiny_config(model_type: str) -> PreTrainedConfig:
    return _tiny(CONFIG_MAPPING[model_type], SMALL, OVERRIDES.get(model_type, {}))


def _tiny(config_class, small: dict, overrides: dict) -> PreTrainedConfig:
    names = {f.name for f in dataclasses.fields(config_class)}
    aliases = getattr(config_class, "attribute_map", {})
    kwargs = {name: x for name, x in small.items() if name in names}
    if "kv_lora_rank" in names:
        kwargs["num_key_value_heads"] = 4  # every head has its own keys, made of one latent vector
    kwargs |= {
        aliases[name]: small[name]
        for name in small
        if aliases.get(name) in names and aliases[name] not in small
    }
    for name in getattr(config_class, "sub_configs", {}):
        nested = _default_of(config_class, name)
        if name in names and nested is not None and name not in overrides:
            part = SMALL if name in LANGUAGE else SMALL_TOWER
            kwargs[name] = _tiny(type(nested), part, overrides.get(f"{name}.", {}))
    kwargs |= {name: x for name, x in overrides.items() if not name.endswith(".")}
    return config_class(**kwargs)


def _default_of(config_class, name: str) -> PreTrainedConfig | None:
    """A nested configuration as the family has it by itself: says which class that is."""
    try:
        nested = getattr(config_class(), name, None)
    except (AttributeError, TypeError, ValueError, ImportError):  # no configuration without arguments
        sub = config_class.sub_configs[name]
        nested = sub() if dataclasses.is_dataclass(sub) else None
    return nested if isinstance(nested, PreTrainedConfig) else None


def tiny_model(model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A random model of the family whose ablations show, in evaluation mode.

    Raises whatever the family's own code raises where it cannot be built.
    """
    config = tiny_config(model_type)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    factory = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    torch.manual_seed(seed)
    with torch.device("meta"):
        count = sum(p.numel() for p in factory.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its smallest configuration here still has {count:,} parameters")
    # transformers' SDPA leaves softcaps out in some versions; eager has them.
    # The grouped matrix products of its experts are for float32 and below.
    model = factory.from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, STD.get(model_type, 0.3), generator=generator)
            elif name.endswith(("sinks", "sink")):
                parameter.normal_(0, 1, generator=generator)
    return model.to(dtype).eval()
