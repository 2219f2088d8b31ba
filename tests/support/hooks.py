"""The oracle of the ablation tests: forward hooks on a model's own modules, written from the definitions.

One prompt per forward pass, nothing packed, no mask vectors. Queries and keys are changed where the model hands
them to its rotary embedding (which is linear and the same for every head, so that scaling and means over heads
commute with it), outputs of heads where they enter the output projection. Every change reads what the layer's heads
have before any change in that layer.

The attention between is `plain_attention` below: transformers' own eager attention rounds its softmax to float32 in
float64 models as well, which would hide everything below 1e-7.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

PLAIN = "hooks_oracle"
EPS = 1e-5

Head = tuple[int, int]
Change = Callable[[torch.Tensor], torch.Tensor]  # of one prompt's [T, heads, D]


def plain_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_kwargs):
    """softmax(scaling q k^T + mask) v in the model's dtype, with tanh softcap before the mask."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    return torch.einsum("bhqk,bhkd->bqhd", torch.softmax(logits, -1), value).contiguous(), None


class Site:
    """One layer's attention: where hooks see its queries, its keys and the outputs of its heads."""

    def __init__(self, model, layer: int) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", self.heads)
        self.family = config.model_type
        if self.family == "gpt2":
            self.attention = model.transformer.h[layer].attn
        else:
            self.attention = model.model.layers[layer].self_attn
        self.size = self.attention.head_dim

    def on_query(self, change: Change):
        if self.family == "gpt2":
            return self._on_output(self.attention.c_attn, change, slice(0, self.heads * self.size))
        after_norm = self.family == "qwen3"
        return self._on_output(self.attention.q_norm if after_norm else self.attention.q_proj, change)

    def on_key(self, change: Change):
        if self.family == "gpt2":
            start = self.heads * self.size
            return self._on_output(self.attention.c_attn, change, slice(start, 2 * start))
        after_norm = self.family == "qwen3"
        return self._on_output(self.attention.k_norm if after_norm else self.attention.k_proj, change)

    def on_out(self, change: Change):
        def hook(_module, args):
            (out,) = args
            return (change(out.view(out.shape[1], self.heads, self.size)).reshape(out.shape),)

        projection = self.attention.c_proj if self.family == "gpt2" else self.attention.o_proj
        return projection.register_forward_pre_hook(hook)

    def _on_output(self, module, change: Change, columns: slice = slice(None)):
        def hook(_module, _args, out):
            new = out.clone()
            part = out[..., columns] if self.family == "gpt2" else out
            changed = change(part.reshape(out.shape[1], -1, self.size)).reshape(part.shape)
            new[..., columns] = changed
            return new

        return module.register_forward_hook(hook)


@dataclass(frozen=True)
class Off:
    """Heads that are off in one way. values: per layer [T or 1, H, D], for `mean` and `resample`."""

    heads: tuple[Head, ...]
    kind: str
    eps: float = EPS
    values: Sequence[torch.Tensor] | None = None

    def at(self, layer: int) -> list[int]:
        return [head for where, head in self.heads if where == layer]


@dataclass
class Pass:
    """logits [T, V]; hidden [hidden], what the output embeddings get at the last position; outs: per layer
    [T, H, D], the heads' outputs before any change."""

    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    outs: dict[int, torch.Tensor] = field(default_factory=dict)


def forward(model, ids: Sequence[int], *offs: Off) -> Pass:
    """One prompt through the model with these heads off.

    A key/value head serves several query heads, so a query head with other keys needs a pass of its own: all keys of
    the layer are replaced in it, and only that query head's output is taken over to the next.
    """
    taken: dict[Head, torch.Tensor] = {}
    with plain(model):
        for layer in sorted({at for off in offs if off.kind == "head_mean_k" for at, _ in off.heads}):
            outs = _pass(model, ids, offs, taken, mean_keys_in=layer).outs[layer]
            heads = [head for off in offs if off.kind == "head_mean_k" for head in off.at(layer)]
            taken |= {(layer, head): outs[:, head] for head in heads}
        return _pass(model, ids, offs, taken)


@torch.no_grad()
def _pass(model, ids, offs, taken, mean_keys_in: int | None = None) -> Pass:
    result = Pass()

    def mean_of_heads(x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand_as(x)

    with contextlib.ExitStack() as undo:
        for layer in range(model.config.num_hidden_layers):
            site = Site(model, layer)

            def query(q: torch.Tensor, layer=layer) -> torch.Tensor:
                new = q.clone()
                for off in offs:
                    for head in off.at(layer):
                        if off.kind == "head_mean_q":
                            new[:, head] = mean_of_heads(q)[:, head]
                        elif off.kind in ("undifferentiated", "uniform"):
                            new[:, head] = q[:, head] * (off.eps if off.kind == "undifferentiated" else 0)
                return new

            def out(o: torch.Tensor, layer=layer) -> torch.Tensor:
                result.outs[layer] = o.clone()
                new = o.clone()
                for off in offs:
                    for head in off.at(layer):
                        if off.kind in ("scale", "zero"):
                            new[:, head] = o[:, head] * (off.eps if off.kind == "scale" else 0)
                        elif off.kind == "head_mean_v":
                            new[:, head] = mean_of_heads(o)[:, head]
                        elif off.kind in ("mean", "resample"):
                            new[:, head] = off.values[layer][:, head]
                        elif off.kind == "head_mean_k" and (layer, head) in taken:
                            new[:, head] = taken[layer, head]
                return new

            handles = [site.on_out(out)]
            if any(off.at(layer) for off in offs):
                handles.append(site.on_query(query))
            if layer == mean_keys_in:
                handles.append(site.on_key(mean_of_heads))
            for handle in handles:
                undo.callback(handle.remove)

        def head_input(_module, args):
            result.hidden = args[0][0, -1].clone()

        undo.callback(model.get_output_embeddings().register_forward_pre_hook(head_input).remove)
        result.logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0].clone()
    return result


