"""Several ablations compared: ranks, agreement, marks, dose; against scipy and by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr

import shipsfast
from shipsfast.results.several import Several, names_of
from shipsfast.results.ships import ShipsResult
from shipsfast.results.sink_mass import SinkMass

LAYERS, HEADS, PROMPTS = 5, 4, 3
RNG = np.random.default_rng(0)
NOISE = 1e-6


def result(kind, mean, *, eps=None, signed=False, **more) -> ShipsResult:
    """A result whose means are these, [L, H]."""
    scores = np.stack([mean * 0.5, mean, mean * 1.5])
    ablation = {"kind": kind, "logit_scale": 1.0, "output_scale": 1.0}
    if eps is not None:
        ablation["logit_scale" if kind == "undifferentiated" else "output_scale"] = eps
    metric = {"name": "kl", "unit": "nats", "signed": False, "label": "KL"}
    if signed:
        metric = {"name": "logit_diff", "unit": "", "signed": True, "label": "difference"}
    record = {"ablation": kind if eps is None else f"{kind} (eps {eps:g})", "metric": metric}
    identity = {
        "ablation": ablation,
        "shape": [PROMPTS, LAYERS, HEADS],
        "kind": "ships",
        "heads": "all",
        "unit": "head",
    }
    identity |= {"metric": {"name": metric["name"]}, "prompts": ["a", "b", "c"]}
    return ShipsResult(scores, NOISE, record, identity, **more)


def ranked(*order) -> np.ndarray:
    """A map in which these heads, by their places, come first in this order."""
    flat = RNG.permutation(np.linspace(0.1, 0.5, LAYERS * HEADS))
    rest = [place for place in range(LAYERS * HEADS) if place not in order]
    flat[rest] = np.sort(flat)[: len(rest)][RNG.permutation(len(rest))]
    flat[list(order)] = np.linspace(2, 1, len(order))
    return flat.reshape(LAYERS, HEADS)


def sinks() -> SinkMass:
    maps = {name: RNG.uniform(0.1, 0.5, (LAYERS, HEADS)) for name in SinkMass.numbers()}
    maps["first_token"][0, 3] = 0.99
    return SinkMass(**maps, prompts=PROMPTS)


def three() -> ShipsResult:
    one, two, other = ranked(3, 7, 1), ranked(7, 3, 9), ranked(7, 12, 1)
    other[0, 3] = 0.01  # head 0-3 comes last there
    first = result("undifferentiated", one, eps=1e-5, further=(result("mean", two), result("zero", other)))
    first.record["sink_mass"] = sinks().to_json()
    return first


def test_agreement_is_scipys_and_counted_by_hand():
    first = three()
    names = ["undifferentiated", "mean", "zero"]
    assert list(first.by_ablation) == names
    found = {(each.first, each.second): each for each in first.agreement(3)}
    assert list(found) == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    for (one, other), each in found.items():
        a, b = (first.by_ablation[name].mean().ravel() for name in (one, other))
        assert each.spearman == pytest.approx(spearmanr(a, b).statistic, abs=1e-15)
        assert each.heads == 20 and each.k == 3 and each.chance == pytest.approx(3 / 20)
    assert [found[pair].overlap * 3 for pair in found] == [2, 2, 1]
    assert first.agreement(100)[0].k == 20 and first.agreement(100)[0].overlap == 1


def test_ranks_and_the_top_of_any():
    several = three().several
    assert several.ranks["undifferentiated"][0, 3] == 1 and several.ranks["zero"][0, 3] == 20
    assert several.top(1) == [(0, 3), (1, 3)]
    assert set(several.top(3)) == {(0, 3), (1, 3), (0, 1), (2, 1), (3, 0)}


def test_only_one_finds_a_head_that_another_sees_nothing_in():
    first = three()
    # At k = 1: undifferentiated alone has 0-3 first, and by zero it is last. 1-3 is first by two.
    (found,) = first.several.only_one(1)
    assert (found.layer, found.head, found.found_by, found.rank) == (0, 3, "undifferentiated", 1)
    assert found.others == {"mean": 2, "zero": 20}
    assert all((x.layer, x.head) != (0, 3) for x in first.several.only_one(3))  # mean finds it too, then
    # Not above the noise of the one that finds it: nothing is found.
    quiet = replace(first, noise_floor=10.0)
    assert all(x.found_by != "undifferentiated" for x in quiet.several.only_one(1))


def test_a_head_that_others_rank_in_their_upper_half_is_not_found_by_one_only():
    several, spared = three().several, 0
    for k in range(1, 8):
        by_one = [
            at
            for at in np.ndindex(several.known.shape)
            if several.known[at] and sum(ranks[at] <= k for ranks in several.ranks.values()) == 1
        ]
        expected = {
            at for at in by_one if max(ranks[at] for ranks in several.ranks.values()) > several.heads / 2
        }
        assert {each[:2] for each in several.only_one(k)} == expected
        spared += len(by_one) - len(expected)
    assert spared


def test_signed_scores_rank_by_size():
    one = ranked(3, 7)
    pair = result("zero", -one, signed=True, further=(result("mean", one, signed=True),))
    (each,) = pair.agreement(3)
    assert each.spearman == pytest.approx(-1) and each.overlap == 1  # the same heads, the other way
    assert np.array_equal(*pair.several.ranks.values())


def test_heads_without_a_mean_in_one_are_in_no_ranking():
    one, other = ranked(3, 7), ranked(3, 7)
    other[0, 3], other[4] = np.nan, np.nan
    several = result("zero", one, further=(result("mean", other),)).several
    assert several.heads == 15 and (0, 3) not in several.top(5)
    assert np.isnan(several.ranks["zero"][0, 3]) and len(several.to_pandas()) == 15
    nothing = result("zero", one, further=(result("mean", np.full((LAYERS, HEADS), np.nan)),))
    assert nothing.several.to_json()["heads"] == 0
    with pytest.raises(shipsfast.InputError, match="nothing to compare"):
        nothing.agreement()


def test_equal_scores_have_no_correlation():
    flat = result("zero", np.ones((LAYERS, HEADS)), further=(result("mean", ranked(3)),))
    (each,) = flat.agreement(2)
    assert np.isnan(each.spearman) and each.to_json()["spearman"] is None


def test_names_tell_scales_and_copies_apart():
    eps = [result("undifferentiated", ranked(1), eps=e) for e in (0.1, 1e-5)]
    assert names_of([*eps, result("mean", ranked(1))]) == [
        "undifferentiated (eps 0.1)", "undifferentiated (eps 1e-05)", "mean"
    ]  # fmt: skip
    assert names_of([result("mean", ranked(1)), result("mean", ranked(2))]) == ["mean", "mean (2)"]


def test_dose():
    maps = [ranked(3, 7, 1), ranked(7, 3, 9), ranked(12, 7, 9)]
    first, *others = [result("scale", mean, eps=e) for mean, e in zip(maps, (0.5, 0.1, 0.3), strict=True)]
    found = replace(first, further=(*others, result("mean", ranked(5))))
    np.testing.assert_allclose(found.dose, np.stack(maps), rtol=1e-15)
    np.testing.assert_array_equal(found.scales, [0.5, 0.1, 0.3])
    dose = found.doses["scale"]
    near = dose.neighbours(2)
    assert [(x.first, x.second) for x in near] == [
        ("scale (eps 0.1)", "scale (eps 0.3)"), ("scale (eps 0.3)", "scale (eps 0.5)")
    ]  # fmt: skip
    assert near[0].spearman == pytest.approx(spearmanr(maps[1].ravel(), maps[2].ravel()).statistic)
    frame = dose.to_pandas()
    at = frame[(frame.scale == 0.3) & (frame.layer == 3) & (frame["head"] == 0)].iloc[0]
    assert at["rank"] == 1 and at.score == pytest.approx(maps[2][3, 0])
    assert len(found.plot_dose().axes) == 2
    with pytest.raises(shipsfast.InputError, match="no ablation was scanned at several eps"):
        _ = first.dose


def test_a_run_that_was_not_finished_is_shown():
    nothing = np.full((LAYERS, HEADS), np.nan)
    eps = [result("scale", mean, eps=e) for mean, e in ((ranked(1), 0.1), (nothing, 0.2))]
    found = replace(eps[0], further=(eps[1],))
    console = Console(width=120, record=True, highlight=False)
    found.show(3, console)
    assert "no head has a score by every ablation" in console.export_text()
    body = found.as_json(3)
    assert body["several"]["heads"] == 0 and body["doses"]["scale"]["neighbours"] == []
    found.plot()


def test_table_json_pandas_and_plot(tmp_path):
    first = three()
    console = Console(width=120, record=True, highlight=False)
    first.show(1, console)
    said = " ".join(console.export_text().split())
    assert "3 ablations compared" in said and "0-3 *" in said
    assert "only undifferentiated finds head 0-3: rank 1, and 2 of 20 by mean, 20 of 20 by zero" in said
    assert "it rests on the first token (attention weight 0.99)" in said
    body = json.loads(json.dumps(first.as_json(2)))
    assert list(body["by_ablation"]) == ["undifferentiated", "mean", "zero"]
    assert body["several"]["agreement"][0]["k"] == 2
    assert body["several"]["top"][0]["sink"]["first_token"] == 0.99
    frame = first.several.to_pandas(1)
    row = frame[(frame.layer == 0) & (frame["head"] == 3)].iloc[0]
    assert row["rank zero"] == 20 and row.found_by == "undifferentiated" and row.first_token == 0.99
    first.plot(tmp_path / "maps.png", title="Three")
    assert (tmp_path / "maps.png").stat().st_size > 5_000


def test_saved_and_loaded(tmp_path):
    first = three()
    first.identity["further_ablations"] = [each.identity["ablation"] for each in first.further]
    first.save(tmp_path / "run")
    again = shipsfast.load(tmp_path / "run")
    assert list(again.by_ablation) == list(first.by_ablation)
    for name, each in again.by_ablation.items():
        np.testing.assert_array_equal(each.scores, first.by_ablation[name].scores)
    assert again.sink_mass.first_token[0, 3] == 0.99
    assert shipsfast.load(tmp_path / "run" / "by_ablation" / "2").record["ablation"] == "zero"
    from shipsfast.runs.verify import verify

    assert verify(tmp_path / "run")["verdict"] == "sound"
    (tmp_path / "run" / "by_ablation" / "2").rename(tmp_path / "gone")
    assert "a further ablation" in verify(tmp_path / "run")["problems"][0]["what"]
    with pytest.raises(shipsfast.InputError):
        shipsfast.load(tmp_path / "run")


def test_maps_of_other_models_are_refused():
    small = result("mean", np.ones((2, 2)))
    with pytest.raises(shipsfast.InputError, match="maps of"):
        Several({"zero": result("zero", ranked(1)), "mean": small})
