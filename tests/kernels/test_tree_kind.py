"""The kind of a tree, and the products that tiles compute, against dense visibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipsfast.kernels.block_table import block_table
from shipsfast.kernels.tree_kind import KINDS, kind_of_tree, wasted_products

from benchmarks.gpu.shapes import Prompts
from shipsfast.ops import prefix_tree, reference

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=12)
tiles = st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 16, 64]))


@settings(max_examples=60, deadline=None)
@given(prompts, tiles, st.one_of(st.none(), st.integers(1, 30)), st.data())
def test_products_are_counted_exactly(ids, tile, window, data):
    packed = prefix_tree.pack(ids)
    query_index = None
    if data.draw(st.booleans()):
        nodes = st.integers(0, packed.num_tokens - 1)
        query_index = np.sort(data.draw(st.lists(nodes, min_size=1, max_size=20)))
    position, subtree_end = torch.from_numpy(packed.position), torch.from_numpy(packed.subtree_end)
    query = None if query_index is None else torch.as_tensor(query_index)
    seen = reference.visible(position, subtree_end, query, window)
    how = {"query_index": query_index, "window": window}
    table = block_table(position, subtree_end, block_m=tile[0], block_n=tile[1], **how)
    computed = len(table.col) * tile[0] * tile[1]
    assert wasted_products(position, subtree_end, tile, **how) == computed / int(seen.sum())


def test_a_tile_of_one_query_and_one_key_wastes_nothing():
    packed = Prompts(10, 5).packed(1000)
    assert wasted_products(packed.position, packed.subtree_end, (1, 1)) == 1


@pytest.mark.parametrize(
    "shared, tile, products",
    [
        (5, (64, 64), 12.6), (5, (64, 32), 8.6), (5, (64, 16), 6.6), (5, (32, 16), 4.5), (5, (16, 16), 3.3),
        (140, (64, 64), 2.1), (140, (64, 32), 1.7), (140, (32, 16), 1.3),
    ],
)  # fmt: skip
def test_the_products_that_docs_kernels_tells_of(shared, tile, products):
    packed = Prompts(100, shared).packed(32000)
    assert round(wasted_products(packed.position, packed.subtree_end, tile), 1) == products


def kind(ids, window=None):
    packed = prefix_tree.pack(ids)
    found = {kind_of_tree(*tree, window) for tree in (
        (packed.position, packed.subtree_end),
        (torch.from_numpy(packed.position), torch.from_numpy(packed.subtree_end)),
    )}  # fmt: skip
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("count", [2, 5, 20, 100, 300])
def test_short_prompts_are_leaves_and_a_long_template_is_none(count):
    short, long = (Prompts(count, shared).token_ids(32000) for shared in (5, 140))
    assert kind(short) == kind(short[::-1]) == "leaves"
    assert kind(long) == kind(long[::-1]) == "template"
    assert {"leaves", "template"} == set(KINDS)


def test_a_prompt_alone_is_a_template_unless_it_is_a_leaf_itself():
    assert kind([list(range(17))]) == "leaves"
    assert [kind([list(range(length))]) for length in (64, 500, 2000)] == ["template"] * 3


def test_a_window_counts():
    assert kind([list(range(2000))], window=512) == "template"
    assert kind([list(range(2000))], window=16) == "leaves"
