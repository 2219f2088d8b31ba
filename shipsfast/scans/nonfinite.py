"""Scores that are no numbers: what a scan does about them, and how it says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch

from ..engine.head_mask import HeadMask
from ..engine.nonfinite import Place, bad_logits, first_bad
from ..errors import UnsupportedModelError


def explain(prepared, prompt: int, unit=None, parent: Sequence = ()) -> tuple[Place | None, bool]:
    """Why a score of `unit`, on top of the units `parent`, is not finite on one read: the place, and whether the model
    has it without any head off too. Arguments as in Prepared."""
    ids = prepared.read_ids[prompt]
    base = first_bad(prepared.model, prepared.anatomy, ids, HeadMask(((),), prepared.how, None))
    if base is not None or unit is None:
        return base, base is not None
    mask = prepared.mask([unit], prepared.dense_values(prompt), parent)
    mask = replace(mask, groups=mask.groups[1:])
    return first_bad(prepared.model, prepared.anatomy, ids, mask), False


def refuse_base(prepared, prompt: int, what: str) -> NoReturn:
    """Raises UnsupportedModelError: without any head off, `what` is not finite on this prompt."""
    place, _ = explain(prepared, prompt)
    why = place or "a plain forward pass does not have it, so that packing the prompts does it"
    raise UnsupportedModelError(
        f"{type(prepared.model).__name__} is not finite without any head off: {what} of {prepared.read_name(prompt)}: {why}; "
        "repair the weights, or load the model in a wider dtype"
    )


def check_base_logits(prepared, together: Sequence[int], place: np.ndarray, base: torch.Tensor) -> None:
    """base [U, V], place [len(together)]: where each read's row is. Raises UnsupportedModelError."""
    bad = bad_logits(base)
    if bool(bad.any()):
        rows = bad.cpu().numpy()[place]
        refuse_base(prepared, together[int(rows.argmax())], "the logits")


def check_base_states(
    prepared, reads: Sequence[int], place: np.ndarray, base: torch.Tensor, layer: int
) -> None:
    """The same of hidden states base [U, hidden] behind a decoder layer."""
    bad = ~torch.isfinite(base).all(1)
    if bool(bad.any()):
        rows = bad.cpu().numpy()[place]
        refuse_base(prepared, reads[int(rows.argmax())], f"the hidden state after decoder layer {layer}")


def reason(place: Place | None, metric: str, layer: int | None = None) -> str:
    """For the end of a message. layer: of a metric of hidden states."""
    if place is not None:
        return str(place)
    what = "its logits" if layer is None else f"its hidden states after decoder layer {layer}"
    return f"the model's numbers are finite, and the metric {metric} is undefined for {what}"
