"""Times of several ways of doing one thing.

A shared machine's speed changes within seconds: every run of a path has a run of ours beside it, and how many times
slower it is, is the median over these pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np


class Paths:
    """Times in seconds, failures and ratios to `ours`, by the paths' names."""

    def __init__(self, ours: str, others: Iterable[str]) -> None:
        self.ours = ours
        self.times: dict[str, list[float]] = {name: [] for name in (ours, *others)}
        self.failures: dict[str, str] = {}
        self.ratios: dict[str, list[float]] = {}

    def timed(
        self, name: str, run: Callable, check: Callable[[str, object], str | None], times: float = 1
    ) -> None:
        """Run a path and keep how long it took, `times` over for one that did a part.

        check: (name, what the path returned) -> what is wrong with it, if anything.
        """
        start = time.perf_counter()
        try:
            found = run()
            taken = time.perf_counter() - start
        except (RuntimeError, ValueError) as error:
            self.failures[name] = str(error)
            return
        problem = check(name, found)
        if problem:
            self.failures[name] = problem
        self.times[name].append(taken * times)

    def paired(self, name: str) -> None:
        """The last run of a path and the last of ours are neighbours."""
        if name not in self.failures and self.ours not in self.failures:
            self.ratios.setdefault(name, []).append(self.times[name][-1] / self.times[self.ours][-1])

    def figures(self, name: str) -> dict:
        """What a row says of a path: its times, or why it failed."""
        if name in self.failures:
            return {"failed": self.failures[name]}
        taken = self.times[name]
        median = statistics.median(taken)
        low, high = (float(x) for x in np.quantile(taken, [0.2, 0.8]))
        ratios = self.ratios.get(name, [median / statistics.median(self.times[self.ours])])
        return {
            "median_s": round(median, 4), "p20_s": round(low, 4), "p80_s": round(high, 4), "runs": len(taken),
            "times_slower_than_shipsfast": round(statistics.median(ratios), 3),
        }  # fmt: skip
