"""Directions of the residual stream: difference of means between two sets of prompts (arXiv 2406.11717, section 2.3).

What a prompt's token looks like after a decoder layer hangs on the tokens up to it only, so prompts are cut behind the token
that is read. They are packed as one prefix tree, which passes the model once: hooks on the decoder layers see every layer's
stream on the way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.measurement import Execution, Measurement, ScanExecution, called_with
from ..engine.memory_plan import make_plan
from ..engine.replacement_values import tree_outputs
from ..engine.subject import Subject, look_at
from ..errors import InputError, note
from ..memory import OutOfMemory, out_of_memory
from ..models.anatomy import check_model
from ..models.fingerprint import fingerprint
from ..models.forward import last_logits_only, plain_pass
from ..models.output_head import head_input
from ..models.residual_stream import leaving
from ..models.restore import untouched
from ..models.wrappers import base_model
from ..ops.prefix_tree import pack
from ..progress import Bar
from ..prompts.tokens import all_tokens
from ..results.direction import Direction, check_layer
from ..results.two_samples import auroc
from ..runs.identity import prompt_hashes
from .measurements import DirectionExecution, DirectionMeasurement
from .self_check import check_own_hidden

OTHERS = "in prompts_b: "
TELLS = 0.6  # an AUROC from which on a layer is said to tell prompts apart


@called_with(
    DirectionMeasurement,
    DirectionExecution,
    prompts_b="the prompts that they are compared with, in the same form.",
)
@untouched
def direction(
    model: PreTrainedModel, tokenizer, measurement: DirectionMeasurement, execution: DirectionExecution
) -> Direction:
    """The direction of the residual stream that tells prompts_a from prompts_b, after every decoder layer.

    Difference of means (arXiv 2406.11717, section 2.3): the mean over prompts_a less the mean over prompts_b of the stream at
    one token of each prompt, as it leaves each decoder layer. How well a layer tells the two sets apart is measured on prompts
    that its direction was not made of: each set is drawn into halves, the direction of one half orders the other (AUROC),
    both ways, and the mean is taken. Of layers that do so equally well, the one whose held-out means are further apart, in
    standard deviations, is chosen, then the lower one.

    Returns:
        Direction with .vectors float64 [L, hidden], .auroc [L], .layer and .vector; .save(path) keeps it.
    Raises:
        InputError: bad prompts, layer or position; sets that are the same at that position.
        UnsupportedModelError: the model cannot be run exactly.
    """
    started = time.perf_counter()
    model = base_model(model)
    own, other = all_tokens(measurement.prompts, measurement.others, tokenizer, measurement.wrapping, OTHERS)
    for each in (*own.notes, *(OTHERS + each for each in other.notes if each not in own.notes)):
        note(each)
    check_model(model, own.ids)
    try:
        check_model(model, other.ids)
    except InputError as error:
        raise InputError(f"{OTHERS}{error}") from error
    # Whole prompts, as rotary embeddings and masks hang on lengths.
    subject = look_at(model, None, Measurement(prompts=[*own.ids, *other.ids]), execution)
    if measurement.layer is not None:
        check_layer(measurement.layer, len(subject.anatomy.blocks))
    ids = _cut(own.ids, measurement.position, "") + _cut(other.ids, measurement.position, OTHERS)
    count = len(own.ids)
    if {*map(tuple, ids[:count])} == {*map(tuple, ids[count:])}:
        raise InputError(
            f"up to position {measurement.position} both sets have the same tokens: there is nothing to tell apart"
        )
    states = _states(subject, ids, execution)
    error = _hold_against_own(subject, ids, states)
    a, b = ([x[part] for x in states] for part in (slice(count), slice(count, None)))
    vectors = np.stack([(x.double().mean(0) - y.double().mean(0)).numpy() for x, y in zip(a, b, strict=True)])
    found = [
        _held_out(x.double().numpy(), y.double().numpy(), measurement.seed) for x, y in zip(a, b, strict=True)
    ]
    layer = measurement.layer
    if layer is None:
        if np.isnan(found[0][0]):
            raise InputError(
                "a set of one prompt has no halves to choose a layer by: give more prompts, or layer= (--layer)"
            )
        layer = max(range(len(found)), key=found.__getitem__)  # the first of equals
    identity = {
        "kind": measurement.kind, "fingerprint": fingerprint(model), "dtype": str(model.dtype).removeprefix("torch."),
        "prompts_a": prompt_hashes(own.ids), "prompts_b": prompt_hashes(other.ids), "seed": measurement.seed,
    }  # fmt: skip
    unused = ("ablation", "layers", "layers_why", "kl_backend", "template", "prompting")
    record = {name: value for name, value in subject.record.items() if name not in unused} | {
        "template": measurement.template, "prompting": {"prompts_a": own.record, "prompts_b": other.record},
        "packing_error": error, "seconds": seconds_since(started),
    }  # fmt: skip
    auroc = np.array([each for each, _ in found])
    if auroc[layer] < TELLS:
        note(
            f"layer {layer} does not tell held-out prompts apart (AUROC {auroc[layer]:.2f}; 0.5 is chance): take more prompts, or "
            "such as differ more"
        )
    return Direction(vectors, auroc, layer, measurement.position, identity, record)


def _cut(token_ids: Sequence[list[int]], position: int, about: str) -> list[list[int]]:
    """Each prompt up to the token at `position`. Raises InputError for a prompt that has none there."""
    for i, ids in enumerate(token_ids):
        if not -len(ids) <= position < len(ids):
            raise InputError(
                f"{about}prompt {i} has {len(ids)} tokens, and none at position {position}: choose another, or leave it out"
            )
    return [ids[: position % len(ids) + 1] for ids in token_ids]


def _states(subject: Subject, ids: Sequence[list[int]], execution: Execution) -> list[torch.Tensor]:
    """The stream at each prompt's last token after every decoder layer, on the CPU: L of [P, hidden].

    Raises InputError where it is not finite.
    """
    model, anatomy = subject.model, subject.anatomy
    plan = make_plan(anatomy, ids, 1, ScanExecution(max_memory=execution.max_memory), subject.held())
    out: list[torch.Tensor | None] = [None] * len(anatomy.blocks)

    def run(together: Sequence[int]) -> None:
        packed, rows = pack([ids[i] for i in together]), torch.as_tensor(together)

        def take(block: int, hidden: torch.Tensor) -> None:
            states = hidden[0, torch.as_tensor(packed.last_index, device=hidden.device)].cpu()
            if out[block] is None:
                out[block] = states.new_empty(len(ids), states.shape[1])
            out[block][rows] = states

        with leaving(anatomy.blocks, take), head_input(model):
            tree_outputs(model, anatomy, packed, subject.backend, lambda _layer, _out: None)

    left = list(plan.prompt_groups)
    with Bar(total=len(ids), desc="direction", unit="prompts", progress=execution.progress) as bar:
        while left:
            together = left.pop(0)
            with out_of_memory() as found:
                run(together)
                bar.update(len(together))
            if found and len(together) == 1:
                raise OutOfMemory(
                    "out of memory with one prompt: free some, or shorten the longest"
                ) from found[0]
            if found:
                left[:0] = [together[: len(together) // 2], together[len(together) // 2 :]]
    for block, states in enumerate(out):
        bad = (~torch.isfinite(states)).any(1).nonzero()
        if len(bad):
            raise InputError(
                f"the residual stream of prompt {int(bad[0])} of both sets is not finite after decoder layer {block}: the model "
                "overflows in its dtype; load it in a wider one"
            )
    return out


@torch.inference_mode()
def _hold_against_own(subject: Subject, ids: Sequence[list[int]], states: Sequence[torch.Tensor]) -> float:
    """The largest difference between the packed and the model's own forward on the longest prompt, relative to the norm of
    the stream. Raises UnsupportedModelError where they are not the same model."""
    prompt = max(range(len(ids)), key=lambda i: len(ids[i]))
    plain: list[torch.Tensor] = []
    with leaving(subject.anatomy.blocks, lambda _block, hidden: plain.append(hidden[0, -1].cpu())):
        plain_pass(subject.model, [ids[prompt]], **last_logits_only(subject.model))
    worst = 0.0
    for packed, alone in zip(states, plain, strict=True):
        check_own_hidden(subject, prompt, packed[prompt], alone)
        worst = max(worst, float((packed[prompt].double() - alone.double()).norm() / alone.double().norm()))
    return worst


def _held_out(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    """How well the direction of one half of each set tells the other half apart, both ways averaged: AUROC, and the distance
    of the means in standard deviations. NaN where a set has one prompt. a, b: float64 [prompts, hidden]."""
    if min(len(a), len(b)) < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    halves = [np.array_split(generator.permutation(len(x)), 2) for x in (a, b)]
    found = []
    for fit, held in ((0, 1), (1, 0)):
        vector = a[halves[0][fit]].mean(0) - b[halves[1][fit]].mean(0)
        along = [x[part[held]] @ vector for x, part in zip((a, b), halves, strict=True)]
        spread = np.sqrt((along[0].var() + along[1].var()) / 2)
        apart = along[0].mean() - along[1].mean()
        found.append(
            (auroc(*along), apart / spread if spread else np.copysign(np.inf, apart) if apart else 0.0)
        )
    (one, far), (other, further) = found
    return (one + other) / 2, float(np.nan_to_num(far + further))
