"""The block table against the dense visibility of the reference: nothing missing, "full" really full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipsfast.kernels.block_table import BlockTable, block_table

from shipsfast.ops import prefix_tree, reference

# Few token values, so that random prompts share prefixes.
prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=12)
block_sizes = st.sampled_from([1, 2, 3, 4, 8, 16, 64])


def listed(table: BlockTable) -> dict[tuple[int, int], bool]:
    """(query block, key block) -> whether the table calls it fully visible."""
    row_ptr, full_end, col = (x.tolist() for x in (table.row_ptr, table.full_end, table.col))
    pairs = [
        ((m, col[e]), e < full_end[m])
        for m in range(table.num_query_blocks)
        for e in range(row_ptr[m], row_ptr[m + 1])
    ]
    assert len(dict(pairs)) == len(pairs), "a block pair is listed twice"
    return dict(pairs)


def dense_blocks(seen: np.ndarray, block_m: int, block_n: int) -> tuple[set, set]:
    """Block pairs in which some key is seen, and those in which all of block_n keys are seen by everyone."""
    some, every = set(), set()
    for m in range(-(-seen.shape[0] // block_m)):
        for n in range(-(-seen.shape[1] // block_n)):
            block = seen[m * block_m : (m + 1) * block_m, n * block_n : (n + 1) * block_n]
            if block.any():
                some.add((m, n))
            if block.all() and block.shape[1] == block_n:
                every.add((m, n))
    return some, every


def check(packed, block_m, block_n, query_index=None, window=None):
    table = block_table(
        packed.position,
        packed.subtree_end,
        block_m=block_m,
        block_n=block_n,
        query_index=query_index,
        window=window,
    )
    query = None if query_index is None else torch.as_tensor(query_index)
    position, subtree_end = torch.from_numpy(packed.position), torch.from_numpy(packed.subtree_end)
    seen = reference.visible(position, subtree_end, query, window).numpy()
    some, every = dense_blocks(seen, block_m, block_n)
    pairs = listed(table)
    assert some <= set(pairs), "a visible pair is missing"
    full = {pair for pair, is_full in pairs.items() if is_full}
    assert full <= every, "a block is called full and is not"
    return pairs, some, full, every


@settings(max_examples=60, deadline=None)
@given(prompts, block_sizes, block_sizes)
def test_without_window_the_table_is_exact(ids, block_m, block_n):
    pairs, some, full, every = check(prefix_tree.pack(ids), block_m, block_n)
    assert set(pairs) == some
    assert full == every


@settings(max_examples=60, deadline=None)
@given(prompts, block_sizes, block_sizes, st.data())
def test_query_subsets_are_exact_too(ids, block_m, block_n, data):
    packed = prefix_tree.pack(ids)
    nodes = st.integers(0, packed.num_tokens - 1)
    query_index = np.sort(data.draw(st.lists(nodes, min_size=1, max_size=20)))  # may repeat a node
    pairs, some, full, every = check(packed, block_m, block_n, query_index)
    assert set(pairs) == some
    assert full == every


@settings(max_examples=60, deadline=None)
@given(prompts, block_sizes, block_sizes, st.integers(1, 30))
def test_with_a_window_no_visible_pair_is_missing(ids, block_m, block_n, window):
    check(prefix_tree.pack(ids), block_m, block_n, window=window)


def test_window_skips_blocks_of_one_long_prompt():
    pairs, some, _, _ = check(prefix_tree.pack([list(range(100))]), 8, 8, window=10)
    assert set(pairs) == some
    assert len(pairs) < 3 * 13


def test_siblings_never_load_each_other():
    # 16 shared tokens, then 4 prompts of 16 own tokens: a prompt reads the shared block and its own.
    packed = prefix_tree.pack([[*range(16), *range(100 * p, 100 * p + 16)] for p in range(1, 5)])
    pairs = listed(block_table(packed.position, packed.subtree_end, block_m=16, block_n=16))
    assert pairs == {(0, 0): False} | {
        pair: full for m in range(1, 5) for pair, full in (((m, 0), True), ((m, m), False))
    }


def test_long_pack_needs_no_dense_mask():
    # 60,000 tokens: a dense mask would take 3.6 GB.
    shared = list(range(1000))
    packed = prefix_tree.pack([[*shared, *range(1000 * p, 1000 * p + 590)] for p in range(1, 101)])
    table = block_table(packed.position, packed.subtree_end, block_m=64, block_n=64)
    assert packed.num_tokens == 60_000
    # the 16 blocks of the shared part and about 6 on average of the prompt's own
    assert len(table.col) < 24 * table.num_query_blocks


def test_empty_queries():
    table = block_table(
        np.arange(4), np.full(4, 4), block_m=16, block_n=16, query_index=np.zeros(0, int), window=2
    )
    assert table.num_query_blocks == 0 and table.row_ptr.tolist() == [0] and len(table.col) == 0


@pytest.mark.parametrize("query_index", [[2, 1], [0, 4], [-1, 0]])
def test_refuses_queries_that_are_unsorted_or_outside(query_index):
    with pytest.raises(ValueError, match="ascending and within 0 .. 3"):
        block_table(np.arange(4), np.full(4, 4), block_m=16, block_n=16, query_index=np.array(query_index))
