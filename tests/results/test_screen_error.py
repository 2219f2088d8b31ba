"""What the errors of a screen say of heads that only it has scored."""

import numpy as np
import pytest
from scipy import stats

from shipsfast.results.screen_error import ScreenError, by_root, scaled, unscaled


def test_the_scale_of_errors():
    assert by_root("kl") and by_root("reverse_kl") and by_root("js") and not by_root("total_variation")
    assert scaled(np.array([4.0, -1e-9]), True).tolist() == [2.0, 0.0] and unscaled(
        np.array([2.0, -1.0]), True
    ).tolist() == [4.0, 0.0]
    assert scaled(np.array([4.0, -3.0]), False).tolist() == [4.0, -3.0]


def test_a_chance_by_hand():
    """Of the prediction interval of a normal sample: t with n - 1 degrees of freedom."""
    errors = np.array([0.01, -0.02, 0.03, 0.0])
    known = ScreenError(errors, errors, root=True)
    spread = errors.std(ddof=1) * np.sqrt(1.25)
    expected = stats.t.sf((0.5 - 0.3 - errors.mean()) / spread, 3)
    assert known.chances(0.25, np.array([0.09])) == pytest.approx([expected])
    plain = ScreenError(errors, errors, root=False)
    assert plain.chances(0.5, np.array([0.3])) == pytest.approx([expected])
    either = ScreenError(errors, errors, root=False, signed=True)
    other = stats.t.sf((0.5 - 0.3 + errors.mean()) / spread, 3)
    assert either.chances(0.5, np.array([0.3])) == pytest.approx([expected + other])


def test_the_larger_of_two_samples_counts():
    small, large = np.array([0.0, 1e-6, -1e-6]), np.array([0.1, -0.1, 0.0])
    upper = np.array([0.04])
    assert ScreenError(small, large, True).chances(0.25, upper) == ScreenError(large, large, True).chances(
        0.25, upper
    )
    assert ScreenError(large, small, True).chances(0.25, upper) == ScreenError(large, large, True).chances(
        0.25, upper
    )


@pytest.mark.parametrize("errors", [[], [0.1], [0.1, np.nan], [0.1, np.inf]])
def test_where_nothing_is_known_nothing_is_ruled_out(errors):
    known = ScreenError(np.array(errors), np.array(errors), True)
    assert known.chances(1.0, np.array([0.0, np.nan])).tolist() == [1.0, 1.0]
    assert np.isinf(known.bounds(np.array([0.5]), 0.01)).all()


def test_edges():
    known = ScreenError(np.array([0.01, -0.01, 0.0]), np.array([0.01, -0.01, 0.0]), True)
    assert known.chances(np.nan, np.array([0.1])) == [1.0]  # fewer than k heads have a score
    assert known.chances(0.25, np.array([np.nan, np.inf])).tolist() == [1.0, 1.0]
    assert known.chances(0.25, np.array([])).shape == (0,)
    none = ScreenError(np.zeros(4), np.zeros(4), True)  # the screen is exact
    assert none.chances(0.25, np.array([0.25, 0.2])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("signed", [False, True])
def test_bounds_hold_as_often_as_they_say(signed):
    rng, rate, tries = np.random.default_rng(0), 0.05, 2_000
    errors = rng.normal(0.02, 0.1, (tries, 9))
    screened = np.full(tries, 2.0)
    bounds = np.array(
        [ScreenError(e[:8], e[:8], False, signed).bounds(np.array([2.0]), rate)[0] for e in errors]
    )
    over = np.abs(screened + errors[:, 8]) > bounds
    assert rate / 8 < over.mean() < rate + 4 * np.sqrt(rate / tries)
