"""Models of true shape with random weights, made on the device, and their prompts.

Weights are drawn as transformers does. Then the slices of every output projection are multiplied by a factor per
head, log-normal and seeded: as in trained models a few heads stand out, and rankings mean something.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from shipsfast.engine import flops
from shipsfast.ops.prefix_tree import PackedPrompts, pack

FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config, "mistral": MistralConfig}
HEAD_SPREAD = 1.0  # of the logarithm of the heads' factors


@dataclass(frozen=True, eq=False)
class Shape:
    """A family's shape. `more`: arguments of its config beyond the common ones."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    more: tuple[tuple[str, object], ...] = ()

    def config(self) -> PretrainedConfig:
        return FAMILIES[self.family](
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **copy.deepcopy(dict(self.more)),
        )  # fmt: skip

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The same weights for the same device and dtype; a model in another dtype is made by `twin`."""
        torch.manual_seed(0)
        how = (
            {"attn_implementation": "eager"} if self.family == "gemma2" else {}
        )  # sdpa leaves the softcap out
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, **how).eval()
        draw = random.Random(0)
        with torch.no_grad():
            for layer in model.model.layers:
                factors = [draw.lognormvariate(0, HEAD_SPREAD) for _ in range(self.heads)]
                weight = layer.self_attn.o_proj.weight.unflatten(1, (self.heads, self.head_dim))
                weight.mul_(torch.tensor(factors, device=device, dtype=dtype)[None, :, None])
        return model.requires_grad_(False)

    def costs(self) -> flops.ModelFlops:
        return flops.gated_model_flops(
            layers=self.layers, hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            intermediate=self.intermediate, vocabulary=self.vocabulary, fused=True, second_norm=self.family == "gemma2",
        )  # fmt: skip

    @property
    def kv_bytes_per_token(self) -> int:
        """In half precision, keys and values of all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def title(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.name} shape: {self.layers} layers x {heads} heads, d {self.hidden}, vocabulary {self.vocabulary}"


def twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in another dtype, beside the model on its device."""
    how = {"attn_implementation": model.config._attn_implementation}
    with torch.device(model.device):
        other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype, **how).eval()
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    return other.requires_grad_(False)


@dataclass(frozen=True)
class Prompts:
    """`count` prompts of `shared` common first tokens and own ones: from 8 to 24, 17 on average, seeded."""

    count: int
    shared: int
    least: int = 8
    most: int = 24
    mode: int = 19

    def token_ids(self, vocabulary: int) -> list[list[int]]:
        draw = random.Random(1)
        token = lambda: draw.randrange(3, vocabulary)
        prefix = [token() for _ in range(self.shared)]
        lengths = [round(draw.triangular(self.least, self.most, self.mode)) for _ in range(self.count)]
        return [prefix + [token() for _ in range(length)] for length in lengths]

    def packed(self, vocabulary: int) -> PackedPrompts:
        return pack(self.token_ids(vocabulary))

    @property
    def title(self) -> str:
        return f"{self.count} prompts of {self.shared} shared + {self.least} to {self.most} own tokens"


def _rope(theta: float) -> tuple[str, dict]:
    return "rope_parameters", {"rope_type": "default", "rope_theta": theta}


LLAMA2_7B = Shape("Llama-2-7B", "llama", 32, 4096, 32, 32, 128, 11008, 32000, (_rope(1e4),))
LLAMA31_8B = Shape("Llama-3.1-8B", "llama", 32, 4096, 32, 8, 128, 14336, 128256, (_rope(5e5),))
QWEN3_8B = Shape("Qwen3-8B", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, (_rope(1e6),))
MISTRAL_7B = Shape(
    "Mistral-7B", "mistral", 32, 4096, 32, 8, 128, 14336, 32000, (_rope(1e4), ("sliding_window", 4096))
)
GEMMA2_9B = Shape(
    "Gemma-2-9B", "gemma2", 42, 3584, 16, 8, 256, 14336, 256000,
    (
        _rope(1e4), ("sliding_window", 4096), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
    ),
)  # fmt: skip

_TINY = (2, 32, 4, 2, 8, 48, 61)
_WIDE = ("initializer_range", 0.2)  # narrow layers need larger weights for heads to matter
# Small enough for a test of every path on a CPU.
SMOKE = {
    LLAMA2_7B: Shape("smoke-llama", "llama", 2, 32, 4, 4, 8, 48, 61, (_WIDE,)),
    LLAMA31_8B: Shape("smoke-llama-gqa", "llama", *_TINY, (_WIDE,)),
    QWEN3_8B: Shape("smoke-qwen3", "qwen3", *_TINY, (_WIDE,)),
    MISTRAL_7B: Shape("smoke-mistral", "mistral", *_TINY, (_WIDE, ("sliding_window", 6))),
    GEMMA2_9B: Shape(
        "smoke-gemma2", "gemma2", *_TINY,
        (_WIDE, ("sliding_window", 6), ("attn_logit_softcapping", 2.0), ("query_pre_attn_scalar", 8)),
    ),
}  # fmt: skip
SMOKE_PROMPTS = Prompts(3, 2, 2, 5, 4)
