"""Runs that would refuse their own result are measured all the same: their row has the time, and what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from shipsfast.answers import self_check as of_texts
from shipsfast.models import forward as of_models
from shipsfast.scans import self_check as of_scans

ALARM_NATS = dict(of_models.ALARM_NATS)  # as they are, also while they are off
ALARM_LOGIT = dict(of_texts.ALARM_LOGIT)
NEVER = 1e30  # and not infinity, which is no number any more when it is multiplied by a score of 0


@contextlib.contextmanager
def alarms_off() -> Iterator[None]:
    """Scans, searches and texts run to their end whatever their checks of themselves find."""
    with (
        mock.patch.dict(of_models.ALARM_NATS, dict.fromkeys(ALARM_NATS, (NEVER, NEVER))),
        mock.patch.dict(of_scans.ALARM_HIDDEN, dict.fromkeys(of_scans.ALARM_HIDDEN, NEVER)),
        mock.patch.dict(of_texts.ALARM_LOGIT, dict.fromkeys(ALARM_LOGIT, NEVER)),
    ):
        yield


def refused(result, dtype: torch.dtype) -> str | None:
    """Why a scan would have refused to go on."""
    allowed, found = ALARM_NATS[dtype][0], result.record["packing_noise"]
    if found <= allowed:
        return None
    return f"packed prompts give other answers (KL {found:.3g} nats, allowed are {allowed:.3g})"
