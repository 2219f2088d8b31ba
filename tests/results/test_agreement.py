"""Agreement of rankings: Spearman's correlation and what tops share, against scipy and against counting."""

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom, spearmanr

from shipsfast.errors import InputError
from shipsfast.results.agreement import rank_agreement


def maps(seed, *shape, levels=None):
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, shape).astype(float) if levels else rng.normal(size=shape)


@pytest.mark.parametrize(("levels", "signed"), [(None, False), (None, True), (3, False)])
def test_spearman_is_that_of_scipy(levels, signed):
    found = maps(0, 4, 3, 5, levels=levels)
    agreement = rank_agreement(found, 4, signed=signed)
    for i, j in itertools.combinations(range(4), 2):
        expected = spearmanr(found[i].ravel(), found[j].ravel()).statistic
        assert agreement.spearman[i, j] == pytest.approx(expected, abs=1e-14)
        assert agreement.spearman[j, i] == agreement.spearman[i, j]
    assert np.isnan(np.diag(agreement.spearman)).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k", [1, 4, 15, 40])
def test_overlap_is_counted(k, signed):
    found = maps(1, 3, 3, 5)
    agreement = rank_agreement(found, k, signed=signed)
    sizes = np.abs(found) if signed else found
    tops = [set(np.argsort(-each.ravel())[:k].tolist()) for each in sizes]
    for i, j in itertools.combinations(range(3), 2):
        assert agreement.overlap[i, j] == pytest.approx(len(tops[i] & tops[j]) / min(k, 15))
    assert agreement.k == min(k, 15)
    drawn = np.arange(16)
    shared = (drawn * hypergeom(15, agreement.k, agreement.k).pmf(drawn)).sum()
    assert agreement.chance == pytest.approx(shared / agreement.k)


def test_ties_for_the_last_places_are_shared_out():
    first, second = [5, 3, 3, 3, 1], [5, 3, 3, 0, 3]
    k, places = 2, range(5)

    def tops(scores):  # all that could be chosen
        best = sorted(scores, reverse=True)[:k]
        return [
            set(c)
            for c in itertools.combinations(places, k)
            if sorted((scores[i] for i in c), reverse=True) == best
        ]

    expected = np.mean([len(a & b) / k for a in tops(first) for b in tops(second)])
    assert rank_agreement(np.array([first, second]), k).overlap[0, 1] == pytest.approx(expected)
    flat = rank_agreement(np.ones((2, 3, 4)), 5)  # nothing but ties
    assert flat.overlap[0, 1] == pytest.approx(flat.chance) == pytest.approx(5 / 12)
    assert np.isnan(flat.spearman[0, 1])


def test_heads_without_a_score_somewhere_are_left_out():
    found = maps(2, 2, 3, 4)
    whole = rank_agreement(found[:, :, :3], 3)
    found[0, 1, 3] = found[1, :, 3] = np.nan
    agreement = rank_agreement(found, 3)
    assert agreement.heads == 9
    assert agreement.spearman[0, 1] == whole.spearman[0, 1] and agreement.overlap[0, 1] == whole.overlap[0, 1]


def test_beside_it_what_shuffles_give():
    found, others = maps(3, 3, 20), maps(4, 50, 3, 20)
    agreement = rank_agreement(found, 5, shuffles=iter(others))
    each = [rank_agreement(other, 5) for other in others]
    for name in ("spearman", "overlap"):
        values = [getattr(x, name)[0, 2] for x in each]
        shuffled = getattr(agreement, f"{name}_shuffled")[0, 2]
        assert shuffled == pytest.approx(np.quantile(values, [0.05, 0.95]))
    assert rank_agreement(found, 5).spearman_shuffled is None


def test_the_least_alike_first():
    found = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [4, 3, 2, 1]], dtype=float)
    agreement = rank_agreement(found, 2)
    assert agreement.pairs() == [(0, 2), (1, 2), (0, 1)]
    body = agreement.to_json(["a", "b", "c"])
    assert body["pairs"][0] == {"between": ["a", "c"], "spearman": pytest.approx(-1), "overlap": 0.0}
    assert body["chance"] == 0.5 and body["heads"] == 4


def test_one_map_agrees_with_nothing():
    with pytest.raises(InputError, match="two maps or more, got 1"):
        rank_agreement(np.ones((1, 2, 2)))
