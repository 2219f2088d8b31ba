"""Rows of a generation, decoded by the engine that was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..engine.decoder import Decoded
from ..errors import InputError
from .generation import Generation
from .queue import continuous
from .transformers_engine import with_transformers

ENGINES = ("auto", "continuous", "transformers")


def decode(
    generation: Generation,
    rows: Iterable[tuple[int, int]],
    *,
    engine: str = "auto",
    generate_kwargs: dict | None = None,
    progress: bool = False,
) -> Iterator[list[Decoded]]:
    """Decode the (group, prompt) rows; finished ones come out in batches, in any order.

    A model whose layers keep a state of their own besides keys and values goes through its own `generate`.
    Raises InputError for an engine that cannot run.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}: expected {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    own_state = generation.subject.anatomy.plain_sequences
    if engine == "continuous" and own_state:
        raise InputError(
            f"engine 'continuous' cannot run: {type(generation.subject.model).__name__} has layers that keep a state of "
            "their own between tokens; use engine='auto' or 'transformers'"
        )
    if engine == "continuous" and generate_kwargs:
        raise InputError(
            f"engine 'continuous' takes no generate_kwargs ({', '.join(generate_kwargs)}): use 'auto' or 'transformers'"
        )
    if engine == "transformers" or generate_kwargs or own_state:
        return with_transformers(generation, rows, generate_kwargs or {}, progress)
    return continuous(generation, rows, progress)


def longest(rows: Iterable[Decoded | None]) -> Decoded | None:
    """The row with the longest text, the first of several; None is no row."""
    return max(filter(None, rows), key=lambda row: len(row.tokens), default=None)
