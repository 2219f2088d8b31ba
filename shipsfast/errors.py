"""What goes wrong because of the input, told in one line: the thing, what was expected, what to do."""

import operator
import re
import sys

from .text import one_line

MOST_DIGITS = 18
MOST = 1 << 62  # of what a run folder holds as a whole number


class InputError(ValueError):
    """Bad input. The command line prints its message as one line and exits with status 2.

    Messages quote files and names that came from anywhere, so that as text they are one line that steers no terminal.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class UnsupportedModelError(InputError):
    """The model does something shipsfast cannot reproduce exactly. It is refused, never approximated."""


def whole_number(name: str, value, least: int = 1) -> int:
    """`value` as an int. Raises InputError unless it is a whole number from `least` to what a run folder holds."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if number > MOST:
        raise InputError(f"{name} must be at most {MOST:,}, got more")
    return number


def from_digits(text: str) -> int:
    """The number that decimal digits say. Raises InputError beyond 18 of them: no id has so many, and Python reads
    4,300."""
    text = text.lstrip("0") or "0"
    if len(text) > MOST_DIGITS:
        raise InputError(f"{text[:MOST_DIGITS]}... has {len(text)} digits: expected at most {MOST_DIGITS}")
    return int(text)


def parse_bytes(text: str) -> int:
    """ "8GiB", "500 MB", "8G" (binary) or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE)
    base = 1000 if match and match[3] and match[3].lower() == "b" and match[2] else 1024
    amount = int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")) if match else 0
    if amount < 1:
        raise InputError(f"cannot read {text!r} as an amount of memory: write it like 8GiB or 500MB")
    return amount


class WriteError(OSError):
    """A file of a run folder could not be written. What the manifest lists is whole."""


class Stopped(BaseException):
    """The process was asked to end (SIGTERM). Everything is put back on the way out, as after Ctrl-C."""


def note(message: str) -> None:
    """Tell the user something that does not end the run, in one line of stderr."""
    print(f"shipsfast: {one_line(message)}", file=sys.stderr, flush=True)
