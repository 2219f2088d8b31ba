"""The error of scores as numbers and in words, by hand."""

import json

import numpy as np
import pytest

from shipsfast.errors import InputError
from shipsfast.results.load import load
from shipsfast.results.score_error import Rescored, ScoreError
from tests.support.manifests import edit
from tests.support.overflowing import scan


def sample(scores, errors, drawn=None):
    drawn = [True] * len(scores) if drawn is None else drawn
    return tuple(
        Rescored(0, at, s + e, s, d, 0)
        for at, (s, e, d) in enumerate(zip(scores, errors, drawn, strict=True))
    )


def test_quantiles_are_of_what_was_drawn_and_the_largest_of_all():
    error = ScoreError(sample([1.0, 2.0, 4.0, 8.0], [0.5, -0.25, 0.5, 2.0], [True] * 3 + [False]), "float32")
    assert (
        error.absolute["median"] == 0.5 and error.absolute["max"] == 2.0 and np.isnan(error.absolute["p90"])
    )
    assert error.relative["median"] == 0.125 and error.relative["max"] == 0.5
    ten = ScoreError(sample([1.0] * 11, np.arange(11) / 16), "float32")
    assert ten.absolute["p90"] == pytest.approx(9.8 / 16) and ten.absolute["median"] == 5 / 16


def test_the_floor_is_the_largest_error_of_the_smaller_half_or_what_packing_does():
    scores, errors = [8.0, 1.0, 0.5, -4.0, 2.0], [3.0, 0.125, -0.25, 1.0, 0.5]
    error = ScoreError(sample(scores, errors), "float32", packing=0.01)
    assert [x.expected for x in error.smaller] == [0.5, 1.0, 2.0] and error.floor == 0.5
    assert ScoreError(error.rescored, "float32", packing=0.75).floor == 0.75
    assert ScoreError(packing=0.01).floor == 0.01


def test_words():
    error = ScoreError(sample([1.0, 2.0], [0.015625, 0.0001]), "float32", "", 1e-9, 0.25, "bfloat16")
    first, second = error.lines("nats")
    assert (
        first
        == "error of a score, against float32: median 0.0079 nats (0.78 %), largest 0.016 nats (1.6 %); 2 rescored"
    )
    assert second == (
        "packing moves the unablated model by 1e-09 nats; scores and plain passes in bfloat16 differ by 0.25 nats or less "
        "where checked"
    )
    none = ScoreError(reason="its layers are quantised", own="bfloat16")
    assert none.lines("nats")[0] == (
        "the error against higher precision was not measured: its layers are quantised; the noise floor has what packing and "
        "batching round, and not what bfloat16 does"
    )
    assert none.note() == "error of scores not measured: its layers are quantised"
    assert error.note() == "error of a score against float32: median 0.78 %, largest 1.6 %"
    far = ScoreError(sample([0.01, 0.01], [0.024, 1e-6]), "float32")
    assert "largest 0.024 nats (240 %)" in far.lines("nats")[0]
    assert far.note() == "error of a score against float32: median 120 %, largest 240 %"
    near = ScoreError(sample([1.0], [2.0**-14]), "float64")
    assert near.note() == "error of a score against float64: median 6e-05 of it, largest 6e-05 of it"
    zero = ScoreError(sample([0.0], [0.0]), "float64")
    assert zero.lines("")[0] == "error of a score, against float64: median 0, largest 0; 1 rescored"


def test_json_and_back():
    error = ScoreError(sample([1.0, 2.0], [0.5, 0.25]), "float32", "", 1e-9, None, "bfloat16")
    body = json.loads(json.dumps(error.to_json(), allow_nan=False))
    assert ScoreError.from_json(body) == error and body["absolute"]["p90"] is None and body["floor"] == 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(packing="x"),
        lambda e: e.pop("own"),
        lambda e: e.update(rescored=[{"layer": 0}]),
        lambda e: e["rescored"][0].update(score=float("inf")),
        lambda e: e["rescored"][0].update(more=1),
        lambda e: e["rescored"][0].update(head=-1),
    ],
)
def test_made_up_errors_in_a_run_folder_are_refused(tmp_path, change):
    from tests.support.models import build

    scan(build(), out=tmp_path / "run")
    assert load(tmp_path / "run").error.rescored
    edit(tmp_path / "run", lambda manifest: change(manifest["error"]))
    with pytest.raises(InputError, match="error is not what is known of the error of scores|is damaged"):
        load(tmp_path / "run")
