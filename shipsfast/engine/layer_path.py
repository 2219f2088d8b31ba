"""How rows pass a decoder layer: by the layer's own forward, or by the fused one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.anatomy import Anatomy
from ..models.output_head import head_precision
from . import fused_layer
from .measurement import FP32_RESIDUAL


def layer_path(
    layers: str, model: PreTrainedModel, anatomy: Anatomy, device: torch.device, backend: str
) -> tuple[str, str | None]:
    """How rows pass the layers, and why they go through their own forward, None if they do not."""
    if layers == "model":
        return "model", "asked for"
    problem = fused_layer.why_not([layer.module for layer in anatomy.layers], model.dtype, device, backend)
    if layers == FP32_RESIDUAL and not problem:
        problem = fused_layer.why_no_fp32_residual(model.dtype, backend, head_precision(model))
    if layers != "auto" and problem:
        raise InputError(f"layers {layers!r} (--layers) cannot run: {problem}; use layers='model' or 'auto'")
    return ("model" if problem else "fused" if layers == "auto" else layers), problem
