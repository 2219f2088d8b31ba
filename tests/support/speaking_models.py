"""Tiny models that say something, and their greedy texts by a slow loop: the oracle of the tests of generation."""

import torch

from tests.support import hooks, models
from tests.support.models import HEADS

NEW = 9


def build(family, dtype=torch.float64):
    """As in tests/support/models.py. Gemma with a head of its own: tied to its scaled embeddings, it only repeats itself."""
    model = models.build(family, dtype)
    if family.startswith("gemma"):
        head = model.get_output_embeddings()
        torch.manual_seed(1)
        head.weight = torch.nn.Parameter(0.25 * torch.randn(head.weight.shape, dtype=dtype))
    return model


def slow(model, ids, group, *, kind="undifferentiated", values=None, new=NEW, end=(2,)) -> list[int]:
    """Greedy text of one prompt with one group off, every token by a forward pass over all before it."""
    heads = tuple((layer, h) for layer, head in group for h in (range(HEADS) if head is None else [head]))
    out: list[int] = []
    for _ in range(new):
        off = hooks.Off(heads, kind, values=values)
        token = int(hooks.forward(model, [*ids, *out], off).logits[-1].float().argmax())
        if token in end:
            break
        out.append(token)
    return out
