"""What goes wrong because of the input, told in one line: the thing, what was expected, what to do."""

import operator


class InputError(ValueError):
    """Bad input. The command line prints its message as one line and exits with status 2."""


class UnsupportedModelError(InputError):
    """The model does something shipsfast cannot reproduce exactly. It is refused, never approximated."""


def whole_number(name: str, value, least: int = 1) -> int:
    """`value` as an int. Raises InputError unless it is a whole number of at least `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def is_out_of_memory(error: BaseException) -> bool:
    """A CPU that cannot allocate says so in a plain RuntimeError."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
