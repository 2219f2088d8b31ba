"""Statistics of a scan, against their definitions in plain loops and against scipy's bootstrap.

Whole-number scores make every mean exact, so that ties are ties and results can be compared with ==.
"""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from shipsfast import InputError, ShipsResult
from shipsfast.results import bootstrap
from shipsfast.results.bootstrap import rank_stability
from shipsfast.results.statistics import above_noise, concentration
from tests.support.numerics import assert_close_abs

ARRAYS = ("mean", "rank", "top_k_frequency", "low", "high", "rank_low", "rank_high")
INTERVALS = ("top_k_frequency", "low", "high", "rank_low", "rank_high")


def whole_scores(prompts, layers, heads, seed=0, low=0, high=6):
    return np.random.default_rng(seed).integers(low, high, (prompts, layers, heads)).astype(np.float64)


def skewed_scores(prompts, layers, heads, seed=0):
    rng = np.random.default_rng(seed)
    return rng.lognormal(-4, 1, (prompts, layers, heads)) * rng.lognormal(0, 1, (layers, heads))


def naive_ranks(scores, resamples, seed, signed):
    """Ranks [R, L, H]: every resample drawn, averaged and sorted by itself; NaN for heads not scanned."""
    drawn = np.random.default_rng(seed).integers(0, len(scores), (resamples, len(scores)))
    ranks = np.full((resamples, *scores.shape[1:]), np.nan)
    heads = [tuple(at) for at in np.argwhere(~np.isnan(scores[0]))]
    for r, prompts in enumerate(drawn):
        size = {at: math.fsum(scores[p][at] for p in prompts) for at in heads}
        if signed:
            size = {at: abs(value) for at, value in size.items()}
        for rank, at in enumerate(sorted(heads, key=lambda at: (-size[at], at)), 1):
            ranks[r][at] = rank
    return ranks


def naive_quantile(values, level):
    """The smallest value that at least this share of the values do not exceed."""
    return min(v for v in values if sum(w <= v for w in values) >= level * len(values))


def assert_same(a, b, names=ARRAYS):
    for name in names:
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True), name


@pytest.mark.parametrize("signed", [False, True], ids=["by-value", "by-magnitude"])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_ranks_and_frequencies_as_defined(k, signed):
    scores = whole_scores(7, 3, 4, low=-3 if signed else 0, high=4)
    scores[:, 1, 2] = np.nan
    scores[:, 2, 3] = scores[:, 0, 1]  # tied in every resample
    found = rank_stability(scores, k, resamples=101, confidence=0.9, seed=5, signed=signed)
    ranks = naive_ranks(scores, 101, 5, signed)
    for layer, head in np.ndindex(3, 4):
        if (layer, head) == (1, 2):
            assert all(np.isnan(getattr(found, name)[layer, head]) for name in ARRAYS)
            continue
        of_head = ranks[:, layer, head]
        assert found.top_k_frequency[layer, head] == np.mean([rank <= k for rank in of_head])
        assert found.rank_low[layer, head] == naive_quantile(of_head, 0.05)
        assert found.rank_high[layer, head] == naive_quantile(of_head, 0.95)
    assert np.array_equal(found.mean, scores.mean(axis=0), equal_nan=True)


def test_rank_interval_at_a_level_that_binary_cannot_hold():
    """(1 - 0.95) / 2 rounds to above 0.025: of 200 ranks that would be the 6th, not the 5th."""
    scores = whole_scores(9, 3, 5)
    found = rank_stability(scores, 3, resamples=200, seed=1)
    ranks = np.sort(naive_ranks(scores, 200, 1, False), axis=0)
    assert np.array_equal(found.rank_low, ranks[4]) and np.array_equal(found.rank_high, ranks[194])
    assert not np.array_equal(ranks[4], ranks[5])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("prompts", [12, 60])
def test_interval_is_scipys_bca_of_the_same_resamples(prompts, confidence):
    scores = skewed_scores(prompts, 2, 5, seed=prompts)
    found = rank_stability(scores, 3, resamples=999, confidence=confidence, seed=7)
    peer = stats.bootstrap(
        (scores,), np.mean, axis=0, n_resamples=999, confidence_level=confidence, method="BCa",
        rng=np.random.default_rng(7),
    )  # fmt: skip
    assert_close_abs(found.low, peer.confidence_interval.low, 1e-12, "low")
    assert_close_abs(found.high, peer.confidence_interval.high, 1e-12, "high")


