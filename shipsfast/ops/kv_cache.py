"""Keys and values of the rows that generate, layer by layer, in slots of one size.

A row keeps one slot in every layer from its prefill to its last token; then the slot is another row's. Positions of
a slot beyond its row's length hold whatever was there before, and nobody reads them.
"""

from __future__ import annotations

import torch


class KVCache:
    """S slots of C positions.

    Layers take the shape and dtype of the first keys and values they are given: key[layer] [S, HKV, C, D] and
    value[layer] [S, HKV, C, DV]. mean_keys: also keep mean_key[layer] [S, C, D], the mean over key/value heads,
    for ablations that put it in a head's place.
    """

    def __init__(
        self, layers: int, slots: int, capacity: int, *, mean_keys: bool = False, native: bool = False
    ) -> None:
        """native: write by csrc/, on a CPU."""
        self.slots, self.capacity, self.mean_keys, self.native = slots, capacity, mean_keys, native
        self.key: list[torch.Tensor | None] = [None] * layers
        self.value: list[torch.Tensor | None] = [None] * layers
        self.mean_key: list[torch.Tensor | None] = [None] * layers

    def write(
        self,
        layer: int,
        slot: torch.Tensor,
        position: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        source: torch.Tensor,
    ) -> None:
        """Put key [n, HKV, D] and value [n, HKV, DV] at source int64 [M] to slot and position int64 [M], no pair twice."""
        if self.key[layer] is None:
            self.key[layer] = self._room(key)
            self.value[layer] = self._room(value)
            if self.mean_keys:
                self.mean_key[layer] = self._room(key[:, :1])[:, 0]
        rooms = [(self.key[layer], key), (self.value[layer], value)]
        if self.mean_keys:
            rooms.append((self.mean_key[layer][:, None], key.mean(1, keepdim=True)))
        source, slot, position = (x.contiguous() for x in (source, slot, position))
        for room, fresh in rooms:
            if self.native:
                torch.ops.shipsfast.cache_write(fresh, source, slot, position, room)
            else:
                room[slot, :, position] = fresh.index_select(0, source)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        _, heads, size = like.shape
        return torch.empty(self.slots, heads, self.capacity, size, dtype=like.dtype, device=like.device)


def slot_bytes(layers: int, kv_heads: int, head_dim: int, capacity: int, itemsize: int) -> int:
    """Memory of one slot in all layers, in bytes."""
    return 2 * layers * kv_heads * head_dim * capacity * itemsize
