"""The progress of a scan, and a word where it writes nothing for long."""

from __future__ import annotations

import time

from ..clock import in_words
from ..engine.measurement import ScanExecution
from ..engine.subject import Subject
from ..engine.work_plan import PART_SECONDS
from ..errors import note
from ..models.weights import where_weights_are
from ..progress import Bar


class ScanBar(Bar):
    """It counts (row, layer) steps, which pass evenly, and shows them as scores: heads x prompts.

    All rows of a block end together, and then they are written. Where that takes longer than it is planned to, the user
    is told once how long, while the first such block is at work.
    """

    def __init__(
        self, name: str, steps: int, scores: int, subject: Subject, execution: ScanExecution
    ) -> None:
        """subject: what is scanned."""
        self._streamed = where_weights_are(subject.model) != "memory"
        self._out, self._block, self._done, self._began = execution.out, 0, 0, time.perf_counter()
        super().__init__(
            total=steps, desc=name, things=scores, unit="heads x prompts", progress=execution.progress
        )

    def begin(self, steps: int) -> None:
        """A block of so many steps begins."""
        self._block, self._done, self._began = steps, 0, time.perf_counter()

    def update(self, n: float = 1) -> bool | None:
        drawn = super().update(n)
        self._done += n
        taken = time.perf_counter() - self._began
        if self._out is not None and taken > PART_SECONDS and 0 < self._done < self._block:
            note(
                f"{self._out} gets its next part about every {in_words(taken * self._block / self._done)}: a block of heads is "
                "written when all of it is through, and smaller blocks (rows_per_block=, or less --max-memory) would pass "
                f"the unablated model through all layers{' and read all weights' * self._streamed} more often"
            )
            self._out = None
        return drawn
