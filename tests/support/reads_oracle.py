"""Scores at any token of a sequence, of one plain pass for each unit that is off: the oracle of `at=` and `answers=`.

A head that is off "at the end" is so in a row of its own for each token that is read, and in that row at this token only.
The rows of a pass hold the same tokens, so they are passes of their own that share a call. Attention is that of
family_oracle.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from tests.support.alignments import aligned, by_definition
from tests.support.family_oracle import EPS, Off, forward, head_counts, head_outputs, oracle_attention

Values = Sequence[torch.Tensor]  # of each layer [T or 1, H, D]
# (base [..., V], other [..., V], token [...]) -> [...]: log probabilities, and the token that follows in the sequence.
Metric = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _of(log_probs: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(-1, token.expand(log_probs.shape[:-1])[..., None])[..., 0]


def _js(b: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    middle = ((b.exp() + o.exp()) / 2).log()
    return 0.5 * sum((x.exp() * (x - middle)).sum(-1) for x in (b, o))


METRICS: dict[str, Metric] = {
    "kl": lambda b, o, t: (b.exp() * (b - o)).sum(-1),
    "js": lambda b, o, t: _js(b, o),
    "logit_diff:3,7": lambda b, o, t: (o[..., 3] - o[..., 7]) - (b[..., 3] - b[..., 7]),
    "log_prob": lambda b, o, t: _of(o, t),
    "prob": lambda b, o, t: _of(o, t).exp(),
    "log_prob_diff": lambda b, o, t: _of(o, t) - _of(b, t),
    "prob_diff": lambda b, o, t: _of(o, t).exp() - _of(b, t).exp(),
    "abs_log_prob_diff": lambda b, o, t: (_of(o, t) - _of(b, t)).abs(),
    "abs_prob_diff": lambda b, o, t: (_of(o, t).exp() - _of(b, t).exp()).abs(),
}


def with_answers(prompts: Sequence[list], answers: Sequence[list]) -> tuple[list[list], list[list]]:
    """Each prompt with its answer behind it, and the positions from which the answer's tokens are read."""
    both = list(zip(prompts, answers, strict=True))
    return [[*p, *a] for p, a in both], [list(range(len(p) - 1, len(p) + len(a) - 1)) for p, a in both]


def outputs(model, ids: Sequence[int]) -> Values:
    """Of every layer [T, H, D]: what the heads of the unablated model give."""
    with oracle_attention(model):
        forward(model, ids, use_cache=False)
        return head_outputs()


def mean_values(model, sequences: Sequence[Sequence[int]]) -> Values:
    """The mean of the heads' outputs over all tokens of all sequences, each for itself."""
    found = [outputs(model, ids) for ids in sequences]
    return [torch.cat(layer).mean(0, keepdim=True) for layer in zip(*found, strict=True)]


def resample_values(model, own: Sequence[int], other: Sequence[int], align: str = "exact") -> Values:
    """What the heads give on another sequence, as it is aligned with one's own."""
    return aligned(outputs(model, own), outputs(model, other), by_definition(own, other, align))


@dataclass
class Reads:
    """Log probabilities at tokens of sequences, without and with every unit off.

    reads: positions of each sequence; at: "all", or "end" for the token that is read only; values: of each sequence, for
    `mean` and `resample`; heads: only these units, (layer, index) pairs.
    """

    model: object
    sequences: Sequence[Sequence[int]]
    reads: Sequence[Sequence[int]]
    kind: str = "undifferentiated"
    eps: float = EPS
    at: str = "all"
    values: Sequence[Values] | None = None
    unit: str = "head"
    heads: Sequence[tuple[int, int]] | None = None
    base: list[torch.Tensor] = field(init=False)  # [A, V]
    other: list[torch.Tensor] = field(init=False)  # [A, L, units, V], NaN where a unit is not among `heads`

    def __post_init__(self) -> None:
        found = []
        with oracle_attention(self.model):
            for number, ids in enumerate(self.sequences):
                found.append(self._one(number, ids, list(self.reads[number])))
        self.base, self.other = map(list, zip(*found, strict=True))

    def _one(self, number: int, ids: Sequence[int], reads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        base = _log_probs(forward(self.model, ids, use_cache=False).logits)[0, reads]
        units = units_of(head_counts(), self.unit)
        other = base.new_full((len(reads), *(1 + n for n in max(units)), base.shape[-1]), float("nan"))
        where = None
        if self.at == "end":
            where = torch.zeros(len(reads), len(ids), dtype=torch.bool)
            where[range(len(reads)), reads] = True
        values = self.values[number] if self.values else None
        for unit, heads in units.items():
            if self.heads is not None and unit not in self.heads:
                continue
            off = Off(heads, self.kind, self.eps, where, values)
            found = _log_probs(forward(self.model, ids, off, use_cache=False).logits)
            other[:, *unit] = found[range(len(reads)), reads] if where is not None else found[0, reads]
        return base, other

    def scores(self, metric: str = "kl") -> list[np.ndarray]:
        """Of each sequence float64 [A, L, units]. A metric of the token that follows needs one in the sequence."""
        out = []
        for ids, reads, base, other in zip(self.sequences, self.reads, self.base, self.other, strict=True):
            follows = torch.tensor([[*ids, 0][at + 1] for at in reads])[:, None, None]
            out.append(METRICS[metric](base[:, None, None].expand_as(other), other, follows).numpy())
        return out

    def means(self, metric: str = "kl") -> np.ndarray:
        """The mean over what is read of each sequence, [P, L, units]."""
        return np.stack([each.mean(0) for each in self.scores(metric)])


def units_of(
    counts: Sequence[tuple[int, int]], unit: str
) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Every unit, and its query heads: a key/value head serves neighbouring query heads."""
    return {
        (layer, index): tuple(
            (layer, head) for head in range(heads) if unit == "head" and head == index
            or unit == "kv_group" and head // (heads // kv_heads) == index
        )
        for layer, (heads, kv_heads) in enumerate(counts)
        for index in range(heads if unit == "head" else kv_heads)
    }  # fmt: skip


def decode(model, prompt: Sequence[int], answer: Sequence[int], off: Off | None = None) -> torch.Tensor:
    """Log probabilities [A, V] before each token of the answer, as a decoder with transformers' cache has them when heads
    are off in its newest step only: at the prompt's last token, then at each token of the answer but the last."""
    out, cache = [], DynamicCache(config=model.config)
    with oracle_attention(model):
        if prompt[:-1]:
            forward(model, prompt[:-1], past_key_values=cache, use_cache=True)
        for newest in [prompt[-1], *answer[:-1]]:
            if off is not None:
                aside = copy.deepcopy(cache)
                logits = forward(model, [newest], off, past_key_values=aside, use_cache=True).logits
            step = forward(model, [newest], past_key_values=cache, use_cache=True).logits
            out.append(_log_probs(step if off is None else logits)[0, 0])
    return torch.stack(out)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1)
