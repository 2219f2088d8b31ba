"""What must hold for any prompts, whatever the scores are."""

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import shipsfast
from tests.support.models import HEADS, LAYERS, build

# A small alphabet makes shared prefixes, duplicates and prompts that are prefixes of others likely.
TOKENS = st.integers(0, 3)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=6)
ROUNDING = 1e-12
several = settings(max_examples=15, deadline=None)


@functools.cache
def model():
    return build("llama-gqa")


def scan(prompts, **options):
    """Through the model's own layers, which every family has; test_fused.py holds the fused way to them."""
    return shipsfast.scan(model(), prompts, progress=False, layers="model", **options).kl


@several
@given(PROMPTS, st.randoms(use_true_random=False))
def test_permuting_prompts_permutes_scores(prompts, random):
    order = list(range(len(prompts)))
    random.shuffle(order)
    shuffled = scan([prompts[i] for i in order])
    np.testing.assert_allclose(shuffled, scan(prompts)[order], rtol=0, atol=ROUNDING)


@several
@given(PROMPTS, st.data())
def test_splitting_prompts_changes_nothing(prompts, data):
    cut = data.draw(st.integers(0, len(prompts)))
    parts = [scan(part) for part in (prompts[:cut], prompts[cut:]) if part]
    np.testing.assert_allclose(np.concatenate(parts), scan(prompts), rtol=0, atol=ROUNDING)


@several
@given(PROMPTS, st.sampled_from(["undifferentiated", "scale"]))
def test_a_scale_of_one_changes_nothing(prompts, ablation):
    assert np.abs(scan(prompts, ablation=ablation, scale=1.0)).max() <= ROUNDING


@several
@given(
    PROMPTS,
    st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1)), min_size=1, unique=True),
)
def test_a_subset_of_heads_gives_the_same_numbers(prompts, heads):
    some, full = scan(prompts, heads=heads), scan(prompts)
    chosen = np.zeros(full.shape[1:], bool)
    chosen[tuple(np.transpose(heads))] = True
    assert np.isnan(some[:, ~chosen]).all()
    np.testing.assert_allclose(some[:, chosen], full[:, chosen], rtol=0, atol=ROUNDING)


@several
@given(PROMPTS, st.integers(1, 60), st.integers(1, 12), st.integers(1, 6))
def test_cuts_change_nothing_beyond_rounding(prompts, chunk_tokens, rows_per_block, prompts_per_group):
    cut = scan(
        prompts, chunk_tokens=chunk_tokens, rows_per_block=rows_per_block, prompts_per_group=prompts_per_group
    )
    np.testing.assert_allclose(cut, scan(prompts), rtol=0, atol=ROUNDING)


@several
@given(PROMPTS)
def test_scores_are_divergences(prompts):
    kl = scan(prompts, ablation="zero")
    assert np.isfinite(kl).all() and (kl >= -ROUNDING).all()