@contextlib.contextmanager
def plain(model) -> Iterator[None]:
    """The model with `plain_attention`."""
    AttentionInterface.register(PLAIN, plain_attention)
    AttentionMaskInterface.register(PLAIN, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def mean_values(model, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Per layer [1, H, D]: the mean of the heads' outputs over all tokens of all prompts, each prompt for itself."""
    passes = [forward(model, ids).outs for ids in prompts]
    return [
        torch.cat([outs[layer] for outs in passes]).mean(0, keepdim=True)
        for layer in range(model.config.num_hidden_layers)
    ]


def resample_values(model, ids: Sequence[int]) -> list[torch.Tensor]:
    """Per layer [T, H, D]: the heads' outputs on another prompt."""
    outs = forward(model, ids).outs
    return [outs[layer] for layer in range(model.config.num_hidden_layers)]


def unit_heads(model, unit: str) -> dict[Head, tuple[Head, ...]]:
    """Every unit of the model, and its query heads: a key/value head serves neighbouring query heads."""
    site = Site(model, 0)
    count = site.heads if unit == "head" else site.kv_heads
    size = site.heads // count
    return {
        (layer, index): tuple((layer, index * size + i) for i in range(size))
        for layer in range(model.config.num_hidden_layers)
        for index in range(count)
    }


def kl_nats(base: torch.Tensor, other: torch.Tensor) -> float:
    """KL(softmax(base) || softmax(other)) of logits [V]."""
    base, other = (torch.log_softmax(x.double(), -1) for x in (base, other))
    return float((base.exp() * (base - other)).sum())


def principal_angles_deg(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Principal angles [r] between the spans of orthonormal columns [P, r], rising, each to about 1e-14 degrees.

    atan2 of sine and cosine. scipy.linalg.subspace_angles chooses between arcsine and arccosine, and up to 1.17 does
    so for the wrong angles when some, and not all, are above 45 degrees: it is then off by up to 1e-6 degrees.
    """
    cosine = np.linalg.svd(base.T @ other, compute_uv=False)
    sine = np.linalg.svd(other - base @ (base.T @ other), compute_uv=False)[::-1]
    return np.rad2deg(np.arctan2(sine, cosine))


class Oracle:
    """Scores of a model on prompts, with heads off in one way.

    sources: the prompts of `mean` (None: the scanned ones) and `resample` (one for each, or one for all).
    """

    def __init__(self, model, prompts, kind: str, eps: float = EPS, sources=None) -> None:
        self.model, self.prompts, self.kind, self.eps = model, prompts, kind, eps
        self.values: list = [None] * len(prompts)
        if kind == "mean":
            self.values = [mean_values(model, sources or prompts)] * len(prompts)
        elif kind == "resample":
            each = sources if len(sources) > 1 else sources * len(prompts)
            self.values = [resample_values(model, ids) for ids in each]
        self._passes: dict[frozenset, list[Pass]] = {}

    def passes(self, heads: Sequence[Head] = ()) -> list[Pass]:
        """Every prompt's pass with these heads off together."""
        key = frozenset(heads)
        if key not in self._passes:
            off = tuple(sorted(key))
            self._passes[key] = [
                forward(self.model, ids, Off(off, self.kind, self.eps, values))
                for ids, values in zip(self.prompts, self.values, strict=True)
            ]
        return self._passes[key]

    def ships(self, unit: str = "head") -> np.ndarray:
        """KL(base || unit off) of the next token in nats, [P, L, units]."""
        units = unit_heads(self.model, unit)
        layers, count = (1 + n for n in max(units))
        scores = np.full((len(self.prompts), layers, count), np.nan)
        for (layer, index), heads in units.items():
            both = zip(self.passes(), self.passes(heads), strict=True)
            scores[:, layer, index] = [kl_nats(base.logits[-1], other.logits[-1]) for base, other in both]
        return scores

    def hidden(self, heads: Sequence[Head] = ()) -> np.ndarray:
        """Hidden states after the final norm at the last position, [P, hidden]."""
        return torch.stack([each.hidden for each in self.passes(heads)]).numpy()

    def angle_deg(self, heads: Sequence[Head], rank: int) -> float:
        """Sum of the principal angles between the leading left singular subspaces with and without the heads."""
        base, other = (
            np.linalg.svd(x, full_matrices=False)[0][:, :rank] for x in (self.hidden(), self.hidden(heads))
        )
        return float(principal_angles_deg(base, other).sum())

    def angles_deg(
        self, rank: int, unit: str = "head", parent: Sequence[Head] = (), among: Sequence[Head] | None = None
    ) -> np.ndarray:
        """The angle of every unit (of those in `among`) off together with the units `parent`, [L, units].

        NaN where a unit is in `parent` already.
        """
        units = unit_heads(self.model, unit)
        layers, count = (1 + n for n in max(units))
        angles = np.full((layers, count), np.nan)
        off = [head for each in parent for head in units[each]]
        for each, heads in units.items():
            if each not in parent and (among is None or each in among):
                angles[each] = self.angle_deg([*off, *heads], rank)
        return angles
