"""A model's own forward pass: where its input goes, in evaluation mode, and how exact two passes can be."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .weights import execution_device

BY_BATCH = ("torch.ao.nn.quantized", "torch.nn.quantized")  # where their classes are

# By how much, in nats and relative to a score, what shipsfast runs and single spot-checked scores may differ from the model's
# own forward before the model is refused. These are alarms for a model that does something unknown, far above rounding; how
# exact a scan is shows in its noise floor. Float64 models round to float32 inside transformers' norms: on a deep one, two ways to
# the same number were seen to differ by 3e-7 of a hidden state's norm.
ALARM_NATS = {
    torch.float64: (1e-6, 1e-4),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.1, 0.2),
    torch.float16: (0.02, 0.1),
}


def input_device(model: PreTrainedModel) -> torch.device:
    return execution_device(model, model.get_input_embeddings())


def last_logits_only(model: PreTrainedModel) -> dict:
    """The argument that keeps a forward pass from computing logits nobody reads, where the model takes it."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; those that were training are again afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def plain_pass(model: PreTrainedModel, ids: Sequence[Sequence[int]], **how) -> torch.Tensor:
    """Logits of the model's own forward pass over rows of equal length, in evaluation mode and without a cache."""
    tokens = torch.tensor([list(row) for row in ids], device=input_device(model))
    with torch.inference_mode(), evaluating(model):
        return model(input_ids=tokens, use_cache=False, return_dict=True, **how).logits


def padded(
    ids: Sequence[Sequence[int]], pad: int, side: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch, int64 [rows, tokens of the longest], padded on the "left" or "right". A
    tokenizer's own padding wants a padding token that is in its vocabulary, which models need not have."""
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    seen = [torch.ones_like(row) for row in rows]
    fill = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    return {
        "input_ids": fill(rows, padding_value=pad).to(device),
        "attention_mask": fill(seen, padding_value=0).to(device),
    }


def rounded_to(model: PreTrainedModel) -> torch.dtype:
    """The dtype that says how much two passes of a model may differ: layers that were loaded quantised may compute in
    bfloat16 whatever the model's dtype is, and bitsandbytes' int8 ones round a row by what runs beside it."""
    quantised = getattr(model, "is_quantized", False) or rounded_by_batch(model) is not None
    return torch.bfloat16 if quantised and model.dtype.itemsize >= 4 else model.dtype


def rounded_by_batch(model: torch.nn.Module) -> str | None:
    """The name of a layer that rounds a row by what runs beside it, as torch's own dynamically quantised layers do: one
    scale for the whole batch. None if there is none."""
    return next((name for name, m in model.named_modules() if type(m).__module__.startswith(BY_BATCH)), None)


def alarm(model: PreTrainedModel) -> tuple[float, float]:
    """In nats, and relative to the score."""
    return ALARM_NATS.get(rounded_to(model), ALARM_NATS[torch.float32])


def softcap_left_out(model: PreTrainedModel) -> str | None:
    """What to say of a model whose attention, as it was loaded, leaves out a softcap that it has; None for another."""
    config = model.config.get_text_config()
    if not getattr(config, "attn_logit_softcapping", None) or config._attn_implementation == "eager":
        return None
    return (
        f"{type(model).__name__} caps its attention logits, which the attention it was loaded with, "
        f"{config._attn_implementation!r}, leaves out: load it with attn_implementation='eager'"
    )
