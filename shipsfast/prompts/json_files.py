"""Prompt files of JSON: jsonl, a value a line, and json, one list of values. A value is a text, an object with the prompt
under one of its keys, or a list of messages; all of a file are of one form.

One value is held at a time, and what was asked for of all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError
from .text_files import BLOCK, MOST_FIELD_BYTES, check_text, lines

_WHITE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16  # of a number, a word or an escape that the end of a block may cut


def names(path: Path) -> list[str] | None:
    """The keys of all objects, in their order; None where the values are no objects."""
    found, first = {}, None
    for where, value in _values(path):
        form = isinstance(value, dict)
        if first not in (None, form):
            raise InputError(
                f"{path}: {where} is {_said(value)}, what is before it is not: expected one form for all"
            )
        first = form
        if form:
            found |= dict.fromkeys(value)
    return list(found) if first else None


def columns(path: Path, chosen: Sequence[str] | None) -> list[tuple]:
    """What is under some keys, None where there is no such key; without keys the values themselves."""
    if chosen is None:
        return [(value,) for _, value in _values(path)]
    return [tuple(value.get(name) for name in chosen) for _, value in _values(path)]


def _said(value) -> str:
    return "an object" if isinstance(value, dict) else "no object"


def _values(path: Path) -> Iterator[tuple[str, object]]:
    """Each value, after where it is."""
    return _of_list(path) if path.suffix.lower() == ".json" else _of_lines(path)


def _of_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _refusal(path, f"line {number}", error) from error


def _of_list(path: Path) -> Iterator[tuple[str, object]]:
    """The file is read in blocks, and a value that goes beyond its block is tried again with the next one."""
    check_text(path, lines=False)
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig") as file:
        text, at = file.read(BLOCK), 0

        def char() -> str:
            """The next character that is no white space, "" at the end."""
            nonlocal text, at
            while (at := _WHITE.match(text, at).end()) == len(text):
                text, at = file.read(BLOCK), 0
                if not text:
                    return ""
            return text[at]

        def value(number: int) -> object:
            nonlocal text, at
            while True:
                try:
                    found, end = decoder.raw_decode(text, at)
                    if end < len(text):  # a number may go on
                        at = end
                        return found
                    problem = None
                except json.JSONDecodeError as error:
                    if "Unterminated string" not in error.msg and error.pos < len(text) - _LONGEST_TOKEN:
                        raise _refusal(path, f"element {number}", error) from error
                    problem = error
                except (ValueError, RecursionError) as error:
                    raise _refusal(path, f"element {number}", error) from error
                more = file.read(BLOCK)
                if not more:
                    if problem:
                        raise _refusal(path, f"element {number}", problem) from problem
                    raise InputError(f"{path} is not JSON: its list has no end after element {number}")
                text, at = text[at:] + more, 0
                if len(text) > MOST_FIELD_BYTES + BLOCK:
                    raise InputError(f"{path}: element {number} has more than {MOST_FIELD_BYTES:,} bytes")

        if char() != "[":
            raise InputError(
                f"{path} holds no JSON list: expected one of texts, of objects or of lists of messages "
                "(name a file with an object a line .jsonl)"
            )
        at, number, following = at + 1, 0, ","
        if char() == "]":
            at, following = at + 1, "]"
        while following == ",":
            number += 1
            char()
            yield f"element {number}", value(number)
            following = char()
            at += 1
        if following != "]" or char():
            raise InputError(
                f"{path} is not JSON: expected a comma or the end of the list after element {number}"
            )


def _refusal(path: Path, where: str, error: Exception) -> InputError:
    kind = "JSON lines" if path.suffix.lower() == ".jsonl" else "JSON"
    if isinstance(error, RecursionError):
        return InputError(f"{path} is not {kind}: {where} is nested too deep")
    if isinstance(error, json.JSONDecodeError):
        said = f"{error.msg} (column {error.colno})" if kind == "JSON lines" else error.msg
        return InputError(f"{path} is not {kind}: {where}: {said}")
    return InputError(
        f"{path} cannot be read as {kind}: {where}: {error}"
    )  # an integer of thousands of digits
