"""Which kind of tree a set of packed prompts is, counted from the tree alone: it chooses launch parameters.

    leaves     many short endings after little in common: a block of keys is seen by few of a tile's queries
    template   a long part that all share, or one long prompt: most blocks of keys are seen by all of them

A tile multiplies all of its queries with all of its keys. How many products that is per pair of a query and a key
that it sees, `wasted_products` counts from the block table. Large tiles compute the most of them, small ones cost more
instructions a product: a tree is of `leaves` where a large tile computes more than LEAVES_WASTE products a pair.
"""

from __future__ import annotations

import numpy as np
import torch
from shipsfast.kernels.block_table import block_pairs, host

KINDS = ("leaves", "template")
# Queries and keys of the rule, for every dtype, head size and device, so that a tree is of one kind.
LARGE_TILE = (64, 64)
# Around it both kinds of tiles issue about as many instructions (docs/kernels.md has the count).
LEAVES_WASTE = 4.0


def wasted_products(
    position: np.ndarray | torch.Tensor,
    subtree_end: np.ndarray | torch.Tensor,
    tile: tuple[int, int],
    *,
    query_index: np.ndarray | torch.Tensor | None = None,
    window: int | None = None,
) -> float:
    """Products that tiles of (queries, keys) compute for each pair of a query and a key that it sees; 1 wastes none.

    Args:
        position, subtree_end: int [T], see shipsfast/ops/prefix_tree.py.
        tile: block_m and block_n of a launch configuration.
        query_index, window: as in block_table.
    """
    position = host(position)
    needed, _ = block_pairs(
        position, subtree_end, block_m=tile[0], block_n=tile[1], query_index=query_index, window=window
    )
    # A query sees its ancestors and itself, within the window.
    seen = 1 + (position if query_index is None else position[host(query_index)])
    if window is not None:
        seen = np.minimum(seen, window)
    return float(needed.sum() * tile[0] * tile[1] / max(1, seen.sum()))


def kind_of_tree(
    position: np.ndarray | torch.Tensor, subtree_end: np.ndarray | torch.Tensor, window: int | None = None
) -> str:
    """One of KINDS. All tokens are taken for queries, so that every layer of one window has the same kind."""
    wasted = wasted_products(position, subtree_end, LARGE_TILE, window=window)
    return "leaves" if wasted > LEAVES_WASTE else "template"