def test_interval_covers_skewed_scores_better_than_the_percentile_interval():
    """A thousand heads are a thousand experiments whose mean is known. The percentile interval sits too low."""
    scores = np.random.default_rng(11).lognormal(0, 1, (40, 20, 50))
    truth = math.exp(0.5)
    found = rank_stability(scores, seed=3)
    percentile = stats.bootstrap(
        (scores.reshape(40, -1),), np.mean, axis=0, n_resamples=2000, batch=50, method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    missed = np.mean((found.low > truth) | (found.high < truth))
    assert missed < np.mean((percentile.low > truth) | (percentile.high < truth)) - 0.01
    assert 0.05 < missed < 0.13, "40 prompts of so heavy a tail: near 5 %, not there"


@pytest.mark.parametrize("layers, heads", [(1, 257), (13, 11)])
@pytest.mark.parametrize("prompts", [33, 64, 100])
def test_ties_go_to_the_lower_head_as_in_top(prompts, layers, heads):
    """Scores that do not add up exactly: at some of these shapes OpenBLAS sums equal columns differently."""
    scores = np.tile(skewed_scores(prompts, 1, 1), (1, layers, heads))
    found = rank_stability(scores, 5, resamples=50)
    in_order = np.arange(1, layers * heads + 1).reshape(layers, heads)
    assert np.array_equal(found.top_k_frequency, in_order <= 5)
    for ranks in (found.rank, found.rank_low, found.rank_high):
        assert np.array_equal(ranks, in_order)
    top = ShipsResult(scores).top(5)
    assert [(row["layer"], row["head"]) for row in found.to_json()["top"]] == [(s.layer, s.head) for s in top]


def test_constant_scores_have_intervals_of_width_zero():
    scores = np.broadcast_to(np.random.default_rng(0).random((20, 50)) / 3, (17, 20, 50))
    with warnings.catch_warnings(action="error"):
        found = rank_stability(scores, 5)
    assert np.array_equal(found.low, scores[0]) and np.array_equal(found.high, scores[0])
    assert np.array_equal(found.rank_low, found.rank) and np.array_equal(found.rank_high, found.rank)
    assert np.array_equal(found.top_k_frequency, found.rank <= 5)
    assert found.top_k_overlap == 1


def test_scores_that_differ_in_the_last_bit():
    """No division by a variance that rounds to 0, and no endless z0 where all resamples lie on one side."""
    scores = np.full((9, 1, 2), 0.1)
    scores[4, 0, 1] = np.nextafter(0.1, 1)
    with np.errstate(all="raise"), warnings.catch_warnings(action="error"):
        found = rank_stability(scores, 1, resamples=50)
    assert np.isfinite(found.low).all() and (found.low <= found.high).all()


def test_an_extreme_confidence_stays_within_the_resamples():
    """Beyond the pole of the acceleration the plain formula would put the upper end below the lower."""
    scores = np.zeros((50, 1, 2))
    scores[3, 0, 0] = 1.0
    scores[3, 0, 1] = -1.0
    found = rank_stability(scores, 1, confidence=1 - 1e-12, signed=True)
    assert found.low[0, 0] == 0 and found.high[0, 0] >= 3 / 50
    assert found.high[0, 1] == 0 and found.low[0, 1] <= -3 / 50


def test_signed_ranks_by_magnitude_and_keeps_the_sign():
    scores = np.stack([np.full(6, v) for v in (-3.0, 2.0, 1.0, -4.0)], axis=1)[:, None]
    assert rank_stability(scores, 2).rank.tolist() == [[3, 1, 2, 4]]
    found = rank_stability(scores, 2, signed=True)
    assert found.rank.tolist() == [[2, 3, 4, 1]]
    assert found.top_k_frequency.tolist() == [[1, 0, 0, 1]]
    assert found.low.tolist() == [[-3, 2, 1, -4]]


def test_one_prompt_has_ranks_and_no_intervals():
    scores = whole_scores(1, 2, 3)
    scores[:, 0, 1] = np.nan
    found = rank_stability(scores, 2)
    assert np.array_equal(found.mean, scores[0], equal_nan=True)
    assert sorted(found.rank[~np.isnan(scores[0])]) == [1, 2, 3, 4, 5]
    for name in INTERVALS:
        assert np.isnan(getattr(found, name)).all() and getattr(found, name).shape == (2, 3)
    summary = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert summary["prompts"] == 1 and summary["top_k_overlap"] is None
    assert [row["low"] for row in summary["top"]] == [None, None]


def test_two_prompts_have_an_interval():
    found = rank_stability(whole_scores(2, 2, 3, seed=1), 2)
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()


def test_a_seed_decides_all_of_it():
    scores = skewed_scores(20, 3, 4)
    found = rank_stability(scores, 4, seed=9)
    assert_same(found, rank_stability(scores.copy(), 4, seed=9))
    assert not np.array_equal(found.low, rank_stability(scores, 4, seed=10).low)


def test_blocks_change_nothing(monkeypatch):
    scores = whole_scores(8, 3, 5)
    whole = rank_stability(scores, 4, resamples=100)
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 33)
    assert_same(whole, rank_stability(scores, 4, resamples=100))


