"""How the next token of a row is taken from its logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import MOST, InputError, whole_number
from .measurements import TOP_K


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from the logits.

    do_sample: False takes the largest (the first of equals); True draws from the softmax of logits / temperature
    over the top_k largest, 0 for all. A row's draws depend on seed, its prompt, its heads and which copy of them it
    is, and on nothing else.
    """

    do_sample: bool = False
    top_k: int = TOP_K
    temperature: float = 1.0
    seed: int = 0

    def check(self, vocabulary: int) -> None:
        whole_number("seed", self.seed, 0)
        whole_number("top_k", self.top_k, 0)
        if self.top_k > vocabulary:
            raise InputError(
                f"top_k is {self.top_k}, and the model's vocabulary has {vocabulary} tokens: lower it"
            )
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature <= MOST):
            raise InputError(f"temperature must be a positive number, got {self.temperature!r}")

    def uniforms(self, row: str, count: int) -> np.ndarray:
        """`count` numbers in [0, 1) that belong to the row called `row`."""
        key = hashlib.sha256(f"{self.seed} {row}".encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)

    def choose(self, logits: torch.Tensor, uniform: np.ndarray) -> np.ndarray:
        """The next token of each row, int64 [n]; logits [n, V], uniform [n]."""
        if not self.do_sample:
            return logits.float().argmax(-1).cpu().numpy()
        k = self.top_k or logits.shape[-1]
        top, token = logits.float().topk(k, -1)
        # Draws go by the order of logits, so that rounding moves only draws next to a border.
        cumulative = torch.softmax(top.double() / self.temperature, -1).cumsum(-1)
        draw = torch.as_tensor(uniform, device=logits.device)[:, None] * cumulative[:, -1:]
        place = (cumulative <= draw).sum(-1, keepdim=True).clamp(max=k - 1)
        return token.gather(-1, place)[:, 0].cpu().numpy()
