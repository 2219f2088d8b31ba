"""The same scan of other prompts, in one run: what heads do to ordinary prompts, for `contrast`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import InputError, UnsupportedModelError
from ..runs.kinds import CONTROL
from .measurements import ShipsMeasurement
from .prepare import Prepared, prepare_passes


def prepare_control(measurement: ShipsMeasurement, prepared: Prepared, tokenizer) -> list[Prepared] | None:
    """The scan of the control prompts of a scan, if it has any: as that is, in as many passes, into a folder inside of its own.

    Raises InputError, before anything is scanned, for control prompts that cannot be, or are those of the scan.
    """
    if measurement.control is None:
        return None
    execution = prepared.execution
    out = None if execution.out is None else Path(execution.out) / CONTROL
    own = replace(execution, out=out, prompts_from=(execution.prompts_from or {}).get("control"))
    try:
        passes = prepare_passes(prepared.model, tokenizer, measurement.of_control(), own)
    except InputError as error:
        raise of_the_control(error) from error
    control = passes[0]
    control.fingerprint = prepared.fingerprint
    if sorted(control.token_ids) == sorted(prepared.token_ids):
        raise InputError("the control prompts are the prompts themselves: give others, to hold these against")
    return passes


def of_the_control(error: InputError) -> InputError:
    """The same error, which says of which prompts it is."""
    kind = UnsupportedModelError if isinstance(error, UnsupportedModelError) else InputError
    return kind(f"in the control prompts: {error}")
