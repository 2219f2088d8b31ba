"""Weights that are bytes of safetensors files, read straight to where they are used.

Two buffers take turns. A tensor that is read into new memory costs four times what one costs that is read into memory
in use: the system hands out pages one by one, and clears them first.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from ..errors import InputError

# Tensors lie where they would in a mapped file, up to a multiple of so many bytes, as they do in a model that is in
# memory: matrix products of small sizes round otherwise at other addresses.
ALIGNED = 64
COMPARED = 1 << 20  # bytes at a time
BEGINNING = 64  # bytes by which a tensor is looked for; a smaller one is not found in another


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file. state: of the file then, so that another one under its name is noticed."""

    file: str
    start: int
    size: int
    state: tuple[int, ...]


def places(file: str) -> dict[str, Place]:
    """The tensors of a safetensors file that has been opened without an error, by name."""
    file = os.path.abspath(file)  # it is opened again after a change of folder
    with open(file, "rb") as opened:
        state = _state(opened.fileno())
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        start, stop = about["data_offsets"]
        found[name] = Place(file, 8 + length + start, stop - start, state)
    return found


def found_at(tensor: torch.Tensor, likely: Place | None, others: Sequence[Place]) -> list[Place]:
    """The places whose bytes, one after the other, are a tensor's on the CPU; empty if there are none.

    likely: where it lies if it has only been renamed; others: of what it may have been put together, such as experts.
    """
    if not tensor.is_contiguous():
        return []
    own = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    with _Reader() as reader:
        if likely is not None and likely.size == len(own):
            return [likely] if _same(reader, likely, own) else []
        beginnings: dict[bytes, list[Place]] = {}
        for place in sorted(others, key=lambda p: -p.size):
            beginnings.setdefault(reader.beginning(place), []).append(place)
        out, at = [], 0
        while at < len(own):
            candidates = beginnings.get(own[at : at + BEGINNING].tobytes(), [])
            fits = (p for p in candidates if _same(reader, p, own[at : at + p.size]))
            place = next(fits, None)
            if place is None:
                return []
            out.append(place)
            at += place.size
    return out


def _same(reader: _Reader, place: Place, own: np.ndarray) -> bool:
    if len(own) != place.size:
        return False
    scratch = np.empty(min(COMPARED, place.size), dtype=np.uint8)
    for at in range(0, place.size, COMPARED):
        part = scratch[: min(COMPARED, place.size - at)]
        reader.read(place, part, at)
        if not np.array_equal(part, own[at : at + len(part)]):
            return False
    return True


class Buffers:
    """Memory for the weights of one layer at a time, given out again when nothing refers to it any more.

    size: the most that `needed` is; pinned: for copies to a GPU.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned = size, pinned
        self._free: list[np.ndarray] = []
        self._lent: dict[int, tuple[np.ndarray, weakref.ref]] = {}

    def read(self, key: int, wanted: Sequence[tuple[list[Place], torch.Tensor]]) -> list[torch.Tensor]:
        """Tensors with the bytes of these places, and the shapes and dtypes of these tensors; they are `key`'s."""
        buffer = self._free.pop() if self._free else self._new()
        lease = buffer.view()
        memory = torch.from_numpy(lease)  # it, and every tensor made of it, keeps the lease alive
        self._lent[key] = buffer, weakref.ref(lease)
        out, at = [], 0
        with _Reader() as reader:
            for pieces, like in wanted:
                start = at = at + (_residue(pieces, like.dtype) - at) % ALIGNED
                for place in pieces:
                    reader.read(place, lease[at : at + place.size])
                    at += place.size
                out.append(memory[start:at].view(like.dtype).view(like.shape))
        return out

    def give_back(self, key: int) -> None:
        """What `key` had may be overwritten, unless somebody still holds a tensor of it."""
        buffer, lease = self._lent.pop(key, (None, None))
        if buffer is not None and lease() is None:
            self._free.append(buffer)

    def clear(self) -> None:
        """Let go of what is not lent out."""
        self._free.clear()

    def _new(self) -> np.ndarray:
        if self.pinned:
            return torch.empty(self.size, dtype=torch.uint8, pin_memory=True).numpy()
        return _memory(self.size)


def read_alone(place: Place, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that lies there, in memory of its own."""
    skip = _residue([place], dtype)
    memory = _memory(skip + place.size)[skip:]
    with _Reader() as reader:
        reader.read(place, memory)
    return torch.from_numpy(memory).view(dtype).view(*shape)


def _memory(size: int) -> np.ndarray:
    """Bytes from a multiple of ALIGNED on."""
    whole = np.empty(size + ALIGNED, dtype=np.uint8)
    skip = -whole.ctypes.data % ALIGNED
    return whole[skip : skip + size]


def _residue(pieces: Sequence[Place], dtype: torch.dtype) -> int:
    """What was put together, or lies where no such number can, is copied to memory of torch's own."""
    at = pieces[0].start % ALIGNED
    return at if len(pieces) == 1 and at % dtype.itemsize == 0 else 0


def needed(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that hold these tensors, wherever they come from."""
    return sum(t.numel() * t.element_size() + ALIGNED for t in tensors)


class _Reader:
    """Reads places, each file opened once."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def beginning(self, place: Place) -> bytes:
        into = np.empty(min(BEGINNING, place.size), dtype=np.uint8)
        self.read(place, into)
        return into.tobytes()

    def read(self, place: Place, into: np.ndarray, offset: int = 0) -> None:
        """Fill `into` with the bytes from `offset` on. Raises InputError if the file is another one by now."""
        if place.file not in self._open:
            try:
                self._open[place.file] = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise InputError(
                    f"{place.file} cannot be read any more ({error.strerror}): a streamed model needs its files"
                ) from error
            if _state(self._open[place.file]) != place.state:
                raise InputError(f"{place.file} has changed since the model was loaded: load it again")
        done = 0
        while done < len(into):
            count = os.preadv(self._open[place.file], [into[done:]], place.start + offset + done)
            if not count:
                raise InputError(f"{place.file} ends before its tensors do: load the model again")
            done += count


def _state(descriptor: int) -> tuple[int, ...]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