def test_memory_is_that_of_the_resampled_means():
    """1,024 heads x 520 prompts x 2,000 resamples: drawn scores would be 8 GiB; means and ranks are 23 MiB."""
    import tracemalloc

    scores = skewed_scores(520, 32, 32)
    tracemalloc.start()
    rank_stability(scores)
    peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak_mib < 60


def test_k_above_the_scanned_heads_means_all_of_them():
    scores = whole_scores(5, 2, 3)
    scores[:, 1, 1:] = np.nan
    found = rank_stability(scores, 10, resamples=50)
    assert found.k == 4 and (found.top_k_frequency[~np.isnan(found.mean)] == 1).all()


def test_summary_holds_the_top_in_order():
    scores = whole_scores(6, 3, 4, seed=2)
    found = rank_stability(scores, 3, resamples=100, confidence=0.9, seed=4)
    summary = found.to_json()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    settings_used = {
        name: summary[name] for name in ("k", "prompts", "resamples", "confidence", "seed", "signed")
    }
    assert settings_used == dict(k=3, prompts=6, resamples=100, confidence=0.9, seed=4, signed=False)
    top = ShipsResult(scores).top(3)
    assert [(r["rank"], r["layer"], r["head"], r["mean"]) for r in summary["top"]] == [
        (rank, *score) for rank, score in enumerate(top, 1)
    ]
    for row in summary["top"]:
        for name in INTERVALS:
            assert row[name] == getattr(found, name)[row["layer"], row["head"]]


def test_overlap_is_the_mean_overlap_of_the_resampled_tops():
    scores = whole_scores(7, 3, 4, seed=3)
    ranks = naive_ranks(scores, 60, 0, False)
    found = rank_stability(scores, 5, resamples=60)
    overlaps = [((found.rank <= 5) & (of_resample <= 5)).sum() / 5 for of_resample in ranks]
    assert found.top_k_overlap == pytest.approx(np.mean(overlaps), abs=1e-12)


