"""Which copy of the model screens heads before some of them are scored exactly: its dtype, and why that or none."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import InputError
from ..models.wider import name_of, narrower_bytes, narrower_copy, why_no_narrower
from ..ops.half_products import products_dtype
from .prepare import Prepared, in_dtype_of
from .rescoring import no_room


class Screen(NamedTuple):
    """dtype: of the copy, None for none."""

    dtype: torch.dtype | None
    why: str

    @classmethod
    def of(cls, prepared: Prepared, first: int, before: dict | None) -> Screen:
        """first: heads that are scored exactly whatever a screen says; before: what an unfinished run has on record, which goes on
        as it began. Raises InputError for a screen that was asked for, or begun, and cannot be."""
        asked = prepared.measurement.screen
        if before is not None:
            dtype = None if before["dtype"] is None else getattr(torch, before["dtype"])
            problem = _problem(prepared, dtype)
            if problem:
                raise InputError(
                    f"{prepared.execution.out} was begun with a screen in {name_of(dtype)}, which cannot run now: {problem}; choose "
                    "another output folder"
                )
            return cls(dtype, before["why"])
        if asked == "none":
            return cls(None, "none was asked for")
        if asked == "auto":
            dtype, why = _chosen(prepared, first)
            problem = _problem(prepared, dtype)
            return cls(None, problem) if problem else cls(dtype, why)
        dtype = getattr(torch, asked)
        problem = _problem(prepared, dtype)
        if problem:
            raise cannot(asked, problem)
        return cls(dtype, "as asked for")

    def copy(self, prepared: Prepared) -> Prepared:
        """The same scan by the copy."""
        model, anatomy = narrower_copy(prepared.model, prepared.anatomy, self.dtype)
        return in_dtype_of(prepared, model, anatomy, narrower_bytes(prepared.model, self.dtype))


def cannot(asked: str, problem: str) -> InputError:
    return InputError(f"screen {asked!r} (--screen) cannot run: {problem}; use screen='none' or 'auto'")


def _chosen(prepared: Prepared, first: int) -> tuple[torch.dtype | None, str]:
    """What auto means here, and why."""
    model, units = prepared.model, len(prepared.units)
    if not prepared.measurement.error:
        return None, "error=0 leaves nothing to chance"
    if 2 * first > units:
        return (
            None,
            f"with one, {min(first, units)} of {units} {prepared.unit}s would still be scored exactly, and nothing saved",
        )
    if model.dtype == torch.float64:
        return torch.float32, "the model is in float64"
    if model.dtype != torch.float32:
        return None, f"the model is in {name_of(model.dtype)} itself"
    if prepared.device.type != "cpu":
        return torch.bfloat16, "the model is in float32, on a GPU"
    if products_dtype(torch.bfloat16) == torch.bfloat16:
        return torch.bfloat16, "products in bfloat16 are faster on this CPU, as measured"
    return None, "products in bfloat16 are no faster on this CPU, as measured"


def _problem(prepared: Prepared, dtype: torch.dtype | None) -> str:
    """Why there can be no such copy; "" where there can, or none is wanted."""
    if dtype is None:
        return ""
    model = prepared.model
    return why_no_narrower(model, dtype) or no_room(prepared, narrower_bytes(model, dtype), name_of(dtype))
