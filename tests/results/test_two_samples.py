"""Two samples held against each other: the numbers of scipy, and of counting pairs and relabellings one by one."""

import math

import numpy as np
import pytest
from scipy import stats

from shipsfast import InputError
from shipsfast.results.two_samples import auroc, hedges_g, permutation_test

STATISTICS = {
    "difference": lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
    "auroc": lambda x, y, axis: stats.mannwhitneyu(x, y, axis=axis).statistic,
}


def samples(first, second, columns=7, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.lognormal(0.3, 1, (first, columns)), rng.lognormal(0, 1, (second, columns))
    return (a.round(), b.round()) if ties else (a, b)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("first", "second"), [(5, 3), (20, 31)])
def test_auroc_is_the_u_of_mann_and_whitney_and_counts_pairs(first, second, ties):
    a, b = samples(first, second, ties=ties)
    pairs = (a[:, None] > b).mean(axis=(0, 1)) + (a[:, None] == b).mean(axis=(0, 1)) / 2
    np.testing.assert_allclose(auroc(a, b), pairs, rtol=1e-14)
    np.testing.assert_allclose(auroc(a, b), stats.mannwhitneyu(a, b).statistic / (first * second), rtol=1e-14)
    assert ties == (a[:, None] == b).any()


@pytest.mark.parametrize(
    ("a", "b", "area"),
    [
        ([2, 3, 0, 5, 1, 2, 5, 5, 2, 1, 1, 3], [0, 5, 0, 0, 1, 3, 0, 4, 1], 0.6805555555555556),
        ([3, 0, 1, 2, 0, 1, 2, 0, 0, 1, 4, 10], [2, 0, 2, 2, 2, 2, 1, 3, 1], 0.42129629629629634),
        ([5, 1, 1, 1, 2, 6, 8, 2, 8, 0, 1, 0], [1, 1, 2, 1, 2, 0, 1, 3, 0], 0.6296296296296297),
    ],
)
def test_auroc_is_that_of_scikit_learn(a, b, area):
    """What roc_auc_score of scikit-learn 1.9.1 gives."""
    found = auroc(np.array(a, float)[:, None], np.array(b, float)[:, None])
    np.testing.assert_allclose(found, [area], rtol=1e-14)


@pytest.mark.parametrize(("first", "second"), [(2, 2), (5, 3), (20, 31)])
def test_hedges_g_is_student_s_t_made_a_size(first, second):
    a, b = samples(first, second)
    m = first + second - 2
    unbiased = math.gamma(m / 2) / (math.sqrt(m / 2) * math.gamma((m - 1) / 2))
    want = unbiased * stats.ttest_ind(a, b).statistic * math.sqrt(1 / first + 1 / second)
    np.testing.assert_allclose(hedges_g(a, b), want, rtol=1e-12)


def test_hedges_g_without_spread_is_nothing():
    """0.1 added up many times over is not many times 0.1."""
    a, b = np.full((10, 2), 0.1), np.full((10, 2), 0.7)
    b[0, 1] = 0.6
    found = hedges_g(a, b)
    assert np.isnan(found[0]) and np.isfinite(found[1])
    assert np.isnan(hedges_g(a[:1], b[:1])).all()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_all_relabellings_give_scipy_s_exact_p(statistic, alternative, ties):
    a, b = samples(5, 4, columns=6, ties=ties)
    found = permutation_test(a, b, statistic, alternative)
    want = stats.permutation_test(
        (a, b), STATISTICS[statistic], permutation_type="independent", vectorized=True, alternative=alternative, n_resamples=np.inf,
    )  # fmt: skip
    np.testing.assert_allclose(found.p, want.pvalue, rtol=1e-12)
    assert found.exact and found.relabellings == math.comb(9, 5)
    assert found.least == (2 if alternative == "two-sided" else 1) / 126
    assert (found.p >= found.least).all()


def test_the_smallest_p_is_reached():
    a, b = np.arange(10.0, 15)[:, None], np.arange(4.0)[:, None]
    for alternative in ("greater", "two-sided"):
        for permutations in (99_999, 100):
            found = permutation_test(a, b, "auroc", alternative, permutations, seed=3)
            assert found.exact == (permutations > 126)
            assert found.p[0] == found.least or not found.exact
    assert permutation_test(b, a, "auroc", "less").p[0] == 1 / 126
    assert permutation_test(b, a, "auroc", "greater").p[0] == 1


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_drawn_relabellings_come_near_the_exact_p(alternative):
    a, b = samples(18, 15, columns=200, seed=2)
    exact = stats.mannwhitneyu(a, b, alternative=alternative, method="exact").pvalue
    found = permutation_test(a, b, "auroc", alternative, 40_000, seed=1)
    assert not found.exact and found.relabellings == 40_000
    error = np.sqrt(exact * (2 - exact) / 40_000) + 2 / 40_000  # of twice a tail, at most
    assert (np.abs(found.p - exact) < 5 * error).all()
    again = permutation_test(a, b, "auroc", alternative, 40_000, seed=1).p
    other = permutation_test(a, b, "auroc", alternative, 40_000, seed=2).p
    assert np.array_equal(found.p, again) and not np.array_equal(found.p, other)
    # A column is compared by itself, whatever stands beside it.
    assert np.array_equal(
        permutation_test(a[:, 3:5], b[:, 3:5], "auroc", alternative, 40_000, seed=1).p, found.p[3:5]
    )


def test_what_rounding_tells_apart_is_equal():
    """Every relabelling has one and the same sum, in one order or another."""
    x = np.array([0.1, 0.2, 0.3, 0.4] * 3)[:, None]
    a, b = x[:6], x[6:]
    want = stats.permutation_test(
        (a * 10, b * 10), STATISTICS["difference"], permutation_type="independent", vectorized=True, alternative="greater",
        n_resamples=np.inf,
    ).pvalue  # fmt: skip
    np.testing.assert_allclose(permutation_test(a, b, "difference").p, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alternative": "more"}, "alternative must be one of greater, less, two-sided"),
        ({"statistic": "t"}, "statistic must be one of auroc, difference"),
        ({"permutations": 0}, "permutations must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        permutation_test(*samples(3, 3), **settings)


@pytest.mark.parametrize("statistic", ["auroc", "difference"])
def test_no_p_value_of_drawn_relabellings_is_0(statistic):
    """(1 + those as far apart) / (1 + drawn)."""
    a, b = np.arange(20.0, 40.0)[:, None], np.arange(20.0)[:, None]
    found = permutation_test(a, b, statistic, permutations=999)
    assert not found.exact and found.p == found.least == 1 / 1000
    assert permutation_test(a, b, statistic, "two-sided", permutations=999).p == 2 / 1000
    assert permutation_test(a, b, statistic, "less", permutations=999).p == 1
