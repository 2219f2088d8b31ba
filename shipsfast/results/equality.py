"""When two results are equal: the same identity and the same numbers, NaN in the same places. Not what ran, or when."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import ClassVar

import numpy as np


class Compared:
    """`==` for classes that hold arrays, which dataclasses compare wrongly. They can be changed, so they have no hash.

    It looks at the fields of a dataclass but for those with compare=False, of other classes at the attributes named in
    `compared`.
    """

    compared: ClassVar[tuple[str, ...]] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        named = [f.name for f in fields(self) if f.compare] if is_dataclass(self) else self.compared
        return all(equal(getattr(self, name), getattr(other, name)) for name in named)

    __hash__ = None


def equal(one: object, other: object) -> bool:
    """Lists and tuples are alike, as in JSON."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        if np.shape(one) != np.shape(other):
            return False
        one, other = np.asarray(one), np.asarray(other)
        numbers = one.dtype.kind == other.dtype.kind == "f"
        return bool(np.array_equal(one, other, equal_nan=numbers))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
