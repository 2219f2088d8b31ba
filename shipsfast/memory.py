"""What runs out of memory is tried once more: smaller, or with the caches emptied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import InputError

T = TypeVar("T")


class OutOfMemory(InputError):
    """There is no smaller plan for this group of prompts."""


def free_memory() -> None:
    """What is cached and unused, back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def once_more(what: str, run: Callable[[], T], smaller: Callable[[], T] | None = None) -> T:
    """run(), and if that runs out of memory, `smaller` or the same again with the caches emptied.

    For what is no block of a scan. Raises OutOfMemory, naming `what`, if that runs out too.
    """
    try:
        return run()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # after the first error is gone, and the tensors of its frames
    try:
        return (smaller or run)()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory while {what}: free some, or shorten the longest prompt") from error


def is_out_of_memory(error: BaseException) -> bool:
    """A CPU that cannot allocate says so in a plain RuntimeError."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
