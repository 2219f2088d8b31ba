"""Where `mean` and `resample` ablations get the vectors that stand in for a head's output.

    mean      the head's output, averaged over every token of every prompt of a set: one vector per head
    resample  the head's output on another prompt, token by token: position t takes the other prompt's position t

Both come from passes of the unablated model over a packed prefix tree. For `resample` the tree is built of pairs
(token, token of the other prompt): two prompts share a node only where their other prompts agree as well, and
since attention is causal, a node then has one and the same output of the other prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.anatomy import Anatomy, check_model, check_own_dtype, inspect_model
from ..models.attention_hook import ATTRIBUTE, TREE, TreeCall, installed
from ..models.forward import input_device, last_logits_only
from ..ops.masks import LayerMask
from ..ops.prefix_tree import PackedPrompts, pack
from ..ops.tree_attention import TreeContext, resolve_backend
from ..prompts.tokens import to_token_ids
from .ablation import Ablation

MEAN_TOKENS = 2048  # tokens that pass the model together while a mean is taken


def source_ids(
    how: Ablation, token_ids: Sequence[Sequence[int]], own: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """Token ids of the ablation's prompts, one per scanned prompt for `resample`; those scanned if it has none of its own.

    Raises InputError where a `resample` prompt is not exactly as long as the one it stands in for.
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
            f"ablation resample has {len(ids)} prompts to take outputs from, and {len(token_ids)} prompts are "
            "scanned: give one for each, or one for all"
        )
    for i, (scanned, other) in enumerate(zip(token_ids, ids, strict=True)):
        if len(scanned) != len(other):
            raise InputError(
                f"prompt {i} has {len(scanned)} tokens, and the prompt that resample takes outputs from has {len(other)}: "
                "positions are matched one to one, so both need the same number"
            )
    return ids


def pair_ids(
    prompts: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> tuple[list[list[int]], np.ndarray]:
    """The prompts with every (token, token of the other prompt) numbered: the numbers, and the pairs int64 [N, 2]."""
    numbers: dict[tuple[int, int], int] = {}
    paired = [
        [numbers.setdefault(pair, len(numbers)) for pair in zip(own, other, strict=True)]
        for own, other in zip(prompts, others, strict=True)
    ]
    return paired, np.asarray(list(numbers), dtype=np.int64)


def unpair(tree: PackedPrompts, pairs: np.ndarray) -> tuple[PackedPrompts, PackedPrompts]:
    """A pack of numbers from `pair_ids` as two packs of one shape: the prompts', and the other prompts'."""
    tokens = pairs[tree.token_ids]  # [T, 2]
    return replace(tree, token_ids=tokens[:, 0]), replace(tree, token_ids=tokens[:, 1])


def mean_outputs(
    model: PreTrainedModel, anatomy: Anatomy, token_ids: Sequence[Sequence[int]], backend: str
) -> list[torch.Tensor]:
    """Mean output of every head over all tokens of all prompts: per layer float64 [H, 1, D]."""
    order = sorted(range(len(token_ids)), key=lambda i: tuple(token_ids[i]))
    sums: list[torch.Tensor | None] = [None] * anatomy.num_layers
    group: list[Sequence[int]] = []
    for number, at in enumerate(order, 1):
        group.append(token_ids[at])
        most = 0 if anatomy.plain_sequences else min(MEAN_TOKENS, anatomy.index_limit or MEAN_TOKENS)
        if number < len(order) and sum(map(len, group)) + len(token_ids[order[number]]) < most:
            continue
        packed = pack(group)
        weight = _prompts_through(packed)

        def add(layer: int, out: torch.Tensor, weight=weight) -> None:
            part = torch.einsum("t,thd->hd", torch.as_tensor(weight, device=out.device), out[0].double())
            sums[layer] = part if sums[layer] is None else sums[layer] + part

        tree_outputs(model, anatomy, packed, backend, add)
        group = []
    count = sum(map(len, token_ids))
    return [(total / count)[:, None] for total in sums]


def resample_outputs(
    model: PreTrainedModel, anatomy: Anatomy, packed: PackedPrompts, backend: str
) -> list[torch.Tensor]:
    """Output of every head at every node: per layer [H, T, D] in the model's dtype."""
    kept: list[torch.Tensor | None] = [None] * anatomy.num_layers

    def keep(layer: int, out: torch.Tensor) -> None:
        kept[layer] = out[0].transpose(0, 1).contiguous()

    tree_outputs(model, anatomy, packed, backend, keep)
    return kept


def values_for_ablate(
    model: PreTrainedModel, anatomy: Anatomy, how: Ablation, tokenizer, template: str = "none"
) -> list[torch.Tensor]:
    """The vectors of `mean` or `resample` where there is no scan, only forward passes to come."""
    if how.prompts is None:
        raise InputError("ablation mean needs prompts to average over: Ablation('mean', prompts=[...])")
    if any(ATTRIBUTE in layer.attention.__dict__ for layer in anatomy.layers):
        raise InputError(
            f"ablation {how.kind} takes outputs of the unablated model: make it the outermost shipsfast.ablate"
        )
    ids = to_token_ids(how.prompts, tokenizer, template)
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
    return resample_outputs(model, anatomy, pack(ids), backend)


@torch.inference_mode()
def tree_outputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    packed: PackedPrompts,
    backend: str,
    take: Callable[[int, torch.Tensor], None],
) -> None:
    """Run the unablated model over the pack; take(layer, out) gets the heads' outputs [1, T, H, D]."""
    trees: dict[torch.device, TreeContext] = {}
    with contextlib.ExitStack() as undo:
        undo.enter_context(installed(model, TREE))
        for index, layer in enumerate(anatomy.layers):
            device = layer.device
            tree = trees.setdefault(device, TreeContext(packed, backend, device))
            mask = LayerMask.untouched(
                1, anatomy.num_heads, torch.float64 if model.dtype == torch.float64 else torch.float32, device
            )
            undo.callback(layer.attention.__dict__.pop, ATTRIBUTE, None)
            call = TreeCall(tree, layer.window, mask, tap=lambda out, index=index: take(index, out))
            setattr(layer.attention, ATTRIBUTE, call)
        device = input_device(model)
        model(
            input_ids=torch.as_tensor(packed.token_ids, device=device)[None],
            position_ids=torch.as_tensor(packed.position, device=device).long()[None],
            use_cache=False,
            **last_logits_only(model),
        )


def _prompts_through(packed: PackedPrompts) -> np.ndarray:
    """How many prompts pass through each node, float64 [T]."""
    ends = np.bincount(packed.last_index, minlength=packed.num_tokens)
    before = np.concatenate([[0], np.cumsum(ends)])
    return (before[packed.subtree_end] - before[np.arange(packed.num_tokens)]).astype(np.float64)
