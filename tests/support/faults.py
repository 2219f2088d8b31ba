"""Faults that the tests inject, and what they found: the rows of the table in docs/reliability.md.

A test calls `found(name, times)` when it has injected the fault so often and nothing was lost. With the environment
variable SHIPSFAST_FAULTS=FILE the rows are written there; tools/fault_table.py makes the table of them.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable

import numpy as np
import torch

import shipsfast
from tests.support.models import build

# What is injected: how, and what must not happen. The table has one row for each.
FAULTS = {
    "SIGKILL in a scan": "a forked scan kills itself before the n-th line it runs; half of the n lie in what writes files",
    "SIGKILL in a scan, by the clock": "a forked scan is killed by its parent after a random time",
    "SIGKILL in runs of the other kinds": "as the first, some points each",
    "Ctrl-C between two lines": "KeyboardInterrupt raised before the n-th line of the package that runs",
    "SIGINT and SIGTERM to the command": "sent to a running command; exit codes 130 and 143, one line",
    "disk full, I/O error": "ENOSPC, then EIO, raised by the n-th call of open, write, fsync or rename, for every n",
    "full file system": "a tmpfs of 64 KiB that fills up",
    "read-only folder": "EROFS raised by every call that creates a file",
    "damaged part": "cut short, one bit turned, removed, put in its place by another, or not listed",
    "damaged manifest": "one bit turned, at many places; cut short; removed",
    "out of memory": "OutOfMemoryError, or a CPU allocator's RuntimeError, raised by the n-th operator call of a scan",
    "exception in a metric": "raised by the caller's own metric in its n-th call",
    "exception in a judge": "raised in its second call",
    "exception in the progress bar": "raised by its n-th update",
    "a thread dies": "exception in a worker of the bootstrap's pool",
    "clock set back": "time.time, monotonic and perf_counter run backwards",
    "two writers": "a second process, and a second thread, on the same folder",
}


def found(name: str, times: int) -> None:
    """The fault was injected `times` times, and nothing was lost."""
    assert name in FAULTS and times > 0
    path = os.environ.get("SHIPSFAST_FAULTS")
    if path:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"fault": name, "times": times}) + "\n")


PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
SIZES = dict(rows_per_block=5, prompts_per_group=2, chunk_tokens=16)


def scan(out=None, model=None, **how):
    """Six parts: three blocks of units, the last ones smaller, on two groups of prompts."""
    return shipsfast.scan(
        model or build(dtype=torch.float32), PROMPTS, out=out, progress=False, **SIZES | how
    )


def numbers(result) -> list:
    """Every number of a scan's result, for comparison bit for bit."""
    found = [result.scores, np.float64(result.noise_floor), np.float64(result.record["spot_check_max_abs"])]
    return [x.tobytes() for x in found]


def forked(function: Callable[[], object], before: Callable[[], None] = lambda: None) -> int:
    """Run `function` in a forked child, after `before`; the child's id. It ends with status 0, or 1 and a traceback.

    torch must run on one thread: the others are not there in the child.
    """
    assert torch.get_num_threads() == 1
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        before()
        function()
        status = 0
    except BaseException:  # noqa: BLE001 the child must not run the rest of the tests
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for it; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
