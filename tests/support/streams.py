"""The residual stream after each decoder layer, by forward hooks on the layers in plain passes: what directions, projections
and probes are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from tests.support.family_oracle import Off, forward, head_counts, oracle_attention
from tests.support.models import build
from tests.support.tiny_configs import tiny_model

# With one attention layer in three, between layers that have none.
MODELS = {
    "llama": lambda: build("llama-gqa"),
    "gpt2": lambda: build("gpt2"),
    "gemma2": lambda: build("gemma2-softcap-window"),
    "qwen3": lambda: build("qwen3-qknorm"),
    "gpt-oss": lambda: tiny_model("gpt_oss"),
    "hybrid-conv": lambda: tiny_model("lfm2"),
    "hybrid-ssm": lambda: tiny_model("jamba"),
}


def decoder_layers(model) -> torch.nn.ModuleList:
    """Of a tiny model: its outermost list of modules."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    return lists[min(lists, key=lambda name: (name.count("."), name))]


@torch.no_grad()
def streams(model, ids: Sequence[int], off: Off | None = None) -> torch.Tensor:
    """float64 [decoder layers, rows, T, hidden] with heads off, as many rows as `off` has, else one."""
    found: list[torch.Tensor] = []

    def hook(_module, _args, out):
        found.append((out[0] if isinstance(out, tuple) else out).double())

    with oracle_attention(model), contextlib.ExitStack() as undo:
        for layer in decoder_layers(model):
            undo.callback(layer.register_forward_hook(hook).remove)
        forward(model, ids, off, use_cache=False)
    return torch.stack(found)


def stream(model, ids: Sequence[int]) -> torch.Tensor:
    """float64 [decoder layers, T, hidden] of the unablated model."""
    return streams(model, ids)[:, 0]


@torch.no_grad()
def changed(
    model, ids: Sequence[int], reads: Sequence[int], at: str = "all"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream at the tokens `reads`: without a head off [decoder layers, A, hidden], and with each of them off
    [attention calls, heads, decoder layers, A, hidden]. at: as of an ablation, "end" is the token that is read."""
    base = stream(model, ids)[:, reads]
    with oracle_attention(model):
        forward(model, ids, use_cache=False)
        counts = head_counts()
    where = None
    if at == "end":
        where = torch.zeros(len(reads), len(ids), dtype=torch.bool)
        where[range(len(reads)), list(reads)] = True
    rows = range(len(reads)) if at == "end" else 0

    def one(call: int, head: int) -> torch.Tensor:
        return streams(model, ids, Off(((call, head),), where=where))[:, rows, list(reads)]

    heads = [
        torch.stack([one(call, head) for head in range(count)]) for call, (count, _) in enumerate(counts)
    ]
    return base, torch.stack(heads)


def change_along(
    model, prompts: Sequence[Sequence[int]], layer: int, value, reads=None, at: str = "all"
) -> list[np.ndarray]:
    """Of each prompt float64 [A, L, H]: value(with the head off) less value(base) of the stream after a decoder layer, at the
    tokens `reads` of each, by default its last. value: [..., hidden] -> [...]."""
    out = []
    for number, ids in enumerate(prompts):
        places = [len(ids) - 1] if reads is None else list(reads[number])
        base, off = changed(model, ids, places, at)
        out.append((value(off[:, :, layer]) - value(base[layer])).permute(2, 0, 1).numpy())
    return out
