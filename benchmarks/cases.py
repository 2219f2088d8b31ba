"""The models and prompts of the benchmarks: true shapes, random weights, seeded."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Case:
    """A Llama-architecture shape and prompts with `shared` common first tokens and `own` tokens each."""

    name: str
    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    prompts: int
    shared: int
    own: int
    dtype: torch.dtype = torch.float32

    @property
    def num_scores(self) -> int:
        return self.layers * self.heads * self.prompts

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(self.dtype).eval()

    def token_ids(self) -> list[list[int]]:
        draw = random.Random(0)
        prefix = [draw.randrange(self.vocabulary) for _ in range(self.shared)]
        return [
            prefix + [draw.randrange(self.vocabulary) for _ in range(self.own)] for _ in range(self.prompts)
        ]


_CPU = dict(layers=10, heads=10, hidden=640, intermediate=1728, vocabulary=8000, prompts=8)

CPU_CASES = (
    Case("cpu-10x10-d640-short", **_CPU, shared=6, own=18),
    Case("cpu-10x10-d640-template", **_CPU, shared=48, own=16),
)
# Small enough for a test of the benchmark itself.
SMOKE_CASES = (
    Case(
        "smoke-2x2-d32",
        layers=2,
        heads=2,
        hidden=32,
        intermediate=64,
        vocabulary=50,
        prompts=3,
        shared=2,
        own=3,
    ),
)
