"""What runs out of memory is tried once more: smaller, or with the caches emptied."""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .errors import InputError

T = TypeVar("T")


class OutOfMemory(InputError):
    """There is no smaller plan for this group of prompts."""


# Only torch's own allocators have an error of their own for it. What the driver, the CUDA libraries, C++ and mmap say
# comes as a RuntimeError or OSError. A kernel that asks for more shared memory than there is ("out of resource") would
# not be helped by a smaller plan.
_SAYS_SO = re.compile(
    r"(?:CUDA|HIP|error|error \(2\)|Error \[\w+\]) ?:? out of memory"  # device, driver, pinned memory, Triton
    r"|_OUT_OF_MEMORY\b"  # CUDA_ERROR_, NVRTC_ERROR_
    r"|\b(?:CUBLAS|CUSOLVER|CUSPARSE|CUDNN)_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED"
    r"|CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate"  # a handle needs nothing but memory
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|std::bad_alloc"
    r"|Cannot allocate memory"  # ENOMEM, also as torch's and safetensors' mmap tell it
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the host ran out, here or in what this error was raised from."""
    return any(map(_says_so, _causes(error)))


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on. One of ours says all there is to say."""
    chain: list[BaseException] = []
    while error is not None and not isinstance(error, InputError) and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, OSError)) and _SAYS_SO.search(str(error)) is not None


@contextlib.contextmanager
def out_of_memory() -> Iterator[list[BaseException]]:
    """A list that holds, afterwards, the error by which memory ran out inside; empty if it did not. What is cached and
    unused is then back with the device. Other errors come through."""
    found: list[BaseException] = []
    try:
        yield found
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        for each in _causes(error):
            traceback.clear_frames(each.__traceback__)  # they hold the tensors
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
