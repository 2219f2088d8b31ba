"""Projections and probes: values by hand, and what is no vector, no probe and no layer."""

import functools
import json

import numpy as np
import pytest
import torch

from shipsfast import Direction, InputError, probe, projection
from shipsfast.scans.measurements import ReadOut, ShipsMeasurement
from shipsfast.scans.metrics import as_metric, as_metrics, parse_metric

BASE = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
OTHER = torch.tensor([[4.0, 6.0], [1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
ROWS = torch.tensor([0, 0, 1])
VECTORS = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
INF, NAN = float("inf"), float("nan")


def named_probe(hidden):
    return hidden.pow(2).sum(-1)


def direction(**given) -> Direction:
    return Direction(VECTORS, np.ones(3), **{"layer": 1} | given)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (projection([3.0, 4.0], 0), [3 * 0.6 + 4 * 0.8, 0, 0]),
        (projection([3.0, 4.0], 0, normalize=False), [25, 0, 0]),
        (projection(direction()), [4, 0, 0]),
        (projection(direction(), 2), [-3, 0, 0]),
        (projection(direction(), 0, False), [25, 0, 0]),
        (projection(torch.tensor([[3, 4]]), 0), [5, 0, 0]),
        (probe([3.0, 4.0], 0), [25, 0, 0]),
        (probe(np.array([3.0, 4.0]), 0, bias=7.0), [25, 0, 0]),
        (probe(named_probe, 0), [47, 0, 0]),
        (probe(lambda h: h.numpy()[:, 0].tolist(), 0), [3, 0, 0]),
    ],
)
def test_values_by_hand(metric, expected):
    metric = metric.fitted(3, 2, torch.float64)
    found = metric.rows(BASE, OTHER, ROWS)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_a_linear_layer_and_a_linear_model_of_scikit_learn():
    layer = torch.nn.Linear(2, 1, dtype=torch.bfloat16)

    class LogisticRegression:
        coef_, intercept_ = np.array([[3.0, 4.0]]), np.array([0.5])

    weights = layer.weight.detach().double()[0]
    assert probe(layer, 1).rows(BASE, OTHER, ROWS)[0] == float(weights @ torch.tensor([3.0, 4.0]).double())
    assert probe(LogisticRegression(), 1) == probe([3, 4], 1)


def test_half_precision_states_are_taken_from_each_other_exactly():
    """In bfloat16 a change of 2^-8 at 256 is one step; a product taken before the difference would lose it."""
    base = torch.full((1, 64), 256.0).bfloat16()
    other = base.clone()
    other[0, 0] += 2
    vector = torch.full((64,), 1e6).double()
    vector[0] = 1.0
    assert (
        projection(vector, 0, normalize=False).rows(base, other, torch.zeros(1, dtype=torch.long)).item() == 2
    )


def test_what_is_not_finite():
    bad = torch.tensor([[INF, 0.0], [NAN, 0.0]], dtype=torch.float64)
    found = projection([1.0, 1.0], 0).rows(BASE, bad, torch.tensor([0, 0]))
    assert not torch.isfinite(found).any()


def test_a_callable_gets_floats_of_the_models_width():
    seen = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        metric = probe(lambda hidden: seen.append(hidden.dtype) or hidden[:, 0], 0).fitted(1, 2, dtype)
        metric.rows(BASE.to(dtype), OTHER.to(dtype), ROWS)
    assert seen == [torch.float64] * 2 + [torch.float32] * 4


def test_names_labels_and_identities():
    metric = projection(direction(), name="refusal")
    assert (metric.name, metric.layer, metric.signed) == ("refusal@1", 1, True)
    assert metric.label == "change along refusal after layer 1"
    assert (
        projection([1.0, 1.0], 4, False).label == "change along the direction after layer 4, not normalised"
    )
    assert (probe([1.0], 2).unit, probe([1.0], 2).label) == (
        "logits",
        "change of log-odds of the probe after layer 2",
    )
    assert probe(named_probe, 2).name == "named_probe@2"
    others = [
        projection(direction(), 0), projection(direction(), normalize=False), projection([0.0, -2.0], 1),
        probe([0.0, 1.0], 1), projection([0.0, 1.0], 1),
    ]  # fmt: skip
    said = [json.dumps(each.describe(), sort_keys=True) for each in (metric, *others)]
    assert len(set(said)) == 5  # the last is the first: its vector is the same
    assert metric == others[-1] and hash(metric) == hash(others[-1])
    assert probe(named_probe, 1) == probe(named_probe, 1) != probe(named_probe, 2)
    assert probe([1.0], 1, bias=2.0).describe() == probe([1.0], 1).describe()


def test_which_can_be_used_with_a_run_folder():
    assert projection(direction()).is_named and probe([1.0], 0).is_named and probe(named_probe, 0).is_named
    for given in (
        lambda h: h[:, 0],
        torch.nn.Sequential(torch.nn.Linear(2, 1)),
        functools.partial(named_probe),
    ):
        assert not probe(given, 0).is_named


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: projection([1.0, 2.0]), "^projection: after which layer"),
        (lambda: projection([0.0, 0.0], 1), "^projection: the vector is 0"),
        (lambda: projection([1.0, NAN], 1), "^projection: numbers of the vector are not finite"),
        (lambda: projection([1 + 1j], 1), r"^projection: expected real numbers \[hidden\], got torch.complex"),
        (lambda: projection("north", 1), r"^projection: expected numbers \[hidden\], got str"),
        (lambda: projection([[1.0], [2.0]], 1), r"^projection: expected numbers \[hidden\], got shape \[2, 1\]; for several"),
        (lambda: projection([], 1), r"got shape \[0\]$"),
        (lambda: projection(1.0, 1), r"got shape \[\]$"),
        (lambda: projection([1.0], -1), "^layer must be a whole number of at least 0, got -1"),
        (lambda: projection(direction(), 3), "^layer 3: the model has 3 decoder layers"),
        (lambda: probe(torch.nn.Linear(2, 2), 1), r"^probe: expected numbers \[hidden\], got shape \[2, 2\]; for several outputs"),
        (lambda: probe(None, 1), r"^probe: expected numbers \[hidden\] or a callable, got NoneType"),
        (lambda: probe([1.0], 1, bias=NAN), "^probe: bias must be a finite number"),
        (lambda: probe([1.0], 1.5), "^layer must be a whole number"),
        (lambda: probe([1.0], 3).fitted(3, 1, torch.float32), "^metric probe@3: layer 3: the model has 3 decoder layers"),
        (lambda: probe([1.0], 1).fitted(3, 2, torch.float32), "^metric probe@1 has a vector of 1 number.*have 2: it is of another"),
        (lambda: probe([1.0], 1).rows(BASE, OTHER, ROWS), "^metric probe@1 has a vector of 1"),
        (lambda: probe(lambda h: h, 1).rows(BASE, OTHER, ROWS), r"expected 3 real numbers, shape \[3\], got shape \[3, 2\]"),
        (lambda: probe(lambda h: h[:, 0] > 0, 1).rows(BASE, OTHER, ROWS), "got torch.bool"),
        (lambda: as_metric(projection), r"^metric projection is not called yet: give it a direction, projection\(\.\.\.\)$"),
        (lambda: as_metric(probe), "^metric probe is not called yet: give it weights"),
        (lambda: as_metrics([probe([1.0], 1), probe([2.0], 1)]), "^two metrics are called probe@1"),
        (lambda: parse_metric("projection:"), r"^metric 'projection:': expected projection:FILE\[,LAYER\]$"),
        (lambda: parse_metric("projection:none.safetensors"), "^none.safetensors cannot be read as a direction"),
        (lambda: projection([1.0], 1).to_text(), "^metric projection@1 is made of numbers of this process"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_text_of_a_file(tmp_path):
    path = tmp_path / "refusal.safetensors"
    direction().save(path)
    metric = parse_metric(f"projection:{path}")
    assert (metric.name, metric.layer) == ("refusal@1", 1)
    assert metric == projection(direction())
    assert parse_metric(f"projection:{path},2") == projection(direction(), 2)
    assert parse_metric(metric.to_text()) == metric
    odd = tmp_path / "a,7"
    direction().save(odd)
    assert parse_metric(f"projection:{odd}").layer == 1
    assert parse_metric(f"projection:{odd},0").layer == 0
    measurement = ShipsMeasurement(prompts=[[1, 2]], metric=["kl", metric])
    body = json.loads(json.dumps(measurement.to_json()))
    again = ShipsMeasurement.from_json(body)
    assert as_metrics(again.metric)[1] == metric


def test_what_is_read_out():
    def read(*metrics):
        return ShipsMeasurement(prompts=[[1, 2]], metric=metrics).read_out()

    assert read("kl") == read(lambda base, other, index: index) == ReadOut((), True)
    assert read("kl", probe([1.0], 3), probe([1.0], 1, name="x")) == ReadOut((1, 3), True)
    assert read(probe([1.0], 3), projection([1.0], 3)) == ReadOut((3,), False)
