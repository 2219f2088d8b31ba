"""Which heads: pairs (layer, head), units that are switched off together, and how the command line writes them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

from ..errors import InputError, from_digits

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy
    from .subject import Subject

Head = tuple[int, int]  # (layer, query head), both from 0
Group = tuple[Head, ...]  # what is off together in a row
UNITS = ("head", "kv_group")


class Row(tuple):
    """A unit that one of several ablations switches off: its (layer, index), to which it is equal, and `way`, which one."""

    way: int

    def __new__(cls, unit: Head, way: int) -> Self:
        row = super().__new__(cls, unit)
        row.way = way
        return row


def rows_of(units: Iterable[Head], ways: int) -> list[Head]:
    """One row for each unit and ablation, in the order in which they fork; the units themselves where there is one."""
    units = list(units)
    return units if ways == 1 else [Row(unit, way) for unit in units for way in range(ways)]


def way_of(row: Head) -> int:
    return getattr(row, "way", 0)


def first_layer(heads: Iterable[Head], default: int) -> int:
    """The lowest layer with one of these heads: below it, nothing changes. `default` where there is none."""
    return min((layer for layer, _ in heads), default=default)


def check_unit(unit: str, anatomy: Anatomy) -> int:
    """How many units a layer has: query heads, or key/value groups. Raises InputError for another unit."""
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: expected one of {', '.join(UNITS)}")
    if unit == "kv_group" and not anatomy.uniform_kv_heads:
        raise InputError("the model's layers differ in their key/value heads: use unit 'head'")
    return anatomy.num_heads if unit == "head" else anatomy.num_kv_heads


def unit_heads(chosen: Head, unit: str, anatomy: Anatomy) -> tuple[Head, ...]:
    """The query heads of a unit: itself, or all that share the key/value head (layer, index)."""
    if unit == "head":
        return (chosen,)
    layer, index = chosen
    size = anatomy.num_heads // anatomy.num_kv_heads
    return tuple((layer, head) for head in range(index * size, (index + 1) * size))


def check_heads(
    heads: Iterable[Sequence[int | None]], num_layers: int, num_heads: int, unit: str = "head"
) -> list[Head]:
    """The heads as (layer, head) pairs, each once, in ascending order; (layer, None) stands for a whole layer.

    Raises InputError for a head that does not exist or an entry that is not a pair of integers.
    """
    out: set[Head] = set()
    if not isinstance(heads, Iterable):
        raise InputError(f"heads must be a list of (layer, head) pairs, got {heads!r}")
    for entry in heads:
        try:
            layer, head = entry[:2] if hasattr(entry, "score") else entry  # a HeadScore is as good as a pair
            layer, head = operator.index(layer), None if head is None else operator.index(head)
        except (TypeError, ValueError):
            raise InputError(
                f"head {entry!r} is not a (layer, head) pair of integers, or (layer, None) for a whole layer"
            ) from None
        if not (0 <= layer < num_layers and (head is None or 0 <= head < num_heads)):
            raise InputError(
                f"{unit} {layer}-{head} does not exist: the model has layers 0 to {num_layers - 1} "
                f"with {unit}s 0 to {num_heads - 1}"
                if head is not None
                else f"layer {layer} does not exist: the model has layers 0 to {num_layers - 1}"
            )
        out.update((layer, h) for h in (range(num_heads) if head is None else [head]))
    if not out:
        raise InputError("the list of heads is empty: give at least one (layer, head), or None for all")
    return sorted(out)


def check_groups(groups: Iterable, subject: Subject) -> list[list[Head]]:
    """The groups' units, each once and in ascending order. `groups`: as in `generate`.

    Raises InputError, naming the first group that is wrong.
    """
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise InputError(f"groups must be a list of lists of (layer, head) pairs, got {groups!r}")
    whole_layer = range(subject.num_units)
    asked: list[list[Head]] = []
    for number, group in enumerate(groups):
        if (
            isinstance(group, Sequence)
            and len(group) > 1
            and all(isinstance(x, numbers.Number) for x in group)
        ):
            raise InputError(
                f"group {number} is a single head: groups is a list of lists of heads, such as [[(0, 2)]]"
            )
        group = list(group) if isinstance(group, Iterable) and not isinstance(group, (str, bytes)) else group
        if group == []:
            asked.append([])
            continue
        try:
            units = check_heads(group, subject.anatomy.num_layers, subject.num_units, subject.unit)
        except InputError as error:
            raise InputError(f"group {number}: {error}") from None
        named = [(entry[0], h) for entry in group for h in (whole_layer if entry[1] is None else [entry[1]])]
        twice = next((head for head in named if named.count(head) > 1), None)
        if twice is not None:
            raise InputError(
                f"group {number} names {subject.unit} {twice[0]}-{twice[1]} twice: name each once"
            )
        asked.append(units)
    if not asked:
        raise InputError("there are no groups: give at least one, such as [] for the unablated model")
    return asked


def parse_heads(text: str) -> list[tuple[int, int | None]]:
    """Heads from the command line, for `check_heads`: "2-26", "2-26,3-1", or a whole layer, "5"."""
    out: list[tuple[int, int | None]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        layer, dash, head = part.partition("-")
        if not layer.isdecimal() or (dash and not head.isdecimal()):
            raise InputError(
                f"cannot read head {part!r}: write LAYER-HEAD, such as 2-26, or LAYER for a whole layer"
            )
        out.append((from_digits(layer), from_digits(head) if dash else None))
    if not out:
        raise InputError("the list of heads is empty: write LAYER-HEAD, such as 2-26")
    return out


def parse_groups(text: str) -> list[list[tuple[int, int | None]]]:
    """Groups of heads from the command line: "2-26; 2-26,3-1"; "none" is the unablated model."""
    parts = [part.strip() for part in text.split(";")]
    if not all(parts):
        raise InputError(
            f"cannot read the groups {text!r}: write heads such as 2-26,3-1, with ; between groups"
        )
    return [[] if part == "none" else parse_heads(part) for part in parts]


def group_name(group: Iterable[Sequence[int]]) -> str:
    """ "2-26+3-1"; "none" for the unablated model."""
    return "+".join(f"{layer}-{head}" for layer, head in group) or "none"
