"""The loop of an evaluation, which runs one way: rows are decoded, judged, kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..engine.decoder import Decoded
from ..memory import once_more
from ..prompts.messages import prompt_text
from ..results.completions import Completions
from ..runs.folder import RunFolder
from ..runs.kinds import COMPLETIONS
from .decode import decode, longest
from .generation import Generation
from .judges.judge import Completion, around_unfinished
from .judges.thought import answers_of
from .likelihood import Likelihood
from .self_check import check_generation

WRITE_EVERY_S = 5.0  # finished rows reach the disk at least that often, and at the end
Labelled = Callable[[Sequence[Completion]], Sequence[str]]


class Kept:
    """Labelled completions, and the room of a run folder that they are written to as they come."""

    def __init__(self, completions: Completions, folder: RunFolder | None, room: str = COMPLETIONS) -> None:
        """What the room holds is read. Raises InputError for a damaged part."""
        self.completions, self.folder, self.room = completions, folder, room
        self._unwritten: list[tuple[int, int]] = []
        self._written = time.monotonic()
        if folder is not None:
            completions.read(folder.path, room)

    def take(self, row: Decoded, text: str, label: str, nll_nats: float) -> None:
        self.completions.keep(row, text, label, nll_nats)
        self._unwritten.append((row.group, row.prompt))

    def write(self) -> None:
        if self.folder is not None and self._unwritten:
            # First: a signal may come right after, and none is written twice.
            rows, self._unwritten = self._unwritten, []
            self.folder.write_part(self.completions.frame(rows, text=self.completions.keep_text), self.room)
        self._written = time.monotonic()

    def write_now_and_then(self) -> None:
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()


def answer(generation: Generation, judge: Labelled, kept: Kept, progress: bool = False) -> float:
    """Decode, judge and keep what is missing with its likelihood, and hold one of the new texts against a plain forward pass.

    Returns the shortfall that `check_generation` found. Where nothing is missing, the run was ended before that check
    or by it: it is made on a text that is decoded anew.
    """
    missing, checked = kept.completions.missing(), None
    likelihood = Likelihood(generation)
    if missing:
        try:
            for rows in decode(generation, missing, progress=progress):
                checked = longest([checked, *rows])
                nll_nats = likelihood.of(rows)
                for each, nll in zip(judged(generation, judge, rows), nll_nats, strict=True):
                    kept.take(*each, nll)
                kept.write_now_and_then()
        finally:  # also when a judge raises: what it has judged before is kept
            kept.write()
    else:
        lengths = kept.completions.num_tokens
        again = tuple(map(int, np.unravel_index(lengths.argmax(), lengths.shape)))
        for rows in decode(generation, [again]):
            checked = longest([checked, *rows])
    what = "holding a text against a plain forward pass"
    return once_more(what, lambda: check_generation(generation, checked))


def judged(
    generation: Generation, judge: Labelled, rows: Sequence[Decoded]
) -> Iterator[tuple[Decoded, str, str]]:
    """Finished rows with their whole texts, and labels of what follows a thought."""
    if not rows:
        return
    subject, limit, tokenizer = generation.subject, generation.max_new_tokens, generation.tokenizer
    tokens = [row.tokens for row in rows]
    prompts = [prompt_text(subject.measurement.prompts[row.prompt]) for row in rows]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    asked = [(subject.token_ids[row.prompt], prompt) for row, prompt in zip(rows, prompts, strict=True)]
    said = []
    for row, prompt, answer in zip(rows, prompts, answers_of(tokenizer, tokens, asked), strict=True):
        thought = len(row.tokens) - answer.tokens
        said.append(
            Completion(
                prompt, answer.text, answer.tokens, row.finished, limit - thought,
                thinks=thought > 0 or answer.thinking, thinking=answer.thinking,
            )
        )  # fmt: skip
    yield from zip(rows, texts, around_unfinished(said, judge), strict=True)
