"""The definition of a Ships scan for any family: one forward pass per head and prompt, nothing packed.

The model runs as transformers has it, but for one thing: attention is `_attention` below, written from its
definition, which scales the logits of one head in one of the calls that a forward pass makes. Calls are counted, not
looked up, so the oracle does not rely on what shipsfast thinks a layer is. What a model hands to attention and
`_attention` does not know makes it raise.
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


@dataclass
class _State:
    targets: Sequence[tuple[int, int]] = ()  # (call, head) pairs whose logits are scaled
    end: bool = False  # those of the last token alone
    calls: int = 0
    heads: list[int] = field(default_factory=list)  # of each call


_state = _State()


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    unknown = {name for name, x in kwargs.items() if x is not None and name not in SILENT}
    assert not unknown, f"the oracle does not know {unknown}"
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
    for call, head in _state.targets:
        if call == _state.calls:
            logits[:, head, -1 if _state.end else 0 :] *= EPS
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens = logits.shape[-2]
    if attention_mask is None:
        assert getattr(module, "is_causal", True), "no mask, and not causal"
        attention_mask = logits.new_full((tokens, tokens), float("-inf")).triu(1)
    logits = logits + attention_mask
    if s_aux is not None:  # one more logit per head, whose weight goes nowhere
        sink = s_aux.reshape(1, -1, 1, 1).to(logits.dtype).expand(len(logits), -1, tokens, 1)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    _state.heads.append(query.shape[1])
    _state.calls += 1
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), None


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
        _state.targets, _state.end = (), False


@torch.no_grad()
def _next_log_probs(model, ids: Sequence[int], targets: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    _state.targets, _state.calls, _state.heads = targets, 0, []
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return torch.log_softmax(logits[0, -1].double(), -1)


def ships(model, prompts: Sequence[Sequence[int]], *, end: bool = False) -> torch.Tensor:
    """KL(base || head's logits x 1e-5) of the next token in nats, float64 [P, attention calls, H]. end: at the last token only."""
    with oracle_attention(model):
        _state.end = end
        base = [_next_log_probs(model, ids) for ids in prompts]
        heads = list(_state.heads)
        out = torch.full((len(prompts), len(heads), max(heads, default=0)), float("nan"), dtype=torch.float64)
        for p, ids in enumerate(prompts):
            for call, count in enumerate(heads):
                for head in range(count):
                    other = _next_log_probs(model, ids, [(call, head)])
                    out[p, call, head] = (base[p].exp() * (base[p] - other)).sum()
    return out


def next_log_probs(model, ids: Sequence[int], heads: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """Log probabilities [V] of the token after `ids` with these heads off."""
    with oracle_attention(model):
        return _next_log_probs(model, ids, heads)


def greedy(model, ids: Sequence[int], heads: Sequence[tuple[int, int]], new_tokens: int) -> list[int]:
    """Greedy text with these heads off, every token by a forward pass over all before it."""
    text: list[int] = []
    with oracle_attention(model):
        for _ in range(new_tokens):
            text.append(int(_next_log_probs(model, [*ids, *text], heads).argmax()))
    return text
