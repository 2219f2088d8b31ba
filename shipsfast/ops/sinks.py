"""Attention sinks: one more logit of a head, whose weight goes nowhere."""

from __future__ import annotations

import torch


def sink_softmax(logits: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """softmax over the last dimension of [B, H, TQ, T] with the sinks [H] in the denominator, if there are any."""
    if sink is None:
        return torch.softmax(logits, -1)
    column = sink.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1]


def sink_numbers(sink: torch.Tensor | None) -> torch.Tensor:
    """The sinks [H] as the extension takes them: float64, empty for none."""
    return torch.empty(0, dtype=torch.float64) if sink is None else sink.double().contiguous()
