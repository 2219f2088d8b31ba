"""What people use in the place of switching off every head: estimates of it from gradients, on plain transformers.

Attribution patching (Nanda 2023; Syed et al. 2023) takes a metric m of the next token's logits as linear in each head's output z,

    m(head off) - m = sum over tokens t of (z_off[t] - z[t]) . dm/dz[t],

so that one forward and one backward pass of the unablated model score all heads. At the unablated model KL(base || p) is at its minimum, 0,
where its gradient p - base is 0 as well: to first order KL scores every head 0. So m is a difference of two logits here, or KL is taken
to second order: with F the Fisher information of the next token, KL = 1/2 dz F dz = 1/2 E_y [(dz . d log p(y) / dz)^2], y drawn from p.

Prompts of different lengths go through together, padded on the right, where causal attention does not look.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import LlamaForCausalLM

BATCH = 16  # prompts at a time: what is kept for the backward pass takes about 50 MiB each in a model of 135M
DRAWS = 8  # of the next token, each a backward pass
Ids = list[list[int]]


class Heads:
    """The outputs of all heads in one forward pass, and those that they would have if they were off.

    z, off   float32 [B, T, H, D] of each layer: the input of its output projection, and with zeros or the mean of the values up to
             each token in its place
    nudges   what is added to z, 0: its gradient is that of z
    """

    def __init__(self, model: LlamaForCausalLM, ablation: str, nudge: Callable | None = None) -> None:
        self.z, self.off, self.nudges = [], [], []
        self.model, self.ablation, self.nudge = model, ablation, nudge
        config = model.config
        self.heads, self.size = config.num_attention_heads, config.head_dim
        self.shared = self.heads // config.num_key_value_heads

    @contextlib.contextmanager
    def watched(self) -> Iterator[Heads]:
        with contextlib.ExitStack() as hooks:
            for layer in self.model.model.layers:
                attention = layer.self_attn
                hooks.callback(attention.v_proj.register_forward_hook(self._values).remove)
                hooks.callback(attention.o_proj.register_forward_pre_hook(self._outputs).remove)
            yield self

    def _values(self, _module, _args, values: torch.Tensor) -> None:
        values = values.detach().unflatten(-1, (-1, self.size))
        if self.ablation == "zero":
            off = torch.zeros_like(values)
        else:
            seen = torch.arange(1, values.shape[1] + 1, dtype=values.dtype)
            off = values.cumsum(1) / seen[:, None, None]
        self.off.append(off.repeat_interleave(self.shared, dim=2))

    def _outputs(self, _module, args: tuple) -> tuple:
        z = args[0].unflatten(-1, (self.heads, self.size))
        self.z.append(z.detach())
        layer = len(self.nudges)
        nudge = (
            torch.zeros_like(self.z[-1])
            if self.nudge is None
            else self.nudge(layer, self.z[-1], self.off[layer])
        )
        self.nudges.append(nudge.requires_grad_())
        return ((z + self.nudges[-1]).flatten(-2), *args[1:])

    def times_gradient(self, m: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """float64 [L, H, B]: (z_off - z) . dm/dz, where m [B] is of each prompt."""
        slopes = torch.autograd.grad(m.sum(), self.nudges, retain_graph=keep)
        parts = zip(slopes, self.z, self.off, strict=True)
        return torch.stack(
            [((off - z) * slope).sum((1, 3), dtype=torch.float64).T for slope, z, off in parts]
        )


def next_logits(model: LlamaForCausalLM, ids: Ids) -> torch.Tensor:
    """Logits [B, V] behind the last token of each prompt."""
    lengths = torch.tensor([len(each) for each in ids])
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, each in zip(padded, ids, strict=True):
        row[: len(each)] = torch.tensor(each)
    hidden = model.model(padded, use_cache=False).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(ids)), lengths - 1])


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    """[B]: of the two likeliest tokens, the first less the second."""
    first, second = logits.topk(2).indices.T
    at = torch.arange(len(logits))
    return logits[at, first] - logits[at, second]


def kl(logits: torch.Tensor) -> torch.Tensor:
    """[B]: KL(base || p) where the base are these same logits: 0, and so is its gradient."""
    p = torch.log_softmax(logits, -1)
    base = p.detach()
    return (base.exp() * (base - p)).sum(-1)


def patching(
    model: LlamaForCausalLM, ids: Ids, ablation: str, metric: Callable = logit_difference
) -> torch.Tensor:
    """Attribution patching: float64 [L, H, P], the estimated change of the metric."""
    return _batched(model, ids, partial(_first_order, ablation=ablation, metric=metric))


def second_order_kl(model: LlamaForCausalLM, ids: Ids, ablation: str, draws: int = DRAWS) -> torch.Tensor:
    """KL to second order, from gradients of the log probabilities of drawn tokens: float64 [L, H, P], nats."""
    chance = torch.Generator().manual_seed(0)
    return _batched(model, ids, partial(_fisher, ablation=ablation, draws=draws, chance=chance))


def _first_order(model: LlamaForCausalLM, ids: Ids, ablation: str, metric: Callable) -> torch.Tensor:
    with Heads(model, ablation).watched() as heads:
        return heads.times_gradient(metric(next_logits(model, ids)))


def _fisher(
    model: LlamaForCausalLM, ids: Ids, ablation: str, draws: int, chance: torch.Generator
) -> torch.Tensor:
    with Heads(model, ablation).watched() as heads:
        log_probs = torch.log_softmax(next_logits(model, ids), -1)
        tokens = torch.multinomial(log_probs.detach().exp(), draws, replacement=True, generator=chance)
        drawn = [log_probs.gather(1, token[:, None])[:, 0] for token in tokens.T]
        return sum(heads.times_gradient(each, keep=True) ** 2 for each in drawn) / (2 * draws)


def _batched(model: LlamaForCausalLM, ids: Ids, estimate: Callable) -> torch.Tensor:
    """Prompts of like lengths go together; the model's weights take no gradients meanwhile."""
    order = sorted(range(len(ids)), key=lambda p: len(ids[p]))
    frozen = [p for p in model.parameters() if p.requires_grad]
    out = None
    for p in frozen:
        p.requires_grad_(False)
    try:
        for start in range(0, len(ids), BATCH):
            some = order[start : start + BATCH]
            found = estimate(model, [ids[p] for p in some])
            out = found.new_empty(*found.shape[:2], len(ids)) if out is None else out
            out[..., some] = found
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return out


def slope_by_steps(
    model: LlamaForCausalLM, ids: Ids, ablation: str, head: tuple[int, int], step: float
) -> torch.Tensor:
    """[P]: what `patching` gives for a head, by moving its output a little of the way to what it is when off, and as far back."""

    def moved(by: float) -> torch.Tensor:
        def nudge(layer: int, z: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(z)
            if layer == head[0]:
                out[:, :, head[1]] = by * (off - z)[:, :, head[1]]
            return out

        with torch.no_grad(), Heads(model, ablation, nudge).watched():
            return next_logits(model, ids)

    base = next_logits(model, ids).detach()
    first, second = base.topk(2).indices.T
    at = torch.arange(len(base))
    up, down = (x[at, first] - x[at, second] for x in (moved(step), moved(-step)))
    return (up - down) / (2 * step)