@st.composite
def scans(draw):
    """Whole scores [P, L, H] with many ties, and some heads not scanned."""
    shape = (draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    scores = draw(hnp.arrays(np.float64, shape, elements=st.integers(-3, 3).map(float)))
    missing = draw(hnp.arrays(bool, shape[1:]))
    missing.flat[draw(st.integers(0, missing.size - 1))] = False
    scores[:, missing] = np.nan
    return scores


@settings(deadline=None, max_examples=80)
@given(scores=scans(), k=st.integers(1, 8), signed=st.booleans(), exponent=st.integers(-60, 60))
def test_properties_of_any_scan(scores, k, signed, exponent):
    found = rank_stability(scores, k, resamples=40, signed=signed)
    scanned = ~np.isnan(scores[0])
    for name in ARRAYS:
        assert np.array_equal(~np.isnan(getattr(found, name)), scanned), name
    assert found.top_k_frequency[scanned].sum() == pytest.approx(found.k, abs=1e-9)
    assert (found.low[scanned] <= found.high[scanned]).all()
    assert (found.rank_low[scanned] <= found.rank_high[scanned]).all()
    assert (found.low[scanned] >= scores.min(axis=0)[scanned]).all()
    assert (found.high[scanned] <= scores.max(axis=0)[scanned]).all()

    scaled = rank_stability(scores * 2.0**exponent, k, resamples=40, signed=signed)
    assert_same(found, scaled, ("rank", "top_k_frequency", "rank_low", "rank_high"))
    assert np.array_equal(found.low * 2.0**exponent, scaled.low, equal_nan=True)

    # As many heads again, not scanned: nothing moves.
    wider = np.concatenate([scores, np.full_like(scores, np.nan)], axis=2)
    half = rank_stability(wider, k, resamples=40, signed=signed)
    for name in ARRAYS:
        narrow, wide = getattr(found, name), getattr(half, name)[:, : scores.shape[2]]
        assert np.array_equal(narrow, wide, equal_nan=True), name


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_untied_heads_is_no_matter(seed):
    """Heads permuted, results permuted, to the last bit."""
    scores = skewed_scores(9, 3, 4, seed=seed)
    order = np.random.default_rng(seed).permutation(12)
    found = rank_stability(scores, 5, resamples=40)
    permuted = np.ascontiguousarray(scores.reshape(9, 12)[:, order]).reshape(9, 3, 4)
    moved = rank_stability(permuted, 5, resamples=40)
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name).ravel()[order], getattr(moved, name).ravel()), name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=0), "k must be a whole number of at least 1, got 0"),
        (dict(k=2.5), "k must be a whole number of at least 1, got 2.5"),
        (dict(k=True), "k must be a whole number of at least 1, got True"),
        (dict(resamples=0), "resamples must be a whole number of at least 1, got 0"),
        (dict(seed=-1), "seed must be a whole number of at least 0, got -1"),
        (dict(confidence=0), "confidence must lie between 0 and 1, got 0"),
        (dict(confidence=1.0), "confidence must lie between 0 and 1, got 1.0"),
        (dict(confidence=math.nan), "confidence must lie between 0 and 1, got nan"),
        (dict(confidence="95%"), "confidence must lie between 0 and 1, got '95%'"),
        (dict(scores=np.zeros((3, 4))), "got shape [3, 4]"),
        (dict(scores=np.zeros((0, 3, 4))), "got shape [0, 3, 4]"),
        (dict(scores=np.full((2, 3, 4), np.nan)), "no head was scanned"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(change, message):
    arguments = dict(scores=whole_scores(4, 2, 3)) | change
    with pytest.raises(InputError) as refusal:
        rank_stability(**arguments)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_head_scanned_in_part_is_named():
    scores = whole_scores(4, 2, 3)
    scores[1:, 1, 2] = np.nan
    with pytest.raises(InputError, match="head 1-2 has scores for 1 of 4 prompts"):
        rank_stability(scores)


def test_an_infinite_score_is_named():
    scores = whole_scores(4, 2, 3)
    scores[2, 0, 1] = np.inf
    with pytest.raises(InputError, match="head 0-1 for prompt 2 is infinite"):
        rank_stability(scores)


def naive_concentration(values):
    x = sorted(abs(v) for v in values if not math.isnan(v))
    n, total = len(x), math.fsum(x)
    return {
        "gini": math.fsum(abs(a - b) for a in x for b in x) / (2 * n * total),
        "effective_heads": math.exp(-math.fsum(v / total * math.log(v / total) for v in x if v / total > 0)),
        "participation_ratio": total**2 / math.fsum(v * v for v in x),
        **{k: math.fsum(x[::-1][:k]) / total for k in (1, 3, 5, 10)},
    }


magnitudes = st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-9) | st.just(math.nan)


