"""Models that are saved and streamed."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from tests.support.models import _GQA, FAMILIES, build

MORE = {
    "mixtral-merged-experts": MixtralConfig(**_GQA, num_local_experts=3, num_experts_per_tok=2),
    "llama-tied": LlamaConfig(**_GQA, tie_word_embeddings=True),
}


def built(family: str, dtype=torch.float32):
    if family in FAMILIES:
        return build(family, dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MORE[family]), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model
