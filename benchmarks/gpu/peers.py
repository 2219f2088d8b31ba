"""The same scan done the ways others do it, on a sample of its passes, with prompts of unequal length.

A pass is a forward call that gives the scores of a unit of work. All passes of a path are alike up to a known weight
(layers run), so that a few, evenly spread, tell what all take; rows say so. Undifferentiated attention scales the
query of a head: after the projection, or after the family's own norm of queries where there is one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..peers import EPS, hooked, kl_nats
from .clock import seconds
from .session import Session

SORTED_BATCHES = 4
ROW_TOKENS = 32768  # tokens of one call of the row masks
Head = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts; seen is None where none has padding. index: the prompts' places in the case."""

    index: list[int]
    ids: torch.Tensor  # int64 [P, T]
    seen: torch.Tensor | None  # int64 [P, T]
    position: torch.Tensor  # int64 [P, T]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], index: Sequence[int], device: torch.device) -> Batch:
        chosen = [prompts[i] for i in index]
        width = max(map(len, chosen))
        ids = torch.tensor([[0] * (width - len(x)) + list(x) for x in chosen], device=device)
        seen = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in chosen], device=device)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        return cls(list(index), ids, None if bool(seen.all()) else seen, position)

    def repeated(self, times: int) -> Batch:
        more = lambda x: None if x is None else x.repeat(times, 1)
        return Batch(self.index * times, more(self.ids), more(self.seen), more(self.position))


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> list[Batch]:
    return [Batch.of(prompts, range(len(prompts)), device)]


def length_sorted(prompts: Sequence[Sequence[int]], device: torch.device) -> list[Batch]:
    """Prompts of similar length together, so that less is padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = -(-len(order) // SORTED_BATCHES)
    return [Batch.of(prompts, order[start : start + size], device) for start in range(0, len(order), size)]


def equal_length(prompts: Sequence[Sequence[int]], device: torch.device) -> list[Batch]:
    """Prompts of one length together: nothing is padded, and nothing that a model does to padding matters."""
    places: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        places.setdefault(len(ids), []).append(i)
    return [Batch.of(prompts, index, device) for index in places.values()]


@torch.inference_mode()
def next_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(
        input_ids=batch.ids, attention_mask=batch.seen, position_ids=batch.position, use_cache=False, logits_to_keep=1
    ).logits[:, -1]  # fmt: skip


def query_module(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The module whose output is the queries up to their rotation: what scales it scales the logits."""
    attention = model.model.layers[layer].self_attn
    return getattr(attention, "q_norm", None) or attention.q_proj


def scaled(heads: Sequence[int], size: int) -> Callable:
    """A hook that scales the queries of some heads in place, [..., H * D] or [..., H, D]."""

    def hook(_module, _args, out):
        wide = out if out.dim() == 4 else out.unflatten(-1, (-1, size))
        for head in heads:
            wide[:, :, head] *= EPS

    return hook


@contextlib.contextmanager
def head_off(model: PreTrainedModel, head: Head):
    with hooked(query_module(model, head[0]), scaled([head[1]], model.config.head_dim)):
        yield


@torch.inference_mode()
def plain_kl(model: PreTrainedModel, batches: Sequence[Batch], heads: Sequence[Head]) -> torch.Tensor:
    """KL(base || ablated) in nats by plain hooked passes, in float64 of the model's logits: [heads, P]."""
    count = sum(len(b.index) for b in batches)
    out = torch.full((len(heads), count), float("nan"), dtype=torch.float64)
    for batch in batches:
        base = torch.log_softmax(next_logits(model, batch).double(), -1)
        for number, head in enumerate(heads):
            with head_off(model, head):
                other = torch.log_softmax(next_logits(model, batch).double(), -1)
            out[number, batch.index] = (base.exp() * (base - other)).sum(-1).cpu()
    return out


@dataclass(frozen=True)
class Measured:
    """seconds: of all the work; of what share of it that is an extrapolation; scores by (head, prompt)."""

    seconds: float
    done: int
    units: int
    scores: dict[tuple[Head, int], float]


def sample(
    session: Session,
    units: Sequence,
    weight: Callable[[object], float],
    run: Callable[[object], dict[tuple[Head, int], float]],
    budget_s: float,
) -> Measured:
    """Run units in a seeded random order while `budget_s` lasts, two at least, after one that warms up."""
    order = list(units)
    random.Random(0).shuffle(order)
    run(order[0])
    spent = done_weight = 0.0
    scores: dict[tuple[Head, int], float] = {}
    done = 0
    for unit in order:
        taken, found = seconds(lambda unit=unit: run(unit), session.device)
        spent, done_weight, done = spent + taken, done_weight + weight(unit), done + 1
        scores |= found
        if spent >= budget_s and done >= 2:
            break
    total = sum(map(weight, order))
    return Measured(spent * total / done_weight, done, len(order), scores)


