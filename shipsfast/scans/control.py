"""The same scan of other prompts, in one run: what heads do to ordinary prompts, for `contrast`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import InputError, UnsupportedModelError
from ..runs.kinds import CONTROL
from .prepare import Prepared, prepare


def prepare_control(prepared: Prepared, tokenizer) -> Prepared | None:
    """The scan of the control prompts of a scan, if it has any: as that is, into a folder inside of its own.

    Raises InputError, before anything is scanned, for control prompts that cannot be, or are those of the scan.
    """
    if prepared.measurement.control is None:
        return None
    execution = prepared.execution
    out = None if execution.out is None else Path(execution.out) / CONTROL
    own = replace(execution, out=out, prompts_from=(execution.prompts_from or {}).get("control"))
    try:
        control = prepare(prepared.model, tokenizer, prepared.measurement.of_control(), own)
    except InputError as error:
        raise of_the_control(error) from error
    control.fingerprint = prepared.fingerprint
    if sorted(control.token_ids) == sorted(prepared.token_ids):
        raise InputError("the control prompts are the prompts themselves: give others, to hold these against")
    return control


def of_the_control(error: InputError) -> InputError:
    """The same error, which says of which prompts it is."""
    kind = UnsupportedModelError if isinstance(error, UnsupportedModelError) else InputError
    return kind(f"in the control prompts: {error}")