@settings(deadline=None)
@given(values=st.lists(magnitudes, min_size=1, max_size=30), exponent=st.integers(-900, 900))
def test_concentration_as_defined(values, exponent):
    if all(math.isnan(v) or v == 0 for v in values):
        values = [*values, 1.0]
    found, expected = concentration(values), naive_concentration(values)
    n = sum(not math.isnan(v) for v in values)
    assert found.heads == n
    for name in ("gini", "effective_heads", "participation_ratio"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    for k in (1, 3, 5, 10):
        assert found.top_share[k] == pytest.approx(expected[k], rel=1e-12)
    assert 0 <= found.gini <= (n - 1) / n + 1e-15
    assert 1 <= found.participation_ratio <= found.effective_heads * (1 + 1e-9) and found.effective_heads <= n
    assert list(found.top_share.values()) == sorted(found.top_share.values()) and found.top_share[10] <= 1
    assert concentration(np.ldexp(values, exponent)) == found


@pytest.mark.parametrize("n", [1, 2, 7, 1024])
def test_concentration_at_its_limits(n):
    equal, single = concentration(np.full(n, 0.3)), np.zeros(n)
    assert equal.gini == 0
    assert equal.effective_heads == pytest.approx(n, rel=1e-12)
    assert equal.participation_ratio == pytest.approx(n, rel=1e-12)
    assert equal.top_share[1] == pytest.approx(1 / n, rel=1e-12)
    single[n // 2] = -0.3
    alone = concentration(single)
    assert alone.gini == (n - 1) / n
    assert (alone.effective_heads, alone.participation_ratio, alone.top_share[1]) == (1, 1, 1)


def test_concentration_stays_within_its_limits_when_it_rounds():
    rng = np.random.default_rng(0)
    for n in range(2, 60):
        sparse = [np.concatenate([rng.random(few), np.zeros(n - 1)]) for few in range(1, 10)]
        for values in (np.ones(n), 1 - rng.integers(0, 2, n) * 2.0**-53, *sparse):
            found = concentration(values)
            assert 0 <= found.gini <= 1 and max(found.top_share.values()) <= 1
            assert 1 <= found.effective_heads <= found.heads and 1 <= found.participation_ratio <= found.heads


def test_concentration_of_a_map_is_that_of_its_scanned_heads():
    mean = skewed_scores(1, 3, 4)[0]
    mean[1, 2] = np.nan
    assert concentration(mean) == concentration(np.sort(mean[~np.isnan(mean)]))


@pytest.mark.parametrize(
    "values, heads",
    [(np.zeros((2, 3)), 6), ([], 0), ([math.nan], 0), ([1, math.inf, math.nan], 2), ([1, -math.inf], 2)],
    ids=["all-zero", "empty", "not-scanned", "infinite", "minus-infinite"],
)
def test_concentration_that_is_not_defined(values, heads):
    found = concentration(values)
    assert math.isnan(found.gini) and math.isnan(found.top_share[10])
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == {
        "heads": heads, "gini": None, "top_share": {"1": None, "3": None, "5": None, "10": None},
        "effective_heads": None, "participation_ratio": None,
    }  # fmt: skip


def test_concentration_of_subnormal_and_huge_scores():
    assert concentration([5e-324, 5e-324, 0]).gini == pytest.approx(1 / 3)
    assert concentration([1e308] * 4).participation_ratio == 4


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((2, 3, 4)), "got shape [2, 3, 4]"),
        (np.float64(1), "got shape []"),
    ],
    ids=["three-axes", "a-number"],
)
def test_concentration_refuses(values, message):
    with pytest.raises(InputError) as refusal:
        concentration(values)
    assert message in str(refusal.value)


def test_above_noise_is_strict_and_by_magnitude():
    mean = np.array([[0.1, -0.2, 0.2], [np.nan, 0.0, -0.3]])
    found = above_noise(mean, 0.2)
    assert found.dtype == bool
    assert found.tolist() == [[False, False, False], [False, False, True]]
    assert above_noise(mean, 0).tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("floor", [-1e-9, math.nan, math.inf, None, "0"], ids=str)
def test_above_noise_refuses(floor):
    with pytest.raises(InputError, match="noise_floor must be a finite number"):
        above_noise(np.zeros((2, 2)), floor)
