"""The output head of a model: its precision, what enters it, and logits in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from .layer_call import forward_replaced
from .weights import brought_in


def head_precision(model: PreTrainedModel) -> str:
    """What the output head computes its logits in: "float32" for half-precision linear heads, else the model's."""
    head = model.get_output_embeddings()
    plain = type(head) is torch.nn.Linear and type(head.weight.data) is torch.Tensor  # not a quantised one
    if plain and head.weight.dtype in (torch.bfloat16, torch.float16):
        return "float32"
    return str(model.dtype).removeprefix("torch.")


@contextlib.contextmanager
def head_input(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """A list that receives what enters the output head; no logits are computed."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        # What the model does with logits costs nothing on a single number stretched to their shape.
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], 1)

    with forward_replaced(head, lambda _forward: forward):
        yield seen


@contextlib.contextmanager
def float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Logits in float32 even where the model computes in half precision.

    Rounding logits to bfloat16 moves them by up to 1/256 of their size, which is noise in every KL. On CUDA
    the product of half-precision factors is accumulated and returned in float32 by the GEMM itself.
    """
    head = model.get_output_embeddings()
    if head_precision(model) != "float32" or head.weight.dtype == torch.float32:
        yield
        return
    with brought_in([head]):
        wide = None if head.weight.is_cuda else head.weight.float()

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.to(head.weight.device)
            if wide is not None:
                out = torch.nn.functional.linear(hidden.float(), wide)
            else:
                flat = hidden.reshape(-1, hidden.shape[-1])
                flat = flat.to(head.weight.dtype)  # of a float32 residual stream
                out = torch.mm(flat, head.weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return out if head.bias is None else out + head.bias.float()

        with forward_replaced(head, lambda _forward: forward):
            yield
