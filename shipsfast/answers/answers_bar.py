"""Progress of rows that decode together: they may all end in the same step, so a row at work counts for the part of the tokens
that it has of those it may have."""

from __future__ import annotations

from ..progress import Bar


class AnswersBar:
    """total: answers; limit: tokens that each may have; progress: whether it is shown."""

    def __init__(self, total: int, limit: int, progress: bool) -> None:
        self.limit, self.finished = limit, 0
        self._bar = Bar(total=total, things=total, desc="generate", unit="answers", progress=progress)

    def done(self, answers: int = 1) -> None:
        """So many more have ended."""
        self.finished += answers

    def underway(self, tokens: int) -> None:
        """What rows at work have so far, in all. Never goes back, where they start anew with fewer slots."""
        now = self.finished + tokens / self.limit
        self._bar.update(max(0.0, now - self._bar.n))

    def close(self) -> None:
        self.underway(0)
        self._bar.close()
