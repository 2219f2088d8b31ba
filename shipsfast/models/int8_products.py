"""Products of int8 with int8 on a CPU, which overflow on processors without VNNI.

oneDNN adds pairs of them in 16 bits there: torch._int_mm of rows of 127 gives 4,080 for 516,128, without a word. Models that
compute in int8 (bitsandbytes LLM.int8, torchao with quantised activations) then say something else than they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from ..errors import UnsupportedModelError
from .weights import execution_device

LARGEST = 127
SIZE = 32


def check_int8_products(model: torch.nn.Module) -> None:
    """Raises UnsupportedModelError, naming a layer, where the model's own int8 products are wrong here."""
    for name, module in model.named_modules():
        multiply = _multiplies_by(module)
        if multiply and execution_device(model, module).type == "cpu" and _overflows(multiply):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) multiplies int8 by int8, which overflows on this processor (it has no VNNI): "
                "the model itself answers wrongly here; load it without 8-bit quantisation, or run it elsewhere"
            )


def _multiplies_by(module: torch.nn.Module) -> str:
    """The library with whose int8 products a layer computes, "" for none."""
    if type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes"):
        return "bitsandbytes"
    weight = module._parameters.get("weight")
    return "torchao" if weight is not None and "ActivationQuantized" in type(weight).__name__ else ""


@functools.cache
def _overflows(library: str) -> bool:
    rows = torch.full((SIZE, SIZE), LARGEST, dtype=torch.int8)
    product = _product(library)(
        rows, rows
    )  # all alike, so that it does not matter which of them is transposed
    return bool((product.long() != SIZE * LARGEST * LARGEST).any())


def _product(library: str) -> Callable:
    if library == "bitsandbytes":
        return torch.ops.bitsandbytes.int8_linear_matmul
    return (
        sys.modules["torchao.kernel.intmm"].safe_int_mm
        if "torchao.kernel.intmm" in sys.modules
        else torch._int_mm
    )
