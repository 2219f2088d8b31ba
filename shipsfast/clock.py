"""Durations and dates for the record."""

from __future__ import annotations

import time
from datetime import datetime


def seconds_since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter`, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def now() -> str:
    """The local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(" ", "seconds")
