"""Results are equal by identity and numbers, and comparing them never fails."""

import copy

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.results.equality import equal
from tests.support.evaluations import CONTROL, evaluate
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
CALLS = {
    "scan": lambda model, **how: shipsfast.scan(model, PROMPTS, heads=[(0, 1), (1, None)], metric=["kl", "js"], **how),
    "scan_dataset": lambda model, **how: shipsfast.scan_dataset(model, PROMPTS, **how),
    "sahara": lambda model, **how: shipsfast.sahara(model, PROMPTS, group_size=2, beam=2, **how),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
def test_scans(kind, tmp_path):
    run, model = CALLS[kind], build()
    one = run(model, progress=False, out=tmp_path / "run")
    other = run(model, progress=False)
    assert one == other and one == shipsfast.load(tmp_path / "run")
    assert one.record["seconds"] != other.record["seconds"]  # when it ran is no part of it
    assert one != run(build(seed=1), progress=False)
    changed = copy.deepcopy(one)
    (changed.scores if kind == "scan" else changed.angle_deg).ravel()[-1] = 7
    assert one != changed and one != None and one != "text" and one != kind
    assert [one] == [other] and other in [one]
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_further_metrics_and_marks_count():
    one = CALLS["scan"](build(), progress=False)
    other = copy.deepcopy(one)
    other.also["js"].scores[0, 0, 1] += 1
    assert one != other
    other = copy.deepcopy(one)
    other.marked = np.ones(one.scores.shape, dtype=bool)
    assert one != other


def test_what_is_alike():
    nan = np.array([1.0, np.nan])
    assert equal(nan, nan.copy()) and not equal(nan, np.array([1.0, 2.0])) and not equal(nan, nan[:1])
    assert equal([(1, 2)], ([1, 2],)) and not equal([1], [1, 2]) and not equal({"a": 1}, {"a": 1, "b": 2})
    assert equal({"a": nan}, {"a": nan.copy()}) and not equal(nan, None) and not equal(None, nan)
    words = np.array(["a", ""], dtype=object)
    assert equal(words, words.copy()) and not equal(words, np.array(["a", "b"], dtype=object))
    assert not equal(torch.tensor(1.0), "x")


def test_evaluations(tmp_path):
    how = dict(control=CONTROL, keep_text=True)
    one, other = evaluate(out=tmp_path / "run", **how), evaluate(**how)
    assert one == other and one.completions == other.completions and one == shipsfast.load(tmp_path / "run")
    changed = copy.deepcopy(one)
    changed.completions.num_tokens[0, 0] += 1
    assert one != changed and one.completions != changed.completions and one.control == other.control
