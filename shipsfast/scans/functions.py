"""Functions of the caller's own: what they are called, and what they returned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch

from ..errors import InputError


def has_name(function: Callable) -> bool:
    """Whether module and name tell a function from any other."""
    return isinstance(function, FunctionType) and "<" not in function.__qualname__


def function_name(function: Callable) -> str:
    """Module and name."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__qualname__"):  # an object with __call__
        function = type(function)
    return f"{function.__module__}.{function.__qualname__}"


def real_numbers(returned, count: int, what: str) -> torch.Tensor:
    """What a function of the caller's own returned, [count]. Raises InputError, which begins with `what`."""
    wanted = f"{what}: expected {count} real numbers, shape [{count}]"
    try:
        scores = torch.as_tensor(returned).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{wanted}, got {type(returned).__name__}: return a tensor or an array") from error
    if scores.shape != (count,):
        raise InputError(f"{wanted}, got shape {list(scores.shape)}: return one score per ablated row")
    if scores.dtype.is_complex or scores.dtype == torch.bool:
        raise InputError(f"{wanted}, got {scores.dtype}: return floating-point numbers")
    return scores
