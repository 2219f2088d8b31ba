"""Metrics of the token that a given answer goes on with.

    log_prob, prob                          with the head off
    log_prob_diff, prob_diff                head off less unablated
    abs_log_prob_diff, abs_prob_diff        the size of that

All of them are made of the log probabilities of these tokens, which are taken of the logits once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..ops import divergences
from .metrics import Metric

LABELS = {
    "log_prob": "log p(answer's token), head ablated",
    "prob": "p(answer's token), head ablated",
    "log_prob_diff": "change of log p(answer's token)",
    "prob_diff": "change of p(answer's token)",
    "abs_log_prob_diff": "size of the change of log p(answer's token)",
    "abs_prob_diff": "size of the change of p(answer's token)",
}


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """name: one of LABELS."""

    name: str
    of_answers = True

    @property
    def label(self) -> str:
        return LABELS[self.name]

    @property
    def unit(self) -> str:
        return "nats" if "log_prob" in self.name else ""

    @property
    def signed(self) -> bool:
        return self.name in ("log_prob", "log_prob_diff", "prob_diff")

    def describe(self) -> dict:
        return {"name": self.name}

    def to_text(self) -> str:
        return self.name

    def rows(self, base_logits, ablated_logits, row_map) -> torch.Tensor:
        raise InputError(f"metric {self.name} is of an answer's own tokens, and rows of logits have none")

    def scores(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Float64 [n, M], of log probabilities with a head off, [n, M], and of the unablated model, [M]."""
        if "log_prob" not in self.name:
            before, after = before.exp(), after.exp()
        if not self.name.endswith("_diff"):
            return after
        change = after - before
        return change.abs() if self.name.startswith("abs") else change


def log_prob(logits: torch.Tensor, place: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, float64 [n, M], of logits [n, U, V] at M reads: place int64 [M], where in U each is; targets int64
    [M], the token that follows it. Sums are in float64."""
    rows = max(1, divergences.SCRATCH_BYTES // (8 * logits.shape[2]))
    norms = []
    for chunk in logits.flatten(0, 1).split(rows):
        largest = chunk.amax(1, keepdim=True)
        norms.append(largest[:, 0].double() + (chunk - largest).exp_().sum(1, dtype=torch.float64).log())
    norm = torch.cat(norms).view(logits.shape[:2])
    return logits[:, place, targets].double() - norm[:, place]
