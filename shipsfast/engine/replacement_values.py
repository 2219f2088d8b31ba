"""Where `mean` and `resample` ablations get the vectors that stand in for a head's output.

    mean      the head's output, averaged over every token of every prompt of a set: one vector per head
    resample  the head's output on another prompt, position by position as they are aligned (alignment.py)

Both come from passes of the unablated model over a packed prefix tree.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import InputError, note
from ..models.anatomy import Anatomy, check_model, check_own_dtype, inspect_model
from ..models.attention_hook import ATTRIBUTE, TREE, TreeCall, installed
from ..models.forward import input_device, last_logits_only
from ..ops.masks import LayerMask
from ..ops.prefix_tree import PackedPrompts, pack
from ..ops.tree_attention import TreeContext, resolve_backend
from ..prompts.tokens import to_tokens
from ..prompts.wrapping import Wrapping
from ..text import counted
from .ablate import is_ablated
from .ablation import Ablation
from .alignment import NONE, sources

MEAN_TOKENS = 2048  # tokens that pass the model together while a mean is taken


def source_ids(
    how: Ablation, token_ids: Sequence[Sequence[int]], own: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """Token ids of the ablation's prompts, one per scanned prompt for `resample`; those scanned if it has none of its own.

    Raises InputError where a `resample` prompt must be as long as the one it stands in for, and is not.
    """
    if own is None:
        return [list(ids) for ids in token_ids]
    ids = list(own)
    if how.kind == "mean":
        return ids
    if len(ids) == 1:
        ids = ids * len(token_ids)
    if len(ids) != len(token_ids):
        raise InputError(
            f"ablation resample has {counted(len(ids), 'prompt')} to take outputs from, and "
            f"{counted(len(token_ids), 'prompt')} to scan: give one for each, or one for all"
        )
    for i, (scanned, other) in enumerate(zip(token_ids, ids, strict=True)):
        if how.align == "exact" and len(scanned) != len(other):
            raise InputError(
                f"prompt {i} has {len(scanned)} tokens, and the prompt that resample takes outputs from has {len(other)}: "
                "positions are matched one to one, so both need the same number; align='end' or 'template' (--align) "
                "matches prompts of other lengths"
            )
    return ids


def mean_outputs(
    model: PreTrainedModel, anatomy: Anatomy, token_ids: Sequence[Sequence[int]], backend: str
) -> list[torch.Tensor]:
    """Mean output of every head over all tokens of all prompts: per layer float64 [H, 1, D]."""
    sums: list[torch.Tensor | None] = [None] * anatomy.num_layers
    for group in few_at_a_time(anatomy, token_ids):
        packed = pack(group)
        weight = through(packed, np.ones(len(group)))

        def add(layer: int, out: torch.Tensor, weight=weight) -> None:
            part = torch.einsum("t,thd->hd", torch.as_tensor(weight, device=out.device), out[0].double())
            sums[layer] = part if sums[layer] is None else sums[layer] + part

        tree_outputs(model, anatomy, packed, backend, add)
    count = sum(map(len, token_ids))
    return [(total / count)[:, None] for total in sums]


def few_at_a_time(anatomy: Anatomy, token_ids: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """All prompts, in groups that may be packed together and are not too many tokens for one pass."""
    order = sorted(range(len(token_ids)), key=lambda i: tuple(token_ids[i]))
    most = 0 if anatomy.plain_sequences else min(MEAN_TOKENS, anatomy.index_limit or MEAN_TOKENS)
    group: list[Sequence[int]] = []
    for number, at in enumerate(order, 1):
        group.append(token_ids[at])
        if number == len(order) or sum(map(len, group)) + len(token_ids[order[number]]) >= most:
            yield group
            group = []


def resample_outputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    packed: PackedPrompts,
    prompts: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    align: str,
    backend: str,
) -> list[torch.Tensor]:
    """What stands in for every head's output at every node of `packed`, the pack of `prompts`, from as many other prompts:
    per layer [H, T, D] in the model's dtype."""
    every = range(len(prompts))
    found = [sources(packed, prompts, others, align, every)]
    if anatomy.index_limit is not None and found[0][0].num_tokens >= anatomy.index_limit:
        found = [sources(packed, prompts, others, align, [i]) for i in every]
    kept: list[torch.Tensor | None] = [None] * anatomy.num_layers
    taken = np.any([index != NONE for _, index in found], axis=0)
    if not taken.all():
        found.insert(0, (packed, np.where(taken, NONE, np.arange(packed.num_tokens))))
    for tree, index in found:

        def take(layer: int, out: torch.Tensor, index=index) -> None:
            out = out[0].transpose(0, 1)  # [H, nodes of the pack that runs, D]
            if kept[layer] is None:
                kept[layer] = out.new_empty(out.shape[0], packed.num_tokens, out.shape[2])
            here = torch.as_tensor(np.flatnonzero(index != NONE), device=out.device)
            kept[layer][:, here] = out[:, torch.as_tensor(index, device=out.device)[here]]

        tree_outputs(model, anatomy, tree, backend, take)
    return kept


