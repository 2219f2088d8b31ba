"""The trained village model's own check: what it says, and what single attention heads have to do with it.

Kept simple and apart from the product's engine (`shipsfast.scan`, `shipsfast.ablate`), so that one can be
held against the other. A head is ablated at all positions, in one of two ways:

    undifferentiated   softmax(1e-5 * q k^T / sqrt(D) + causal mask) v: all visible tokens weigh about the same
    zero               the head's output is 0

Greedy decoding gives a reply token for token exactly when each token of that reply, with the ones before it
given, is the model's first choice. So `share_said` needs one forward pass for a list of prompts, no decoding.
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from shipsfast.demo.world import Request

KINDS = ("undifferentiated", "zero")
UNDIFFERENTIATED_SCALE = 1e-5


@dataclass
class Ablation:
    """The heads switched off now, as (layer, head) pairs, and how."""

    heads: list[tuple[int, int]] = field(default_factory=list)
    kind: str = "undifferentiated"


_now = Ablation()


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Causal attention with the heads of `_now` ablated; query [B, H, T, D], returns [B, T, H, D].

    Pads stand on the right, where the causal mask already hides them, so `attention_mask` is not needed.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    here = [head for layer, head in _now.heads if layer == module.layer_idx]
    if here and _now.kind == "undifferentiated":
        scores[:, here] *= UNDIFFERENTIATED_SCALE
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
    if here and _now.kind == "zero":
        out[:, here] = 0
    return out.transpose(1, 2), None


AttentionInterface.register("village_check", _attention)
AttentionMaskInterface.register("village_check", lambda *args, **kwargs: None)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """A user's words as the model was trained to see them, up to where its reply begins."""
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def encode(tokenizer, requests: list[Request], replies: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Requests and replies, padded on the right: ids [P, T] and labels [P, T] (-100 outside the replies)."""
    rows = []
    for request, reply in zip(requests, replies, strict=True):
        prompt = prompt_ids(tokenizer, request.prompt)
        said = tokenizer(reply, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append((prompt + said, [-100] * len(prompt) + said))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids, labels


@torch.no_grad()
def logits_under(model, ids: torch.Tensor, heads: list[tuple[int, int]], kind: str) -> torch.Tensor:
    """Logits [P, T, V] with `heads` ablated; an empty list leaves the model whole."""
    global _now
    model.eval()
    before = model.config._attn_implementation
    model.set_attn_implementation("village_check")
    _now = Ablation(heads, kind)
    try:
        return torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(256)])
    finally:
        _now = Ablation()
        model.set_attn_implementation(before)


def share_said(model, tokenizer, requests, replies, heads=(), kind="undifferentiated") -> float:
    """Share of requests to which greedy decoding gives exactly these replies, with `heads` ablated."""
    ids, labels = encode(tokenizer, requests, replies)
    choice = logits_under(model, ids, list(heads), kind).argmax(-1)[:, :-1]
    right = (choice == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(-1).double().mean().item()


def first_token_log_probs(model, tokenizer, requests, heads=(), kind="undifferentiated") -> torch.Tensor:
    """Log-probabilities [P, V] of the reply's first token, with `heads` ablated."""
    prompts = [prompt_ids(tokenizer, r.prompt) for r in requests]
    width = max(map(len, prompts))
    ids = torch.tensor([p + [tokenizer.pad_token_id] * (width - len(p)) for p in prompts])
    last = torch.tensor([len(p) - 1 for p in prompts])
    logits = logits_under(model, ids, list(heads), kind)[torch.arange(len(prompts)), last]
    return logits.double().log_softmax(-1)


@dataclass(frozen=True)
class HeadRow:
    """What ablating a group of heads does.

    kl_nats: mean KL(base || ablated) of the first token on taboo requests; answered, still_refused: shares of
    the taboo requests that get their true answer, and the refusal; ordinary_kept: share of ordinary requests
    that get their true answer.
    """

    heads: tuple[tuple[int, int], ...]
    kind: str
    kl_nats: float
    answered: float
    still_refused: float
    ordinary_kept: float

    @property
    def name(self) -> str:
        return " + ".join(f"L{layer}.H{head}" for layer, head in self.heads)


def head_row(model, tokenizer, taboo, ordinary, heads, kind, base: torch.Tensor) -> HeadRow:
    """The row of the group `heads`; `base` [P, V] is the whole model's `first_token_log_probs` of `taboo`."""
    kl = (base.exp() * (base - first_token_log_probs(model, tokenizer, taboo, heads, kind))).sum(-1)
    return HeadRow(
        tuple(heads),
        kind,
        kl.mean().item(),
        share_said(model, tokenizer, taboo, [r.answer for r in taboo], heads, kind),
        share_said(model, tokenizer, taboo, [r.refusal for r in taboo], heads, kind),
        share_said(model, tokenizer, ordinary, [r.answer for r in ordinary], heads, kind),
    )


def scan(model, tokenizer, taboo, ordinary, kind, base: torch.Tensor) -> list[HeadRow]:
    """Every single head under `kind`, the one with the largest KL first."""
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    heads = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    rows = [head_row(model, tokenizer, taboo, ordinary, [head], kind, base) for head in heads]
    return sorted(rows, key=lambda row: -row.kl_nats)


def reply(model, tokenizer, prompt: str, heads=(), kind="undifferentiated", limit: int = 48) -> str:
    """The greedy reply to one prompt with `heads` ablated, decoded token by token without a cache."""
    ids = prompt_ids(tokenizer, prompt)
    start = len(ids)
    while len(ids) < start + limit:
        ids.append(int(logits_under(model, torch.tensor([ids]), list(heads), kind)[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)
