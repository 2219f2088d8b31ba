"""The attention function that transformers models call while shipsfast works on them.

It is registered with transformers' AttentionInterface under two names: `shipsfast_tree` for scans, where
the tokens are a packed prefix tree, and `shipsfast_dense` for `ablate`, where the model is driven as usual
with padding, cache and dense masks. A decode step of `generate` goes by the first name too: its calls bring the cache. What it has to do is not global: each attention module carries it in
an attribute for as long as `installed` lasts. It uses what a model passes to attention, or refuses it by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.utils.output_capturing import _active_collector

from ..errors import InputError, UnsupportedModelError
from ..ops.end_attention import end_attention
from ..ops.masks import LayerMask, scaled
from ..ops.tree_attention import TreeContext, tree_attention
from ..ops.tree_attention_torch import visible_attention, visible_weights
from ..replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from .forward import evaluating
from .probing import Visible, probe, record_call, window_of

TREE, DENSE = "shipsfast_tree", "shipsfast_dense"
LONG = 2048  # tokens from which on `ablate` makes no mask where only causality hides anything
ATTRIBUTE = "_shipsfast_call"  # on the attention module: what to do in the next call
# Passed by some models, and without influence on what is computed here: visibility comes from the tree
# (scans) or the mask (ablate), and neither weights nor caches are returned.
_IGNORED = {
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "is_causal", "logits_to_keep", "past_key_values", "return_dict",
    "tokenizer", "assistant_tokenizer",  # `generate` hands on what its stop strings need
}  # fmt: skip


@dataclass
class TreeCall:
    """One call of a layer: rows with their mask vectors, over a tree."""

    tree: TreeContext
    window: int | None
    mask: LayerMask
    capture: bool = False  # keep keys and values, then leave the layer by raising Captured
    # Use these keys and values; queries are the trimmed ones.
    kv: tuple[torch.Tensor, torch.Tensor] | None = None
    tap: Callable[[torch.Tensor], None] | None = None  # is shown the heads' outputs [B, TQ, H, D]
    # Is shown the values [B, HKV, T, D], the function that makes outputs of them or of others in their place, and the sinks.
    attend: Callable[[torch.Tensor, Callable, torch.Tensor | None], None] | None = None
    # Is shown keys and values [B, HKV, T, D].
    keep: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    only: torch.Tensor | None = (
        None  # the mask is for these queries, int64 [U], those that the tree trims to; others are untouched
    )


@dataclass
class EndCall:
    """One call of a layer at the tree's ends: each token of a row stands at one of its nodes in the place of the base row's token,
    and sees the base row's keys and values above it."""

    tree: TreeContext
    window: int | None
    mask: LayerMask
    base: tuple[torch.Tensor, torch.Tensor]  # keys and values [1, HKV, T, D]


class Captured(Exception):
    """Carries the keys and values of a layer out of its forward."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.kv = (key, value)


@dataclass
class DecodeCall:
    """One call of a layer in a decode step: one new token per row, earlier ones in a cache.

    attend(q [B, H, D], k, v [B, HKV, D], scaling, softcap, sink) -> [B, H, DV]
    """

    attend: Callable[..., torch.Tensor]


@dataclass
class DenseCall:
    """`ablate`: masks as the model makes them. One set of heads for all rows of the batch, or one per row.

    end: the mask is for the last query of the call, and the others are untouched.
    """

    mask: LayerMask  # of 1 or B rows
    end: bool = False


def ablated_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function. query [B, H, T, D]; key, value [B, HKV, T, D] -> ([B, T, H, D], None), inside
    `ablate` with the attention weights [B, H, T, keys] where they are asked for.

    s_aux: [H], attention sinks.
    """
    unknown = sorted(k for k, x in kwargs.items() if x is not None and k not in _IGNORED)
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which shipsfast does not know "
            "how to ablate exactly: this model cannot be scanned"
        )
    if dropout:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for attention dropout {dropout} in evaluation mode"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} is not causal: only decoders can be scanned")
    if s_aux is not None and s_aux.numel() != query.shape[1]:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes attention sinks of shape {list(s_aux.shape)}: one for each of its "
            f"{query.shape[1]} heads was expected"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    how = {"scaling": scaling, "softcap": softcap, "sink": None if s_aux is None else s_aux.reshape(-1)}

    recorder = probe.get()
    if recorder is not None:
        return record_call(recorder, module, query, key, value, attention_mask, sliding_window), None
    call = getattr(module, ATTRIBUTE, None)
    if isinstance(call, TreeCall):
        return _tree(call, query, key, value, how), None
    if isinstance(call, EndCall):
        ends = end_attention(call.tree, call.base, query, key, value, call.mask, window=call.window, **how)
        return ends, None
    if isinstance(call, DecodeCall):
        out = call.attend(*(x[:, :, 0] for x in (query, key, value)), **how)
        return out[:, None], None
    if isinstance(call, DenseCall):
        return _dense(call, module, query, key, value, attention_mask, _weights_asked(module, kwargs), **how)
    raise UnsupportedModelError(f"{type(module).__name__} was not found when the model was inspected")


