"""What runs out of memory is tried once more: smaller, or with the caches emptied."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .errors import InputError

T = TypeVar("T")


class OutOfMemory(InputError):
    """There is no smaller plan for this group of prompts."""


def is_out_of_memory(error: BaseException) -> bool:
    """A CPU that cannot allocate says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def out_of_memory() -> Iterator[list[BaseException]]:
    """A list that holds, afterwards, the error by which memory ran out inside; empty if it did not. What is cached and
    unused is then back with the device. Other errors come through."""
    found: list[BaseException] = []
    try:
        yield found
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
        found.append(error)
    if found and torch.cuda.is_available():
        torch.cuda.empty_cache()


def once_more(what: str, run: Callable[[], T], smaller: Callable[[], T] | None = None) -> T:
    """run(), and if that runs out of memory, `smaller` or the same again with the caches emptied.

    For what is no block of a scan. Raises OutOfMemory, naming `what`, if that runs out too.
    """
    with out_of_memory():
        return run()
    with out_of_memory() as again:
        return (smaller or run)()
    raise OutOfMemory(f"out of memory while {what}: free some, or shorten the longest prompt") from again[0]
