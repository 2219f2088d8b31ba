"""Heads dropped while prompts come in: exact at the end, and the stated error on populations that are hard for it."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from shipsfast import InputError
from shipsfast.results.race import Race, _Spread, rehearse, round_ends

P, N, K = 64, 40, 5
COST = np.repeat(np.arange(10, 0, -1.0), 4)


def population(kind: str, prompts=P, heads=N, seed=0) -> np.ndarray:
    """float64 [P, N] whose means are far apart, or near ties at the fifth place."""
    rng = np.random.default_rng(seed)
    means = np.exp(rng.normal(-3, 1.3, heads))
    if "near ties" in kind:
        means = np.full(heads, 0.05)
        means[: 1 if "all" in kind else K - 1], means[K - 1 : 3 * K] = 5, 1
        if "all" in kind:
            means[1:] = 1
        means = means * (1 + 1e-6 * rng.normal(size=heads))
    x = {
        "normal": lambda: np.abs(1 + 0.3 * rng.normal(size=(prompts, heads))),
        "lognormal": lambda: np.exp(rng.normal(0, 1, (prompts, heads)) + rng.normal(0, 0.4, (prompts, 1))),
        "heavy": lambda: rng.pareto(1.5, (prompts, heads)) + 0.1,
        "gamma": lambda: rng.gamma(2, 1, (prompts, heads)),
    }[kind.split()[0]]()
    return x / x.mean(axis=0) * means


def run(race: Race, scores: np.ndarray) -> np.ndarray:
    """What was seen of scores when the race is over."""
    seen, alive = scores.copy(), np.ones(scores.shape[1], bool)
    for end in race.ends:
        alive &= race.alive(seen[:end])
        seen[end:, ~alive] = np.nan
    return seen


KINDS = ["normal", "gamma", "lognormal", "normal near ties", "lognormal near ties", "gamma near ties all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [0.2, 0.02])
def test_the_top_k_survives_whole_as_often_as_was_said(kind, error):
    found = rehearse(population(kind), K, error, COST, orders=60)
    lost = round(60 * (1 - found.whole))
    assert stats.binom.sf(lost - 1, 60, error) > 0.01  # so many would be lost by chance
    if "ties" not in kind:
        assert found.share.mean() < 0.8


@pytest.mark.parametrize("kind", ["gamma", "lognormal"])
def test_most_of_the_work_is_saved_where_the_top_is_firm(kind):
    found = rehearse(population(kind), K, 0.01, COST, orders=20)
    assert found.whole == 1 and found.share.max() < 0.6


def test_with_all_prompts_seen_the_top_k_are_left():
    scores = population("heavy")
    race = Race(P, K, 0.01, COST)
    top = np.argsort(-scores.mean(axis=0))[:K]
    assert set(np.flatnonzero(race.alive(scores))) == set(top)
    np.testing.assert_allclose(race.upper(scores), scores.mean(axis=0), rtol=1e-14)
    seen = run(race, scores)
    assert set(np.flatnonzero(race.alive(seen))) == set(top)


def test_heads_that_tie_with_the_kth_are_left_too():
    scores = np.tile(np.array([3.0, 1, 2, 2, 2]), (20, 1))
    assert Race(20, 2, 0.01, np.ones(5)).alive(scores).tolist() == [True, False, True, True, True]
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0, 3, 999)  # the same scores in another order: sums differ by rounding alone
    ties = np.stack([rng.permutation(shared) for _ in range(6)], axis=1)
    assert Race(999, 2, 0.01, np.ones(6)).alive(ties).all()


@pytest.mark.parametrize("n", [16, 24, 48, 64])
@pytest.mark.parametrize("cap", [None, 60.0], ids=["spread", "cap"])
def test_the_order_of_what_was_seen_does_not_matter(n, cap):
    scores = population("lognormal")[:n]
    race = Race(P, K, 0.05, COST, cap=cap)
    again = np.random.default_rng(1).permutation(n)
    assert np.array_equal(race.alive(scores), race.alive(scores[again]))
    np.testing.assert_allclose(race.upper(scores), race.upper(scores[again]), rtol=1e-12)


def test_heads_that_were_dropped_stay_out_and_are_below_the_kth():
    scores = population("gamma")
    race = Race(P, K, 0.05, COST)
    seen = run(race, scores)
    counts = (~np.isnan(seen)).sum(axis=0)
    assert set(counts) <= set(race.ends) and (counts < P).sum() > N / 2
    alive, upper, mean = race.alive(seen), race.upper(seen), scores.mean(axis=0)
    assert not alive[counts < P].any() and alive.sum() == K
    assert (upper >= mean - 1e-12).all() and upper[counts < P].max() <= np.sort(mean)[-K]
    early = race.upper(np.where(np.arange(N) < 3, np.nan, scores[:24]))
    assert np.isinf(early[:3]).all() and (early[3:] > mean[3:]).all()
    assert race.share(seen) == (counts * COST).sum() / (COST.sum() * P) and race.share(scores) == 1


@pytest.mark.parametrize("signed", [False, True])
def test_upper_bounds_hold_together(signed):
    scores, wrong = population("lognormal"), 0
    if signed:
        scores = scores * np.where(np.arange(N) % 2, 1, -1) + np.random.default_rng(0).normal(
            0, 0.1, scores.shape
        )
    rng, race = np.random.default_rng(2), Race(P, K, 0.05, COST, signed=signed)
    size = np.abs(scores.mean(axis=0))
    for _ in range(50):
        order = rng.permutation(P)
        wrong += any((race.upper(scores[order[:n]]) < size * (1 - 1e-12)).any() for n in race.ends)
    assert stats.binom.sf(wrong - 1, 50, 0.05) > 0.01


def test_signed_heads_are_ranked_by_size():
    rng = np.random.default_rng(3)
    scores = population("gamma") * np.where(rng.random(N) < 0.5, -1, 1)
    top = set(np.argsort(-np.abs(scores.mean(axis=0)))[:K])
    race = Race(P, K, 0.05, COST, signed=True)
    assert set(np.flatnonzero(race.alive(scores))) == top
    found = rehearse(scores, K, 0.05, COST, signed=True, orders=60)
    assert found.whole == 1 and found.share.mean() < 0.7
    flipped = race.alive(scores[:32] * np.where(rng.random(N) < 0.5, -1, 1))
    assert np.array_equal(flipped, race.alive(scores[:32]))
    # Without the sign a large negative head is at the bottom.
    plain = Race(P, K, 0.05, COST).alive(scores)
    assert not plain[scores.mean(axis=0) < 0].any()


def test_equal_scores_on_a_few_prompts_prove_nothing():
    """Nothing varies on what was seen, and the other prompts might still be anything."""
    for n in (2, 4, 8):
        scores = np.zeros((n, N))
        scores[:, :K] = 1.0
        race = Race(P, K, 0.05, COST, ends=[n, P])
        assert race.alive(scores).all() and (race.upper(scores) >= scores[0]).all()
    assert Race(P, K, 0.01, COST).alive(np.ones((48, N))).all()


def test_prompts_that_make_other_heads_may_make_this_one_too():
    rng = np.random.default_rng(6)
    scores = np.where(np.arange(N) < K, 1, 0.4) * rng.uniform(0.9, 1.1, (24, N))
    race = Race(P, K, 0.01, COST)
    assert race.alive(scores).sum() == K
    scores[np.arange(10), N - 10 + np.arange(10)] *= 20  # a quarter of the heads, each on a prompt of its own
    assert race.alive(scores)[: N - 10].all()


def test_one_prompt_that_makes_a_head_is_seen_only_with_a_cap():
    """What no bound by spread can know: a head that is 0 but for one prompt. The cap knows that it might be."""
    scores = np.full((P, N), 0.001)
    scores *= np.random.default_rng(4).uniform(0.5, 1.5, scores.shape)
    scores[:, :K] += 0.01
    scores[-1, -1] = 1.0  # its mean is the largest
    assert not Race(P, K, 0.01, COST).alive(scores[:48])[-1]
    assert Race(P, K, 0.01, COST, cap=1.0).alive(scores[:48])[-1]
    assert Race(P, K, 0.01, COST).alive(scores)[-1]


def test_a_cap_drops_heads_once_there_are_thousands_of_prompts():
    scores = np.clip(population("gamma", prompts=4000) * 2, 0, 1)
    found = rehearse(scores, K, 0.01, COST, cap=1.0, orders=3)
    assert found.whole == 1 and found.share.max() < 0.9
    assert rehearse(np.clip(population("gamma"), 0, 1), K, 0.01, COST, cap=1.0, orders=3).share.min() == 1


@pytest.mark.parametrize("signed", [False, True])
def test_bounds_of_a_cap_always_hold(signed):
    """Every sample of a small population of values at both ends, counted out."""
    values = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1.0])
    values = 2 * values - 1 if signed else values
    race = Race(10, 1, 0.3, np.ones(2), cap=1.0, signed=signed, ends=[5, 10])
    wrong = total = 0
    for chosen in combinations(range(10), 5):
        x = np.stack([values[list(chosen)], np.zeros(5)], axis=1)
        wrong += race.upper(x)[0] < abs(values.mean())
        total += 1
    assert total == 252 and wrong / total <= 0.3


def test_the_error_is_shared_out_among_heads_and_rounds():
    race = Race(P, K, 0.02, COST)
    lost = [(N - K) * race.alpha / (K - j + 1) for j in range(1, K + 1)]  # a head of rank j, in one round
    assert math.isclose(sum(lost) * (len(race.ends) - 1), 0.02)
    assert Race(10, K, 0.02, COST).ends == [10]


def test_student_s_bound_is_that_of_the_differences():
    """Symmetric differences, which nothing corrects: the bound is Student's, of the prompts seen and one more."""
    half = np.random.default_rng(5).normal(size=16)
    half[0] = half[1] = np.abs(half).max()  # the least is there twice, and one of them is what is added
    full = 1 + np.append(np.concatenate([half, -half]), 0)
    seen = np.delete(full, full.argmin())
    error = full.std(ddof=1) * math.sqrt((1 - 0.5) / 33)
    got = _Spread().lower(seen[:, None], np.zeros(1), 0.001, P)
    np.testing.assert_allclose(got, full.mean() - stats.t.isf(0.001, 31) * error, rtol=1e-9)
    # Of differences that lean to the right less is needed, and more of those that lean to the left.
    right = np.exp(half)[:, None]
    alike = (right.mean() + right.std() * np.where(np.arange(16) % 2, 1, -1))[:, None]
    lows = [_Spread().lower(d, np.zeros(1), 0.001, P)[0] for d in (right, alike, 2 * right.mean() - right)]
    assert lows[0] > lows[1] > lows[2]


