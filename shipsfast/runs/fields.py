"""Tests of single fields of run.json. It comes from a disk that anybody may have written to: every field that is read is
checked first, its type, its range, and how much memory it asks for. Fields that nobody reads may be anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path

from ..errors import InputError

MOST_LAYERS = MOST_HEADS = 1 << 14  # far above any model
MOST_STEPS = 1 << 20  # groups of heads, heads of a search, places of a beam

Test = Callable[[object], bool]
Fields = dict[str, tuple[Test, str]]  # by name: the test, and what is expected in words


def check_fields(file: Path, where: str, found, tests: Fields, all_of: Iterable[str] = ()) -> None:
    need(file, where.rstrip("."), isinstance(found, dict), "an object")
    for name in all_of:
        need(file, where + name, name in found, tests[name][1])
    for name, (test, expected) in tests.items():
        if name in found:
            need(file, where + name, test(found[name]), expected)


def need(file: Path, name: str, holds: bool, expected: str = "what a run writes there") -> None:
    if not holds:
        raise InputError(f"{file} is damaged: {name} is not {expected}; delete the folder or restore it")


def text(x) -> bool:
    return isinstance(x, str)


def number(x) -> bool:
    return isinstance(x, float) or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63)


def count(least: int, most: int) -> Test:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def flag(x) -> bool:
    return isinstance(x, bool)


def an_object(x) -> bool:
    return isinstance(x, dict)


def list_of(test: Test) -> Test:
    return lambda x: isinstance(x, list) and all(map(test, x))


def or_none(test: Test) -> Test:
    return lambda x: x is None or test(x)


layer, head = count(0, MOST_LAYERS - 1), count(0, MOST_HEADS - 1)


def pair(x) -> bool:
    """A head, or a whole layer: [layer, null]."""
    return isinstance(x, list) and len(x) == 2 and layer(x[0]) and (x[1] is None or head(x[1]))


def scanned_head(x) -> bool:
    return pair(x) and x[1] is not None


def marks(x) -> bool:
    first = x.get("first", {}) if isinstance(x, dict) else None
    return first == {} or (
        isinstance(first, dict)
        and count(0, 1 << 40)(first.get("prompt"))
        and pair([first.get("layer"), first.get("head")])
        and text(first.get("why"))
    )


def error_of_scores(x) -> bool:
    return (
        isinstance(x, dict)
        and all(text(x.get(name)) for name in ("against", "reason", "own"))
        and x.get("packing") is not None
        and noise(x.get("packing"))
        and noise(x.get("plain_max_abs"))
        and "plain_max_abs" in x
        and list_of(_rescored)(x.get("rescored"))
    )


def _rescored(x) -> bool:
    if not isinstance(x, dict) or not x.keys() <= {
        "layer",
        "head",
        "score",
        "expected",
        "drawn",
        "prompt",
        "step",
    }:
        return False
    return (
        scanned_head([x.get("layer"), x.get("head")])
        and all(number(x.get(name)) and isfinite(x[name]) for name in ("score", "expected"))
        and flag(x.get("drawn"))
        and all(count(0, 1 << 40)(x[name]) for name in ("prompt", "step") if name in x)
    )


def refusals(x) -> bool:
    """How often the unablated model refuses the prompts of a scan."""
    return (
        isinstance(x, dict)
        and all(count(0, 1 << 40)(x.get(name)) for name in ("refused", "prompts"))
        and all(map(number, (x.get("low"), x.get("high"))))
        and text(x.get("judge"))
    )


def origin(x) -> bool:
    """Where prompts came from: of what is read, the column of their groups and the group of each."""
    groups = x.get("group_by", {}) if isinstance(x, dict) else None
    return groups == {} or (
        isinstance(groups, dict) and text(groups.get("column")) and list_of(text)(groups.get("labels"))
    )


def noise(x) -> bool:
    return x is None or (number(x) and 0 <= x < float("inf"))
