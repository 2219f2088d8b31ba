"""The native extension shipsfast._C: whether it is there, and what to do where it is not."""

from __future__ import annotations

import functools
import importlib

import torch

REMEDY = "run `pip install --no-build-isolation -e .` in the checkout, with torch and a C++ compiler there"


@functools.cache
def extension_status() -> tuple[bool, str]:
    """Whether the native extension shipsfast._C is loaded, and where from; if not, why, and the remedy."""
    try:
        module = importlib.import_module("shipsfast._C")
    except ModuleNotFoundError as error:
        if error.name != "shipsfast._C":
            raise
        return False, f"the extension shipsfast._C is not built: {REMEDY}"
    except ImportError as error:  # built for another torch or Python
        return False, f"the extension shipsfast._C does not load ({error}): {REMEDY}"
    torch.library.register_fake("shipsfast::kl_rows", _kl_rows_fake)
    if hasattr(torch.ops.shipsfast, "divergence_rows"):
        torch.library.register_fake("shipsfast::divergence_rows", _divergence_rows_fake)
    if hasattr(torch.ops.shipsfast, "end_attention"):
        torch.library.register_fake("shipsfast::end_attention", _end_attention_fake)
    return True, str(module.__file__)


def _kl_rows_fake(base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
    return base.new_empty(ablated.shape[:1], dtype=torch.float64)


def _divergence_rows_fake(
    base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor, which: int
) -> torch.Tensor:
    return base.new_empty((which.bit_count(), ablated.shape[0]), dtype=torch.float64)


def _end_attention_fake(*args) -> None:
    """It only writes into its last argument."""
