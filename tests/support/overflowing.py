"""A model that overflows when one head is off, and scans of it."""

import torch

import shipsfast
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]


def scan(model, prompts=PROMPTS, **options):
    return shipsfast.scan(model, prompts, progress=False, **options)


def overflowing(layer: int = 1, head: int = 2):
    """Finite until the head is off: then 1e30 x 1e30 of that head's output, which float32 does not hold."""

    def multiply(module, args):
        x = args[0]
        part = x[..., 8 * head : 8 * head + 8]
        boost = torch.where(part.abs().amax(-1, keepdim=True) == 0, 1e30, 1.0).to(x.dtype)
        return (x * boost * boost,)

    model = build(dtype=torch.float32)
    model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(multiply)
    return model
