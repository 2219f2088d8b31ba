"""Every scan held against the model's own forward pass, one prompt at a time and unpacked.

A prompt is a read here: the tokens up to a position that is read (`Prepared.read_ids`), in most scans those of a whole prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..engine.ablate import dense_rows
from ..engine.head_mask import HeadMask
from ..engine.heads import Head
from ..errors import UnsupportedModelError
from ..models.attention_hook import LONG
from ..models.forward import alarm, last_logits_only, plain_pass, rounded_to, softcap_left_out
from ..models.output_head import float32_head, head_input
from ..models.residual_stream import Left, leaving
from ..ops.divergences import kl_rows
from ..ops.prefix_tree import pack
from .nonfinite import check_base_logits
from .prepare import Prepared

# Logits under None, and hidden states by the decoder layer that they leave.
Outputs = dict[int | None, torch.Tensor]

# The same as ALARM_NATS for hidden states: the largest difference relative to their norm.
ALARM_HIDDEN = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def own_layers_hint(prepared: Prepared) -> str:
    """What else to try after a failed check, where the layers' own code did not run."""
    return "; layers='model' (--layers model) runs its own layers" if prepared.fused else ""


def longest_prompt(prepared: Prepared, together: Sequence[int]) -> int:
    """The longest of the prompts packed together; of several, the one packed last, which packing moves most."""
    at = max(range(len(together)), key=lambda i: (len(prepared.read_ids[together[i]]), i))
    return together[at]


def packing_noise_nats(prepared: Prepared, prompt: int, plain: torch.Tensor, base: torch.Tensor) -> float:
    """KL between the unpacked and the packed unablated model on one prompt; plain, base: logits [V] of the model's own forward, and
    packed.

    Raises UnsupportedModelError where they are not the same model.
    """
    check_base_logits(prepared, [prompt], np.zeros(1, dtype=int), plain[None])
    row = torch.zeros(1, dtype=torch.long, device=plain.device)
    noise = kl_rows(plain[None], base[None].to(plain.dtype), row).item()
    if not noise <= alarm(prepared.model)[0]:
        capped = softcap_left_out(prepared.model)
        if capped is not None:
            raise UnsupportedModelError(f"{capped} (KL {noise:.3g} nats on {prepared.read_name(prompt)})")
        raise UnsupportedModelError(
            f"{type(prepared.model).__name__} gives other answers when its prompts are packed (KL {noise:.3g} nats "
            f"on {prepared.read_name(prompt)}): its attention does something shipsfast does not know, or its logits are "
            f"not finite{own_layers_hint(prepared)}"
        )
    if prepared.fp32_residual:
        own = unpacked_outputs(prepared, prompt)[None]
        return kl_rows(own[None], base[None].to(own.dtype), row).item()
    return noise


def ablated_outputs(prepared: Prepared, prompt: int, units: Sequence[Head]) -> Outputs:
    """What is read, [len(units) + 1, .], by a plain forward pass with each unit off; the last with none."""
    parts = []
    for mask in _plain_masks(prepared, prompt, [(unit,) for unit in units]):
        with dense_rows(prepared.model, prepared.anatomy, mask):
            parts.append(plain_outputs(prepared, prompt, len(mask)))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _plain_masks(prepared: Prepared, prompt: int, groups: Sequence[Sequence[Head]]) -> list[HeadMask]:
    """One row for each group of units, and the unablated one: all together; of a long prompt one by one, as each takes what a
    chunk takes in a scan.

    The unablated one runs through the same attention: transformers' eager attention rounds its softmax to float32, in
    float64 models as well. It comes last, unlike in a scan: a model whose rows disturb each other gives other
    scores then.
    """
    mask = prepared.mask([], prepared.dense_values(prompt))
    rows = (*map(prepared.heads, groups), ())
    together = [rows] if len(prepared.read_ids[prompt]) < LONG else [(row,) for row in rows]
    return [replace(mask, groups=groups) for groups in together]


@torch.inference_mode()
def ablated_hidden(prepared: Prepared, prompt: int, groups: Sequence[Sequence[Head]]) -> torch.Tensor:
    """Last-position hidden states [len(groups) + 1, hidden] after the final norm by plain forward passes with each group of
    units off; the last with none."""
    masks = _plain_masks(prepared, prompt, groups)  # runs the model for resample
    with head_input(prepared.model) as seen:
        for mask in masks:
            with dense_rows(prepared.model, prepared.anatomy, mask):
                _forward(prepared, [prepared.read_ids[prompt]] * len(mask))
    return torch.cat([hidden[:, -1] for hidden in seen])


