"""Bars of progress, all alike: drawn over and over on a terminal; elsewhere, as in a log, a line at the start, one every
half minute and one at the end."""

from __future__ import annotations

import sys

from tqdm import tqdm

LINE_EVERY_S = 30.0  # where stderr is no terminal


class Bar(tqdm):
    """tqdm on stderr. It counts `total` steps, and shows them as `things` of `unit`: what a person counts."""

    def __init__(
        self, *args, things: int | None = None, unit: str = "it", progress: bool = True, **how
    ) -> None:
        """things: how many there are in all, by default the steps themselves; unit: in plural; progress: whether it is
        shown at all, which it is not where there are no steps."""
        self.things = things
        file = sys.stderr
        if not file.isatty():
            file = _Lines(file)
            how |= {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "miniters": 1, "leave": True}
            how |= {
                "bar_format": "{desc}: {percentage:3.0f}%, {done} of {of} {unit}, {elapsed} so far, {remaining} left"
            }
        else:
            how |= {"bar_format": "{l_bar}{bar}| {done} of {of} {unit} [{elapsed}<{remaining}]"}
        empty = how.get("total", len(args[0]) if args and hasattr(args[0], "__len__") else 1) == 0
        super().__init__(*args, unit=unit, file=file, disable=not progress or empty, **how)

    @property
    def format_dict(self) -> dict:
        """What tqdm puts into the line."""
        found = super().format_dict
        total, done = found["total"] or 0, found["n"]
        of = total if self.things is None else self.things
        if self.things is not None and total:
            done = of * min(done, total) / total
        prefix = (found["prefix"] or "").removesuffix(": ")  # which `set_description` adds
        return found | {"prefix": prefix, "done": f"{int(done):,}", "of": f"{int(of):,}"}


class _Lines:
    """A file to which a bar is written as lines of their own."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.file.write(text + "\n")

    def flush(self) -> None:
        self.file.flush()

    def isatty(self) -> bool:
        return False
