"""How targets are run: coverage-guided under atheris, or in CI as a replay of the corpus and seeded mutations of it.

A target is a module with `setup() -> context manager`, `one(data: bytes) -> None`, which raises for a bug and for
nothing else, and `seeds() -> iterator of bytes`. A finding is the exception's type and the innermost line of shipsfast
in its traceback; a run goes on after one, and lists each once.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


class Reader:
    """Numbers, choices and text out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return (self.byte() << 8 | self.byte()) % n if n > 256 else self.byte() % n

    def pick(self, values):
        return values[self.below(len(values))]

    def rest(self) -> bytes:
        out, self.at = self.data[self.at :], len(self.data)
        return out

    def __bool__(self) -> bool:
        return self.at < len(self.data)


def place(error: BaseException) -> str:
    """What two findings have in common when they are the same one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/shipsfast/" in f.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].line})"


class Findings(dict):
    """The first input and the message of each place."""

    def guard(self, one, data: bytes) -> None:
        try:
            one(data)
        except Exception as error:  # noqa: BLE001 - a finding is any exception
            if (name := place(error)) not in self:
                self[name] = (data, str(error))


def corpus(target) -> list[bytes]:
    """What the repository keeps of a target's inputs, and its seeds."""
    folder = CORPUS / target.__name__.rpartition(".")[2]
    kept = sorted(folder.iterdir()) if folder.is_dir() else []
    return [*target.seeds(), *(file.read_bytes() for file in kept)]


def mutations(inputs: list[bytes], seed: int) -> Iterator[bytes]:
    """Endless: one to four small changes to one of the inputs, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(inputs))
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randint(0, len(data)), rng.randint(1, 8)
            kind = rng.randrange(5)
            if kind == 0:
                data[at : at + length] = b""
            elif kind == 1:
                data[at:at] = rng.randbytes(length)
            elif kind == 2:
                data[at : at + length] = rng.randbytes(length)
            elif kind == 3:
                other = rng.choice(inputs)
                start = rng.randint(0, len(other))
                data[at:at] = other[start : start + 4 * length]
            else:
                data[at : at + length] = data[at : at + length] * 2
        yield bytes(data)


def smoke(target, count: int, seed: int = 0, seconds: float = 60.0) -> tuple[int, Findings]:
    """The corpus, and `count` mutations or as many as fit into the time. Needs no atheris."""
    inputs, findings, done = corpus(target), Findings(), 0
    stop = time.monotonic() + seconds
    with target.setup():
        for data in inputs:
            findings.guard(target.one, data)
            done += 1
        for data in mutations(inputs, seed):
            if done >= len(inputs) + count or time.monotonic() > stop:
                return done, findings
            findings.guard(target.one, data)
            done += 1
    raise AssertionError("mutations do not end")
