"""The definition of a Ships scan for any family: one forward pass per head and prompt, nothing packed.

The model runs as transformers has it, but for one thing: attention is `_attention` below, written from its
definition, in which some heads are off in some of the calls that a forward pass makes: each in every way that there
is, at every token or at some. Calls are counted, not looked up, so the oracle does not rely on what shipsfast thinks a
layer is. What a model hands to attention and `_attention` does not know makes it raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask

NAME = "family_oracle"
EPS = 1e-5
# What models pass that says nothing which is not in the mask already, or asks for outputs.
SILENT = {
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "dropout",
    "position_embeddings", "output_hidden_states", "output_router_logits", "past_key_values", "return_dict",
    "logits_to_keep",
}  # fmt: skip


@dataclass(frozen=True)
class Off:
    """Heads, (call, head) pairs, that are off in one way (shipsfast.engine.ablation has what each means).

    where: bool [rows, queries], at which tokens their outputs are the ablated ones; None for all.
    values: of each call [T or 1, H, D], for `mean` and `resample`.
    """

    heads: Sequence[tuple[int, int]] = ()
    kind: str = "undifferentiated"
    eps: float = EPS
    where: torch.Tensor | None = None
    values: Sequence[torch.Tensor] | None = None


@dataclass
class _State:
    off: Off = field(default_factory=Off)
    heads: list[tuple[int, int]] = field(default_factory=list)  # query and key/value heads of each call
    outs: list[torch.Tensor] = field(default_factory=list)  # of each call, before any head is off


_state = _State()


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    unknown = {name for name, x in kwargs.items() if x is not None and name not in SILENT}
    assert not unknown, f"the oracle does not know {unknown}"
    call, (heads, kv_heads) = len(_state.outs), (query.shape[1], key.shape[1])
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query.shape[2]
    if attention_mask is None:
        assert getattr(module, "is_causal", True), "no mask, and not causal"
        attention_mask = query.new_full((tokens, key.shape[2]), float("-inf")).triu(1 + key.shape[2] - tokens)

    def attend(query, key, factor=1.0) -> torch.Tensor:
        logits = factor * scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits + attention_mask
        if s_aux is not None:  # one more logit per head, whose weight goes nowhere
            sink = s_aux.reshape(1, -1, 1, 1).to(logits.dtype).expand(len(logits), -1, tokens, 1)
            logits = torch.cat([logits, sink], -1)
        weights = torch.softmax(logits, -1)[..., : key.shape[2]]
        return torch.einsum("bhqk,bhkd->bqhd", weights, value)

    out = attend(query, key)
    _state.heads.append((heads, kv_heads))
    _state.outs.append(out)
    off = _state.off
    these = [head for at, head in off.heads if at == call]
    if these:
        chosen = torch.zeros(heads, dtype=torch.bool)
        chosen[these] = True
        if off.where is not None:
            chosen = (off.where[..., None] & chosen)[..., None]  # [rows, queries, H, 1]
        else:
            chosen = chosen[:, None]
        other = {
            "undifferentiated": lambda: attend(query, key, off.eps),
            "uniform": lambda: attend(query, key, 0.0),
            "scale": lambda: out * off.eps,
            "zero": lambda: torch.zeros_like(out),
            "head_mean_q": lambda: attend(query.mean(1, keepdim=True).expand_as(query), key),
            "head_mean_k": lambda: attend(query, key.mean(1, keepdim=True).expand_as(key)),
            "head_mean_v": lambda: out.mean(2, keepdim=True),
            "mean": lambda: off.values[call],
            "resample": lambda: off.values[call],
        }[off.kind]()
        out = torch.where(chosen, other, out)
    return out.contiguous(), None


def _configs(model) -> list[PreTrainedConfig]:
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


@contextlib.contextmanager
def oracle_attention(model) -> Iterator[None]:
    """Every module of the model calls `_attention`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        _state.off, _state.heads, _state.outs = Off(), [], []


@torch.no_grad()
def forward(model, ids: Sequence[int], off: Off | None = None, **kwargs):
    """A pass inside `oracle_attention`, with as many rows of these tokens as `off.where` has, else one. What the model
    returns."""
    _state.off, _state.heads, _state.outs = off or Off(), [], []
    rows = 1 if off is None or off.where is None else len(off.where)
    return model(input_ids=torch.tensor([list(ids)] * rows), **kwargs)


def head_counts() -> list[tuple[int, int]]:
    """Query and key/value heads of each call of the last pass."""
    return list(_state.heads)


def head_outputs() -> list[torch.Tensor]:
    """What the heads gave in each call of the last pass, [T, H, D] of its first row, before any was off."""
    return [out[0] for out in _state.outs]


def _next_log_probs(model, ids: Sequence[int], off: Off | None = None) -> torch.Tensor:
    return torch.log_softmax(forward(model, ids, off, use_cache=False).logits[0, -1].double(), -1)


def ships(model, prompts: Sequence[Sequence[int]], *, end: bool = False) -> torch.Tensor:
    """KL(base || head's logits x 1e-5) of the next token in nats, float64 [P, attention calls, H]. end: at the last token only."""
    with oracle_attention(model):
        base = [_next_log_probs(model, ids) for ids in prompts]
        heads = [count for count, _ in head_counts()]
        out = torch.full((len(prompts), len(heads), max(heads, default=0)), float("nan"), dtype=torch.float64)
        for p, ids in enumerate(prompts):
            last = torch.zeros(1, len(ids), dtype=torch.bool)
            last[0, -1] = True
            for call, count in enumerate(heads):
                for head in range(count):
                    other = _next_log_probs(model, ids, Off([(call, head)], where=last if end else None))
                    out[p, call, head] = (base[p].exp() * (base[p] - other)).sum()
    return out


def next_log_probs(model, ids: Sequence[int], heads: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """Log probabilities [V] of the token after `ids` with these heads off."""
    with oracle_attention(model):
        return _next_log_probs(model, ids, Off(heads))


def greedy(model, ids: Sequence[int], heads: Sequence[tuple[int, int]], new_tokens: int) -> list[int]:
    """Greedy text with these heads off, every token by a forward pass over all before it."""
    text: list[int] = []
    with oracle_attention(model):
        for _ in range(new_tokens):
            text.append(int(_next_log_probs(model, [*ids, *text], Off(heads)).argmax()))
    return text