def check_hidden(
    prepared: Prepared, prompt: int, unit: Head, base: torch.Tensor, ablated: torch.Tensor
) -> None:
    """Raises UnsupportedModelError unless plain forward passes give these hidden states [hidden]."""
    off, plain = ablated_hidden(prepared, prompt, [(unit,)])
    for name, got, expected in (
        (f"with {prepared.unit} {unit[0]}-{unit[1]} off", ablated, off),
        ("unablated", base, plain),
    ):
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        if not error <= ALARM_HIDDEN.get(rounded_to(prepared.model), ALARM_HIDDEN[torch.float32]):
            raise UnsupportedModelError(
                f"the hidden states of prompt {prompt}, {name}, differ by {error:.2g} of their norm from those of a "
                f"plain forward pass: {type(prepared.model).__name__} cannot be scanned exactly{own_layers_hint(prepared)}"
            )


def check_own_hidden(prepared: Prepared, prompt: int, base: torch.Tensor, plain: torch.Tensor) -> None:
    """Raises UnsupportedModelError unless the hidden states [hidden] of the unablated model are those of its own forward,
    with the attention that it was loaded with: eager attention rounds to float32 in float64 models too."""
    allowed = max(ALARM_HIDDEN[torch.float32], ALARM_HIDDEN.get(rounded_to(prepared.model), 0.0))
    error = float((base.double() - plain.double()).norm() / plain.double().norm())
    if not error <= allowed:
        raise UnsupportedModelError(
            softcap_left_out(prepared.model)
            or f"the hidden states of prompt {prompt} differ by {error:.2g} of their norm from those of the model's own forward: "
            f"{type(prepared.model).__name__} cannot be scanned exactly{own_layers_hint(prepared)}"
        )


@torch.inference_mode()
def plain_hidden(prepared: Prepared, prompts: Sequence[int]) -> torch.Tensor:
    """Last-position hidden states after the final norm by the model's own forward, [len(prompts), hidden].

    Prompts of one length go through together; nothing is padded.
    """
    by_length: dict[int, list[int]] = {}
    for at, prompt in enumerate(prompts):
        by_length.setdefault(len(prepared.read_ids[prompt]), []).append(at)
    out = None
    for length, places in by_length.items():
        step = max(1, prepared.plan.chunk_tokens // length)
        for start in range(0, len(places), step):
            part = places[start : start + step]
            with head_input(prepared.model) as seen:
                _forward(prepared, [prepared.read_ids[prompts[at]] for at in part])
            if out is None:
                out = seen[0].new_empty(len(prompts), seen[0].shape[-1])
            out[part] = seen[0][:, -1]
    return out


@torch.inference_mode()
def plain_outputs(prepared: Prepared, prompt: int, rows: int) -> Outputs:
    """What is read, [rows, .], by the model's own forward, every row the same prompt."""
    after, wants_logits = prepared.read_out
    out: Outputs = {}

    def take(layer: int, hidden: torch.Tensor) -> None:
        out[layer] = hidden[:, -1].clone()
        if not wants_logits and layer == after[-1]:
            raise Left

    blocks, ids = prepared.anatomy.blocks, [prepared.read_ids[prompt]] * rows
    with float32_head(prepared.model), leaving(blocks, take, after), contextlib.suppress(Left):
        logits = _forward(prepared, ids)[:, -1]
        out |= {None: logits} if wants_logits else {}
    return out


def unpacked_outputs(prepared: Prepared, prompt: int, *, hidden_states: bool = False) -> Outputs:
    """What is read of the unablated model, [.] each, by the scan's own way with the prompt alone. Where that way keeps more digits
    than the model's own forward, the difference to that is not what packing does.

    hidden_states: those that enter the output head, in the place of logits.
    """
    out: Outputs = {}

    def take(layer: int, rows: slice, states: torch.Tensor) -> None:
        if rows.start == 0:
            out[layer] = states[0, 0].clone()

    with prepared.growing_batch(pack([prepared.read_ids[prompt]])) as batch:
        batch.run(
            prepared.mask([], None),
            lambda _rows, _out, base: out.update({None: base[0]}),
            hidden_states=hidden_states,
            see=take,
        )
    return out


def _forward(prepared: Prepared, ids: list[list[int]]) -> torch.Tensor:
    return plain_pass(prepared.model, ids, **last_logits_only(prepared.model))
