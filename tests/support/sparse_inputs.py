"""Tensors of more elements than there is memory for."""

from __future__ import annotations

import mmap

import torch

MAP_NORESERVE = 0x4000  # of Linux; the mmap module has a name for it from Python 3.13 on


def sparse(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` zeros of which only the pages that are touched take memory."""
    room = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(room, dtype=dtype, count=count)
