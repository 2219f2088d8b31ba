"""The prefix tree: each prompt's tokens are exactly its ancestors, and nothing is stored twice."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shipsfast.ops import reference
from shipsfast.ops.prefix_tree import pack
from shipsfast.ops.tree_attention_torch import plan_segments, segment_attention

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=9)


@given(PROMPTS)
def test_every_prompt_is_the_path_to_its_last_node(prompts):
    packed = pack(prompts)
    for ids, last in zip(prompts, packed.last_index, strict=True):
        path = [j for j in range(last + 1) if last < packed.subtree_end[j]]
        assert packed.token_ids[path].tolist() == ids
        assert packed.position[path].tolist() == list(range(len(ids)))


@given(PROMPTS)
def test_common_prefixes_are_stored_once(prompts):
    prefixes = {tuple(ids[: n + 1]) for ids in prompts for n in range(len(ids))}
    assert pack(prompts).num_tokens == len(prefixes)


def test_a_prompt_that_goes_on_where_another_ends_cuts_no_segment():
    assert len(pack([[1, 2], [1, 2, 3, 4]]).segments) == 1
    assert len(pack([[1, 2, 5], [1, 2, 3, 4]]).segments) == 3  # these two branch


@given(PROMPTS)
def test_segments_are_the_tree(prompts):
    packed = pack(prompts)
    assert [n for s in packed.segments for n in range(s.start, s.stop)] == list(range(packed.num_tokens))
    for number, segment in enumerate(packed.segments):
        nodes = [
            n for s in packed.path(number) for n in range(packed.segments[s].start, packed.segments[s].stop)
        ]
        last = segment.stop - 1
        assert nodes == [j for j in range(last + 1) if last < packed.subtree_end[j]]


def test_empty_prompts_are_named():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        pack([[1], []])
    with pytest.raises(ValueError, match="no prompts"):
        pack([])


@given(
    PROMPTS,
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_torch_path_equals_the_dense_reference(prompts, window, softcap, trimmed, kv_heads):
    packed = pack(prompts)
    rows, heads, size, tokens = 3, 4, 8, packed.num_tokens
    gen = torch.Generator().manual_seed(tokens)
    query_index = np.unique(packed.last_index) if trimmed else None

    def draw(count, length):
        return torch.randn(rows, length, count, size, dtype=torch.float64, generator=gen).transpose(1, 2)

    q = draw(heads, tokens if query_index is None else len(query_index))
    k, v = draw(kv_heads, tokens), draw(kv_heads, tokens)
    logit_scale, output_scale = torch.ones(rows, heads), torch.ones(rows, heads)
    logit_scale[1, 2], logit_scale[2, 3], output_scale[2, 0], output_scale[1, 1] = 1e-5, 0, 0, 0.5
    how = dict(scaling=0.3, softcap=softcap)
    expected = reference.tree_attention(
        q, k, v, logit_scale, output_scale, torch.tensor(packed.position), torch.tensor(packed.subtree_end),
        window=window, query_index=None if query_index is None else torch.tensor(query_index), **how,
    )  # fmt: skip
    plan = plan_segments(packed, window=window, query_index=query_index, device=torch.device("cpu"))
    got = segment_attention(q, k, v, logit_scale, output_scale, plan, **how)
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() < 1e-14
    assert (got[2, :, 0] == 0).all()


def test_a_long_pack_needs_no_quadratic_mask():
    packed = pack([list(range(2000)), list(range(1000)) + [0] * 1000])
    plan = plan_segments(packed, window=None, query_index=None, device=torch.device("cpu"))
    kept = sum(x.numel() for g in plan for x in (g.query_index, g.key_index, g.depth_q, g.depth_k))
    assert kept < packed.num_tokens**2 / 20
    for group in plan:
        mask = group.mask(slice(0, 1))
        assert mask is None or mask.numel() <= 256 * 2000
