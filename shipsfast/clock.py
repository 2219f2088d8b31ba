"""Durations and dates for the record."""

from __future__ import annotations

import time
from datetime import datetime


def seconds_since(started: float) -> float:
    """Seconds since a reading of `time.perf_counter`, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def in_words(seconds: float) -> str:
    """A duration, as short as it is certain: "2.5 s", "40 s", "12 min", "5.2 h"."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def now() -> str:
    """The local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(" ", "seconds")
