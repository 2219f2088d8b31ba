"""How often a search misses a head of the true top k, on scores that are made up: as rarely as it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shipsfast.results.race import round_ends
from shipsfast.runs.kinds import SCORES, SCREEN
from shipsfast.scans import top_heads
from shipsfast.scans.screen import Screen

LAYERS, HEADS = 10, 8


class _Fake(Screen):
    def copy(self, prepared):
        return SimpleNamespace(backend="", layers="", products=torch.bfloat16)


def searched(exact, screened, *, k: int, error: float, seed: int, ends: list[int], monkeypatch):
    """A search whose rounds read scores [P, L, H] off instead of running a model."""
    truth, shape = {SCORES: exact, SCREEN: screened}, exact.shape
    units = list(np.ndindex(*shape[1:]))
    record = {"round_ends": ends}
    prepared = SimpleNamespace(
        measurement=SimpleNamespace(k=k, error=error, seed=seed, screen="auto"), units=units, depth=shape[1], grid=shape[1:],
        token_ids=[[0]] * shape[0], unit="head", model=SimpleNamespace(dtype=torch.float32),
    )  # fmt: skip
    store = SimpleNamespace(
        metric=SimpleNamespace(name="kl", signed=False), record=record, flops={SCORES: 0, SCREEN: 0},
        scores={room: np.full(shape, np.nan) for room in truth}, marked={room: np.zeros(shape, bool) for room in truth},
        write=lambda: None,
    )  # fmt: skip

    def run(_whole, room, _number, prompts, some, _name):
        at = np.ix_(list(prompts), range(shape[1]), range(shape[2]))
        wanted = np.zeros(shape[1:], bool)
        wanted[tuple(np.array(some).T)] = True
        store.scores[room][at] = np.where(wanted, truth[room][at], store.scores[room][at])
        store.flops[room] += len(prompts) * len(some)

    store.run = run
    monkeypatch.setattr(top_heads, "flops_of", lambda _: exact.size)
    search = top_heads._Search(prepared, store)
    screen = _Fake(None if screened is None else torch.bfloat16, "")
    search._screen = lambda: (search._chose(screen), screen)[1]
    search.run()
    return search


def made_up(rng, prompts: int, noise: float):
    """Scores as of a scan: few large heads, prompts that differ, and what rounding adds to the root of each."""
    root = np.sqrt(rng.gamma(0.3, 0.05, (1, LAYERS, HEADS))) * rng.lognormal(0, 0.3, (prompts, LAYERS, HEADS))
    return root**2, (root + rng.normal(0, noise, root.shape)) ** 2


@pytest.mark.parametrize("noise", [0.0005, 0.005, 0.03])
@pytest.mark.parametrize("races", [False, True], ids=["all-prompts", "race"])
def test_the_error_is_kept(noise, races, monkeypatch):
    rng, error, missed, work, tries = np.random.default_rng(3), 0.05, 0, [], 150
    for seed in range(tries):
        exact, screened = made_up(rng, 24, noise)
        ends = round_ends(24) if races else [24]
        search = searched(exact, screened, k=5, error=error, seed=seed, ends=ends, monkeypatch=monkeypatch)
        true = set(np.argsort(-exact.mean(0).ravel())[:5].tolist())
        missed += not true <= set(np.flatnonzero(search.scored).tolist())
        bounds, mean = search.upper(), exact.mean(0)
        known = ~np.isnan(bounds)
        missed += bool((bounds[known] < mean[known]).mean() > 0.5)
        work.append(search.store.flops[SCORES] / exact.size)
    assert missed <= error * tries + 2 * np.sqrt(error * tries)
    assert np.mean(work) < 0.75 or noise == 0.03  # a screen that bad rules little out


def test_without_a_screen_the_race_alone_decides(monkeypatch):
    rng, error, missed, tries = np.random.default_rng(5), 0.05, 0, 150
    for seed in range(tries):
        exact, _ = made_up(rng, 40, 0.0)
        search = searched(
            exact, None, k=5, error=error, seed=seed, ends=round_ends(40), monkeypatch=monkeypatch
        )
        missed += not set(np.argsort(-exact.mean(0).ravel())[:5].tolist()) <= set(
            np.flatnonzero(search.scored).tolist()
        )
        assert search.race_allowed in (0.0, error)
    assert missed <= error * tries + 2 * np.sqrt(error * tries)