def test_few_heads_or_few_prompts_drop_nothing():
    scores = population("gamma")
    for k in (N, N + 3):
        race = Race(P, k, 0.01, COST)
        assert all(race.alive(scores[:n]).all() for n in race.ends)
    race = Race(12, K, 0.01, COST)
    assert race.ends == [12] and race.alive(scores[:12]).sum() == K
    assert Race(1, 2, 0.01, np.ones(3)).alive(np.array([[1.0, 3, 2]])).tolist() == [False, True, True]


def test_rounds_rise_to_the_number_of_prompts():
    assert round_ends(64) == [16, 24, 32, 48, 64] and round_ends(16) == [16] and round_ends(20) == [16, 20]
    assert round_ends(1000) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    for prompts in range(1, 300):
        ends = round_ends(prompts)
        assert ends[-1] == prompts and ends == sorted(set(ends))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(error=0), "error must be"),
        (dict(error=1.0), "error must be"),
        (dict(k=0), "k must be"),
        (dict(prompts=0), "prompts must be"),
        (dict(cap=-1.0), "cap must be"),
        (dict(cost=np.array([1, np.nan])), "cost must be"),
        (dict(ends=[16, 32]), "ends must rise"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    given = dict(prompts=P, k=K, error=0.01, cost=COST) | change
    with pytest.raises(InputError, match=message):
        Race(**given)


def test_scores_that_do_not_fit_are_refused():
    race, capped = Race(P, K, 0.01, COST), Race(P, K, 0.01, COST, cap=1.0)
    scores = population("gamma")
    for bad in (scores[:17], scores[:, 1:], scores[0]):
        with pytest.raises(InputError, match="scores must be"):
            race.alive(bad)
    scores[3, 3] = np.inf
    with pytest.raises(InputError, match="finite"):
        race.upper(scores)
    scores[3, 3] = 1.5
    with pytest.raises(InputError, match="beyond the cap"):
        capped.alive(scores)


def test_bounds_say_what_they_assume():
    spread, capped = Race(P, K, 0.01, COST), Race(P, K, 0.01, COST, cap=math.log(2))
    assert "no guarantee" in spread.about and "always" in capped.about and spread.bound != capped.bound
