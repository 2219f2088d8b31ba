"""Scores by group of prompts."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from shipsfast.errors import InputError
from shipsfast.results.groups import GroupedScores
from shipsfast.results.ships import ShipsResult

LABELS = ["tin", "oil", "tin", "tin", "oil", "a [b]"]


def result(scores=None, **metric) -> ShipsResult:
    scores = np.random.default_rng(0).normal(size=(len(LABELS), 3, 4)) ** 2 if scores is None else scores
    record = {"metric": {"name": "kl", "unit": "nats", "signed": False, "label": "KL"} | metric}
    return ShipsResult(scores, 1e-9, record, {"heads": "all"})


def test_maps_are_means_over_each_groups_prompts():
    found = result()
    groups = found.by_group(LABELS)
    assert groups.names == ["a [b]", "oil", "tin"] and groups.prompts == [1, 2, 3]
    flat = pd.DataFrame(found.scores.reshape(len(LABELS), -1)).groupby(LABELS).mean()
    assert groups.mean() == pytest.approx(flat.to_numpy().reshape(3, 3, 4), abs=1e-15)
    for map_, rank, (name, top) in zip(groups.mean(), groups.rank(), groups.top(12).items(), strict=True):
        assert rank.ravel().tolist() == rankdata(-map_.ravel()).tolist()
        assert [rank[s.layer, s.head] for s in top] == list(range(1, 13)), name


def test_signed_scores_are_ranked_by_size():
    scores = np.array([[[0.1, -3.0, 2.0]]])
    groups = result(scores, signed=True, name="logit_diff").by_group(["x"])
    assert groups.rank()[0].tolist() == [[3, 1, 2]] and groups.top(1)["x"][0][:2] == (0, 1)


def test_heads_without_a_score_have_no_rank():
    found = result()
    found.scores[:, 1] = np.nan
    found.scores[1, 0, 0] = np.nan  # marked, of oil
    groups = found.by_group(LABELS)
    assert np.isnan(groups.rank()[:, 1]).all() and groups.rank()[0, 0].tolist() != [np.nan] * 4
    assert np.isnan(groups.rank()[1, 0, 0]) and not np.isnan(groups.rank()[2, 0, 0])
    assert groups.agreement(3).heads == 7
    frame = groups.to_pandas()
    assert len(frame) == 8 + 7 + 8 and not frame.isna().any(axis=None)


def test_the_frame_has_a_row_for_each_group_and_head():
    groups = result().by_group(LABELS)
    frame = groups.to_pandas()
    assert list(frame.columns) == ["group", "prompts", "layer", "head", "mean_kl_nats", "rank"]
    for row in frame.itertuples():
        at = (groups.names.index(row.group), row.layer, row.head)
        assert row.mean_kl_nats == groups.mean()[at] and row.rank == groups.rank()[at]
        assert row.prompts == LABELS.count(row.group)


def test_groups_that_differ_are_told_from_groups_that_do_not():
    rng = np.random.default_rng(1)
    scores, labels = rng.gamma(1.0, size=(60, 4, 8)), ["x", "y", "z"] * 20
    scores *= np.linspace(0.2, 2, 32).reshape(4, 8)
    same = result(scores).by_group(labels).agreement(8, seed=3)
    scores[2::3] = scores[2::3, ::-1, ::-1]  # z has other heads
    other = result(scores).by_group(labels).agreement(8, seed=3)
    low, high = same.spearman_shuffled[0, 1]
    assert low - 0.05 < same.spearman[0, 1] < high + 0.05
    for at in ((0, 2), (1, 2)):
        assert other.spearman[at] < other.spearman_shuffled[at][0] - 0.05
        assert other.overlap[at] <= other.overlap_shuffled[at][0]
    assert other.pairs()[-1] == (0, 1)
    again = result(scores).by_group(labels).agreement(8, seed=3)
    assert np.array_equal(again.spearman_shuffled, other.spearman_shuffled, equal_nan=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "expected one for each of 6 prompts, got 5"),
        ("tin", "expected one for each of 6 prompts, got 1"),
        ([*LABELS[:-1], " "], "prompt 5 is in the group ' ': expected a text or a whole number"),
        ([*LABELS[:-1], None], "prompt 5 is in the group None"),
        ([*LABELS[:-1], float("nan")], "prompt 5 is in the group nan"),
        ([*LABELS[:-1], "x" * 81], "prompt 5 has a text of 81 characters"),
        (None, "no groups of prompts in its record: give labels"),
    ],
)
def test_what_is_no_group_is_refused(labels, message):
    with pytest.raises(InputError, match=message):
        result().by_group(labels)


def test_as_many_groups_as_prompts_are_refused():
    with pytest.raises(InputError, match="120 prompts fall into 120 groups, and 100 are the most"):
        result(np.ones((120, 1, 2))).by_group(range(120))


def test_numbers_and_arrays_of_labels():
    groups = result().by_group(np.array([3, 1, 3, 3, 1, 3]))
    assert groups.names == ["1", "3"] and isinstance(groups, GroupedScores)
    assert result().by_group(pd.Series(LABELS)).names == ["a [b]", "oil", "tin"]
    assert result().by_group([" tin ", "tin", *LABELS[2:]]).prompts == [1, 1, 4]


def test_what_it_shows(capsys):
    groups = result().by_group(LABELS)
    groups.show(5)
    text = capsys.readouterr().out
    assert (
        "a [b]" in text
        and "oil, tin" in text
        and "tops of 5 share 42%" in text.replace("that have nothing to do with each other ", "")
    )
    assert repr(groups).startswith("GroupedScores(3 groups by group; top: a [b] (1) ")
    body = json.loads(json.dumps(groups.as_json(2)))
    assert [each["prompts"] for each in body["groups"]] == [1, 2, 3] and len(body["agreement"]["pairs"]) == 3
    one = result().by_group(["x"] * 6)
    one.show()
    assert "one group: nothing to compare" in capsys.readouterr().out and one.as_json(2)["agreement"] is None


@pytest.mark.parametrize("signed", [False, True])
def test_all_maps_are_on_one_scale(tmp_path, signed):
    labels = ["a", "b", "c", "d", "e", "$x$"]
    figure = result(signed=signed, name="x").by_group(labels).plot(tmp_path / "groups.png")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6 and len({(i.norm.vmin, i.norm.vmax) for i in images}) == 1
    assert images[0].norm.vmax == result().scores.max()
    assert [axes.get_title() for axes in figure.axes if axes.images][:2] == [
        r"\$x\$, 1 prompt",
        "a, 1 prompt",
    ]
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
