"""Groups of heads that are off together."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..engine.heads import Head, check_heads
from ..errors import InputError

if TYPE_CHECKING:
    from ..engine.subject import Subject


def check_groups(groups: Iterable, subject: Subject) -> list[list[Head]]:
    """The groups' units, each once and in ascending order. `groups`: as in `generate`.

    Raises InputError, naming the first group that is wrong.
    """
    anatomy = subject.anatomy
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise InputError(f"groups must be a list of lists of (layer, head) pairs, got {groups!r}")
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
            units = check_heads(group, anatomy.num_layers, subject.num_units, subject.unit)
        except InputError as error:
            raise InputError(f"group {number}: {error}") from None
        named = [(entry[0], h) for entry in group for h in _heads_of(entry, subject.num_units)]
        twice = next((head for head in named if named.count(head) > 1), None)
        if twice is not None:
            raise InputError(
                f"group {number} names {subject.unit} {twice[0]}-{twice[1]} twice: name each once"
            )
        asked.append(units)
    if not asked:
        raise InputError("there are no groups: give at least one, such as [] for the unablated model")
    return asked


def _heads_of(entry: Sequence[int | None], num_units: int) -> Iterable[int]:
    return range(num_units) if entry[1] is None else [entry[1]]
