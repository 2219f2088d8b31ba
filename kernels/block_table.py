"""Which key blocks each query block of a prefix tree must load, found on the host without a T x T mask.

The packed tokens are in depth-first order (shipsfast/ops/prefix_tree.py), so the queries that see key j are those
with packed index in [j, subtree_end[j]). Queries are sorted, hence they are also one run of query ranks
[first_j, stop_j), and the query blocks they touch are one run as well. Each key adds +1 at the start of
its run and -1 after it, in the column of its key block; the running sum over query blocks then counts, for
every block pair, the keys that somebody in the query block sees. A second count of the keys that everybody
in the query block sees tells which pairs need no mask. Time and memory are O(T + number of block pairs).

A sliding window is not a run (siblings' subtrees interleave in depth), so it is applied to the smallest and
largest position of each block: such a table may keep a pair that nobody sees, and never drops one that
somebody does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Block pairs in compressed-row form: one row for each query block.

    row_ptr   int32 [NQ + 1]  where each query block's entries start in `col`
    full_end  int32 [NQ]      entries row_ptr[i] .. full_end[i] - 1 are fully visible and need no mask,
                              entries full_end[i] .. row_ptr[i + 1] - 1 need one
    col       int32 [N]       key blocks, ascending inside each of the two parts
    """

    row_ptr: torch.Tensor
    full_end: torch.Tensor
    col: torch.Tensor
    made_for: tuple  # block_m, block_n, queries, keys, window

    @property
    def num_query_blocks(self) -> int:
        return len(self.full_end)


def block_table(
    position: np.ndarray | torch.Tensor,
    subtree_end: np.ndarray | torch.Tensor,
    *,
    block_m: int,
    block_n: int,
    query_index: np.ndarray | torch.Tensor | None = None,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> BlockTable:
    """Build the table once for a tree and keep it: every layer and every row with that tree can use it.

    Args:
        position, subtree_end: int [T], see shipsfast/ops/prefix_tree.py. Tensors on a GPU are copied to the host.
        block_m, block_n: queries and keys in a block, as in the launch configuration of the kernel.
        query_index: int [TQ], packed indices of the queries in ascending order, None for all T.
        window: sliding window in tokens, counting the token itself, None for no window.
        device: where the tensors of the table will live.
    Raises:
        ValueError: query_index is not ascending or names a token that does not exist.
    """
    needed, full = block_pairs(
        position, subtree_end, block_m=block_m, block_n=block_n, query_index=query_index, window=window
    )
    num_keys = len(position)
    num_queries = num_keys if query_index is None else len(query_index)
    # A stable sort by (query block, masked or not) puts the fully visible pairs of each row first.
    row, col = np.nonzero(needed)
    masked = ~full[row, col]
    order = np.lexsort((masked, row))
    row_ptr = np.concatenate([[0], np.cumsum(needed.sum(axis=1))])
    full_end = row_ptr[:-1] + (needed & full).sum(axis=1)
    to_device = lambda x: torch.from_numpy(x.astype(np.int32)).to(device)
    return BlockTable(
        row_ptr=to_device(row_ptr),
        full_end=to_device(full_end),
        col=to_device(col[order]),
        made_for=(block_m, block_n, num_queries, num_keys, window),
    )


def block_pairs(
    position: np.ndarray | torch.Tensor,
    subtree_end: np.ndarray | torch.Tensor,
    *,
    block_m: int,
    block_n: int,
    query_index: np.ndarray | torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(needed, full), bool [NQ, NK]: which pairs of blocks must be loaded, and which are fully visible.

    Arguments and errors are those of block_table.
    """
    position, subtree_end = host(position), host(subtree_end)
    num_keys = len(position)
    query = np.arange(num_keys) if query_index is None else host(query_index)
    num_queries = len(query)
    if num_queries and (query[0] < 0 or query[-1] >= num_keys or np.any(np.diff(query) < 0)):
        raise ValueError(
            f"query_index must be ascending and within 0 .. {num_keys - 1}: sort it, then undo the sort"
        )
    nq, nk = -(-num_queries // block_m), -(-num_keys // block_n)

    key = np.arange(num_keys)
    first = np.searchsorted(query, key)  # [T] rank of the first query that sees the key
    stop = np.searchsorted(query, subtree_end)  # [T] one past the rank of the last
    seen_by_any = _count(first // block_m, -(-stop // block_m), key // block_n, nq, nk, first < stop)
    # The last query block may be short, and is wholly covered once the run reaches the last query.
    stop_full = np.where(stop == num_queries, nq, stop // block_m)
    seen_by_all = _count(-(-first // block_m), stop_full, key // block_n, nq, nk, first < stop)

    needed = seen_by_any > 0  # [NQ, NK]
    full = seen_by_all == block_n
    if window is not None and num_queries:
        q_starts, k_starts = np.arange(0, num_queries, block_m), np.arange(0, num_keys, block_n)
        q_low, q_high = (f.reduceat(position[query], q_starts)[:, None] for f in (np.minimum, np.maximum))
        k_low, k_high = (f.reduceat(position, k_starts)[None, :] for f in (np.minimum, np.maximum))
        needed &= q_low - k_high < window
        full &= q_high - k_low < window
    return needed, full


def _count(
    start: np.ndarray, stop: np.ndarray, column: np.ndarray, nq: int, nk: int, use: np.ndarray
) -> np.ndarray:
    """[NQ, NK] how many keys of each key block have a query block in their run start .. stop - 1."""
    use = use & (start < stop)
    step = np.zeros((nq + 1, nk), dtype=np.int32)
    np.add.at(step, (start[use], column[use]), 1)
    np.add.at(step, (stop[use], column[use]), -1)
    return np.cumsum(step, axis=0)[:nq]


def host(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """int64 on the host."""
    return np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x).astype(np.int64)