def _tree(call: TreeCall, query, key, value, how: dict) -> torch.Tensor:
    if call.capture:
        raise Captured(key, value)
    if call.keep is not None:
        call.keep(key, value)
    trimmed = call.kv is not None
    if call.kv is not None:
        key, value = call.kv
    plan = call.tree.plan(call.window, trimmed, query)
    mask, how = call.mask, {"window": call.window} | how
    if call.only is None:
        out = tree_attention(call.tree, query, key, value, mask, plan, **how)
    else:
        rows, heads = mask.logit_scale.shape
        untouched = LayerMask.untouched(rows, heads, mask.logit_scale.dtype, mask.logit_scale.device)
        out = tree_attention(call.tree, query, key, value, untouched, plan, **how)
        query, mask = query.index_select(2, call.only), mask.at(call.only)
        plan = call.tree.plan(call.window, True, query)
        out[:, call.only] = tree_attention(call.tree, query, key, value, mask, plan, **how)
    if call.tap is not None:
        call.tap(out)
    if call.attend is not None:
        attend = lambda values: tree_attention(call.tree, query, key, values, mask, plan, **how)
        call.attend(value, attend, how["sink"])
    return out


def _weights_asked(module: torch.nn.Module, kwargs: dict) -> bool:
    """Whether the call is to return attention weights: asked for by the model's caller or by its config."""
    collected = (
        _active_collector.get()
    )  # most models tell the hooks that collect outputs, and not their attention
    if collected is not None and "attentions" in collected:
        return True
    asked = kwargs.get("output_attentions")
    return bool(
        getattr(getattr(module, "config", None), "output_attentions", False) if asked is None else asked
    )


def _dense(
    call: DenseCall, module, query, key, value, visible, weights_asked: bool, **how
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if call.end:
        out = visible_attention(*_repeated(query, key, value), visible, **how).transpose(1, 2).contiguous()
        mask = call.mask
        if mask.value is not None:
            mask = replace(mask, value=mask.value[:, -1:], per_token=False)
        seen = (
            key.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool) if visible is None else visible[..., -1:, :]
        )
        out[:, -1:] = _dense(DenseCall(mask), module, query[:, :, -1:], key, value, seen, False, **how)[0]
        return out, None
    mask, alt = call.mask, call.mask.replacements(query, key)
    other_q, other_k, fixed = map(mask.flagged, (REPLACE_Q, REPLACE_K, REPLACE_OUT))
    if other_q is not None:
        query = torch.where(other_q[:, :, None, None], alt["q_alt"][:, None], query)
    query = query * mask.logit_scale.to(query.dtype)[:, :, None, None]
    query, key, value = _repeated(query, key, value)
    if other_k is not None:
        key = torch.where(other_k[:, :, None, None], alt["k_alt"][:, None], key)
    out = visible_attention(query, key, value, visible, **how)
    weights = visible_weights(query, key, visible, **how) if weights_asked else None
    before = out.transpose(1, 2)
    if fixed is not None:
        tokens = mask.value.shape[1]
        if mask.per_token and (tokens != out.shape[2] or key.shape[2] != out.shape[2]):
            raise InputError(
                f"resample ablation has outputs for {tokens} tokens, and {type(module).__name__} was called with "
                f"{out.shape[2]} tokens and {key.shape[2]} keys: run passes of that length, without a cache"
            )
        out = torch.where(fixed[:, :, None, None], mask.value[None], out)
    out = scaled(out, mask.output_scale[:, :, None, None]).transpose(1, 2)
    return mask.finish(out, before).contiguous(), weights


def _repeated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same with keys and values of their own for each query head."""
    repeat = query.shape[1] // key.shape[1]
    return (query, *(x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value)))


def _tree_mask(mask_function, **kwargs):
    """transformers' mask function for scans: hands out no mask, and when probed finds out what it would hide."""
    recorder = probe.get()
    if recorder is None:
        return Visible(None)  # the window is known per layer by then
    return Visible(window_of(mask_function, recorder.longest, kwargs.get("device", "cpu")))


def _dense_mask(*args, **kwargs):
    padding, length = kwargs.get("attention_mask"), kwargs["q_length"]
    plain = kwargs.get("allow_is_causal_skip", True) and kwargs.get("local_size") is None
    whole = length == kwargs["kv_length"] and not kwargs.get("q_offset") and not kwargs.get("kv_offset")
    if plain and whole and length >= LONG and (padding is None or bool(padding.all())):
        return None  # causal, and a mask of T x T would be all there is in memory
    kwargs["allow_is_causal_skip"] = False  # the mask must always say what is visible
    return sdpa_mask(*args, **kwargs)


def _configs(model: torch.nn.Module) -> list[PretrainedConfig]:
    """Every distinct config object that some module of the model consults."""
    found: dict[int, PretrainedConfig] = {}

    def add(config) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in getattr(config, "sub_configs", {}):
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


@contextlib.contextmanager
def installed(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model in evaluation mode with its attention going through this file; all put back afterwards."""
    AttentionInterface.register(TREE, ablated_attention)
    AttentionInterface.register(DENSE, ablated_attention)
    AttentionMaskInterface.register(TREE, _tree_mask)
    AttentionMaskInterface.register(DENSE, _dense_mask)
    configs = [(c, c._attn_implementation_internal) for c in _configs(model)]
    try:
        for config, _ in configs:
            config._attn_implementation_internal = name
        with evaluating(model):
            yield
    finally:
        for config, before in configs:
            config._attn_implementation_internal = before
