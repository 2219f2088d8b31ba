"""Finished rows of a generation with their labels, [G groups, P prompts], and the parts of a run folder they lie in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from ..engine.decoder import Decoded
from ..results.completions import ROOM, Completions
from ..runs.folder import RunFolder
from .judges.judge import Completion
from .queue import Generation

WRITE_EVERY_S = 5.0  # finished rows reach the disk at least that often, and at the end
Labelled = Callable[[Sequence[Completion]], Sequence[str]]


def judged(
    generation: Generation,
    batches: Iterator[list[Decoded]],
    prompts: Sequence[str],
    tokenizer,
    judge: Labelled,
    completions: Completions,
    folder: RunFolder | None,
    room: str = ROOM,
) -> None:
    """Turn finished rows into labelled completions, and write them as they come to a room of the run folder."""
    unwritten: list[tuple[int, int]] = []
    written = time.monotonic()

    def write() -> None:
        nonlocal written
        if folder is not None and unwritten:
            folder.write_part(completions.frame(unwritten, text=completions.keep_text), room)
        unwritten.clear()
        written = time.monotonic()

    try:
        for rows in batches:
            if not rows:
                continue
            texts = tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
            labels = judge(
                [
                    Completion(
                        prompts[row.prompt], text, len(row.tokens), row.finished, generation.max_new_tokens
                    )
                    for row, text in zip(rows, texts, strict=True)
                ]
            )
            for row, text, label in zip(rows, texts, labels, strict=True):
                completions.keep(row, text, label)
                unwritten.append((row.group, row.prompt))
            if not 0 <= time.monotonic() - written <= WRITE_EVERY_S:  # also if the clock was set back
                write()
    finally:  # also when a judge raises: what it has judged before is kept
        write()