def every_head(model: PreTrainedModel) -> list[Head]:
    config = model.config
    return [(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]


def hooks_batched(
    session: Session, model: PreTrainedModel, batches: list[Batch], budget_s: float
) -> Measured:
    """One forward pass per head and batch, a hook on the queries."""
    bases = [next_logits(model, batch) for batch in batches]

    def run(head: Head):
        found = []
        with head_off(model, head):
            for batch, base in zip(batches, bases, strict=True):
                found.append(kl_nats(base, next_logits(model, batch)))
        kl = torch.cat(found).tolist()
        return dict(zip([(head, p) for batch in batches for p in batch.index], kl, strict=True))

    return sample(session, every_head(model), lambda _: 1.0, run, budget_s)


def row_masks(session: Session, model: PreTrainedModel, batches: list[Batch], budget_s: float) -> Measured:
    """Heads x prompts rows in one call, as many as ROW_TOKENS tokens hold, each row with its own head scaled."""
    (batch,) = batches
    config = model.config
    prompts, width = batch.ids.shape
    heads = config.num_attention_heads
    step = max(1, min(heads, ROW_TOKENS // (prompts * width)))
    base = next_logits(model, batch)
    units = [
        (i, range(h, min(heads, h + step)))
        for i in range(config.num_hidden_layers)
        for h in range(0, heads, step)
    ]

    def run(unit):
        layer, chosen = unit
        rows = batch.repeated(len(chosen))
        mask = torch.ones(len(chosen), prompts, 1, heads, 1, dtype=model.dtype, device=session.device)
        mask[torch.arange(len(chosen)), :, :, torch.tensor(list(chosen))] = EPS
        mask = mask.flatten(0, 1)
        hook = lambda _module, _args, out: (out.unflatten(-1, (heads, -1)) * mask).flatten(2)
        with hooked(model.model.layers[layer].self_attn.q_proj, hook):
            logits = next_logits(model, rows).unflatten(0, (len(chosen), prompts))
        kl = kl_nats(base, logits).tolist()
        return {
            ((layer, head), p): kl[number][place]
            for number, head in enumerate(chosen)
            for place, p in enumerate(batch.index)
        }

    return sample(session, units, lambda unit: len(unit[1]), run, budget_s)


def skip_lower_layers(
    session: Session, model: PreTrainedModel, batches: list[Batch], budget_s: float
) -> Measured:
    """Hidden states are kept from one pass, and a head of layer l costs layers >= l."""
    (batch,) = batches
    decoder, width = model.model, batch.ids.shape[1]
    with torch.inference_mode():
        kept = model(
            input_ids=batch.ids, attention_mask=batch.seen, position_ids=batch.position, use_cache=False,
            output_hidden_states=True, logits_to_keep=1,
        ).hidden_states  # fmt: skip
        rotary = decoder.rotary_emb(kept[0], batch.position)
    visible = torch.ones(width, width, dtype=torch.bool, device=session.device).tril()[None, None]
    if batch.seen is not None:
        own = torch.eye(
            width, dtype=torch.bool, device=session.device
        )  # padding sees itself: no row is empty
        visible = (visible & batch.seen.bool()[:, None, None, :]) | own
    layers = model.config.num_hidden_layers

    @torch.inference_mode()
    def upwards(x: torch.Tensor, start: int) -> torch.Tensor:
        for layer in decoder.layers[start:]:
            x = layer(x, attention_mask=visible, position_embeddings=rotary, position_ids=batch.position)
        return model.lm_head(decoder.norm(x[:, -1]))

    base = upwards(kept[0], 0)

    def run(head: Head):
        with head_off(model, head):
            kl = kl_nats(base, upwards(kept[head[0]], head[0])).tolist()
        return {(head, p): kl[place] for place, p in enumerate(batch.index)}

    # The head and the start weigh as half a layer, so that the last layer is not counted as free.
    return sample(session, every_head(model), lambda head: layers - head[0] + 0.5, run, budget_s)


def one_at_a_time(
    session: Session, model: PreTrainedModel, prompts: Sequence[Sequence[int]], budget_s: float
) -> Measured:
    """The loop of the paper's published code: a pass for each prompt and head, eager attention, a cache built in each,
    logits of every position."""
    draw = random.Random(0)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    heads = every_head(model)
    units = [(draw.choice(heads), draw.randrange(len(prompts))) for _ in range(256)]

    @torch.inference_mode()
    def logits(p: int) -> torch.Tensor:
        ids = torch.tensor([prompts[p]], device=session.device)
        return model(input_ids=ids, use_cache=True).logits[:, -1]

    bases: dict[int, torch.Tensor] = {}

    def run(unit):
        head, p = unit
        with head_off(model, head):
            other = logits(p)
        return {(head, p): other}

    try:
        found = sample(session, units, lambda _: 1.0, run, budget_s)
        scores = {}
        for (head, p), other in found.scores.items():
            bases.setdefault(p, logits(p))
            scores[head, p] = float(kl_nats(bases[p], other)[0])
    finally:
        model.set_attn_implementation(before)
    passes = (len(heads) + 1) * len(prompts)
    return Measured(found.seconds / len(units) * passes, found.done, passes, scores)
