"""The same scan of other prompts, in one run: what heads do to ordinary prompts, for `contrast`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..engine.measurement import ScanExecution
from ..errors import InputError
from ..models.anatomy import check_model
from ..prompts.tokens import to_token_ids
from ..runs.identity import prompt_hashes
from ..runs.kinds import CONTROL
from .measurements import ShipsMeasurement
from .prepare import Prepared


def control_identity(prepared: Prepared, tokenizer) -> dict:
    """What the identity of a scan says of its control, if it has one.

    Raises InputError, before anything is scanned, for control prompts that cannot be, or are those of the scan.
    """
    measurement = prepared.measurement
    if measurement.control is None:
        return {}
    try:
        ids = to_token_ids(measurement.control, tokenizer, measurement.wrapping)
        check_model(prepared.model, ids)
    except InputError as error:
        raise InputError(f"in the control prompts: {error}") from error
    hashes = prompt_hashes(ids)
    if sorted(hashes) == sorted(prepared.identity["prompts"]):
        raise InputError("the control prompts are the prompts themselves: give others, to hold these against")
    return {"control": {"prompts": hashes}}


def control_execution(execution: ScanExecution) -> ScanExecution:
    """How the control is scanned: as the prompts are, into a folder inside of theirs."""
    out = None if execution.out is None else Path(execution.out) / CONTROL
    return replace(execution, out=out, prompts_from=(execution.prompts_from or {}).get("control"))
