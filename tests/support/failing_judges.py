"""A judge that goes away, or answers what is no label."""

from shipsfast.answers.judges.judge import Judge
from tests.support.evaluations import (
    no_keyword,
)  # fmt: skip


class Fails(Judge):
    """Answers `times` calls, then it is gone; `how` it goes: an exception, or labels to return."""

    name = "fails"

    def __init__(self, times: int, how: object = None) -> None:
        self.times, self.how, self.judged = times, how, 0

    def describe(self) -> dict:
        return {"name": self.name}

    def labels(self, completions):
        self.times -= 1
        if self.times < 0 and isinstance(self.how, BaseException):
            raise self.how
        if self.times < 0:
            return self.how
        self.judged += len(completions)
        return no_keyword([c.text for c in completions])