def values_for_ablate(
    model: PreTrainedModel, anatomy: Anatomy, how: Ablation, tokenizer, wrapping: Wrapping
) -> list[torch.Tensor]:
    """The vectors of `mean` or `resample` where there is no scan, only forward passes to come."""
    if how.prompts is None:
        raise InputError("ablation mean needs prompts to average over: Ablation('mean', prompts=[...])")
    if is_ablated(anatomy):
        raise InputError(
            f"ablation {how.kind} takes outputs of the unablated model: make it the outermost shipsfast.ablate"
        )
    tokens = to_tokens(how.prompts, tokenizer, wrapping)
    for each in tokens.notes:
        note(each)
    ids = tokens.ids
    check_model(model, ids)
    # With the windows that these lengths meet.
    anatomy = inspect_model(model, max(ids, key=len), max(map(len, ids)))
    check_own_dtype(model, anatomy)
    backend = resolve_backend(
        "auto", input_device(model), model.dtype, one_head_size=anatomy.head_dim == anatomy.value_dim
    )
    if how.kind == "mean":
        return mean_outputs(model, anatomy, ids, backend)
    if len(ids) != 1:
        raise InputError(f"inside ablate, resample takes outputs from one prompt, and {len(ids)} were given")
    if how.align != "exact":
        raise InputError(
            f"inside ablate, resample matches positions one to one, and align={how.align!r} was given: what the model will be "
            "called with is not known yet"
        )
    return resample_outputs(model, anatomy, pack(ids), ids, ids, how.align, backend)


@torch.inference_mode()
def tree_outputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    packed: PackedPrompts,
    backend: str,
    take: Callable[[int, torch.Tensor], None],
    attend: Callable[[int, torch.Tensor, Callable, torch.Tensor | None], None] | None = None,
) -> None:
    """Run the unablated model over the pack; take(layer, out) gets the heads' outputs [1, T, H, D].

    attend: called as attend(layer, values, function, sinks), as `TreeCall` says of it.
    """
    trees: dict[torch.device, TreeContext] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(installed(model, TREE))
        for index, layer in enumerate(anatomy.layers):
            device = layer.device
            tree = trees.setdefault(device, TreeContext(packed, backend, device))
            mask = LayerMask.untouched(1, anatomy.num_heads, model.dtype, device)
            undo.callback(layer.attention.__dict__.pop, ATTRIBUTE, None)
            call = TreeCall(tree, layer.window, mask, tap=functools.partial(take, index))
            if attend is not None:
                call.attend = functools.partial(attend, index)
            setattr(layer.attention, ATTRIBUTE, call)
        device = input_device(model)
        model(
            input_ids=torch.as_tensor(packed.token_ids, device=device)[None],
            position_ids=torch.as_tensor(packed.position, device=device).long()[None],
            use_cache=False,
            **last_logits_only(model),
        )


def through(packed: PackedPrompts, weights: np.ndarray) -> np.ndarray:
    """Sum of the prompts' weights [P] over those that pass through each node, float64 [T]."""
    ends = np.bincount(packed.last_index, weights, minlength=packed.num_tokens)
    before = np.concatenate([[0], np.cumsum(ends)])
    return before[packed.subtree_end] - before[np.arange(packed.num_tokens)]
