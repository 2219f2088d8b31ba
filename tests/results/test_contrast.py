"""`contrast`: two scans of one model over two sets of prompts, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

import shipsfast
from shipsfast import InputError, ShipsResult, SubspaceResult, contrast
from shipsfast.results.contrast import ContrastResult
from tests.support.models import build

KL = {"name": "kl", "unit": "nats", "signed": False, "label": "KL(base || head ablated)"}
L, H = 4, 5
RAISED, LOUD, EMPTY = (2, 1), (3, 4), (0, 0)  # more on a; most on both, and less on a; not scanned


def made(prompts, name, *, raised=1.0, loud=5.0, seed=0, scores=None, marked=None, record=None, **identity):
    """A scan with scores drawn from one distribution but for two heads."""
    rng = np.random.default_rng([seed, prompts])
    if scores is None:
        scores = rng.lognormal(0, 0.3, (prompts, L, H))
        scores[:, *RAISED] *= raised
        scores[:, *LOUD] *= loud
        scores[:, *EMPTY] = np.nan
    about = {
        "metric": KL,
        "ablation": "undifferentiated (eps 1e-05)",
        "template": "chat",
        "prompting": {"system": None},
    }
    identity = {
        "kind": "ships", "fingerprint": "f", "prompts": [f"{name}{i}" for i in range(prompts)], "metric": {"name": "kl"},
        "ablation": {"kind": "undifferentiated"}, "unit": "head", "dtype": "float32", "heads": "all",
        "shape": [prompts, L, H],
    } | identity  # fmt: skip
    return ShipsResult(scores, 1e-4, about | (record or {}), identity, marked=marked)


@pytest.fixture
def pair():
    return made(20, "a", raised=3.0, loud=5.0), made(16, "b", loud=8.0, seed=1)


def shown(result, top=10):
    console = Console(width=300, highlight=False)
    with console.capture() as capture:
        result.show(top, console)
    return capture.get()


def test_maps_are_those_of_scipy(pair):
    a, b = pair
    found = contrast(a, b)
    known = ~np.isnan(a.mean())
    x, y = a.scores[:, known], b.scores[:, known]
    test = stats.mannwhitneyu(x, y, alternative="greater", method="exact")
    np.testing.assert_allclose(found.auroc[known], test.statistic / (20 * 16), rtol=1e-13)
    np.testing.assert_allclose(found.difference[known], x.mean(0) - y.mean(0), rtol=1e-12)
    error = np.sqrt(test.pvalue * (1 - test.pvalue) / found.relabellings) + 2 / found.relabellings
    assert (np.abs(found.p[known] - test.pvalue) < 5 * error).all()
    np.testing.assert_allclose(found.q[known], stats.false_discovery_control(found.p[known]), rtol=1e-13)
    np.testing.assert_allclose(found.cliffs_delta, 2 * found.auroc - 1)
    g = found.hedges_g[known] / stats.ttest_ind(x, y).statistic
    np.testing.assert_allclose(g, g[0], rtol=1e-12)  # one factor for all heads
    for name, values in found.columns.items():
        assert np.isnan(values[EMPTY]) and np.isfinite(values[known]).all(), name


def test_q_values_are_benjamini_s_and_hochberg_s(pair):
    """Their step-up rule, head by head: at every level, the heads up to the last p under its line."""
    found = contrast(*pair)
    p, q = (x[~np.isnan(x)] for x in (found.p, found.q))
    order = np.sort(p)
    for level in (0.001, 0.05, 0.3, 0.9):
        under = np.flatnonzero(order <= level * np.arange(1, len(p) + 1) / len(p))
        rejected = p <= order[under[-1]] if len(under) else np.zeros(len(p), bool)
        np.testing.assert_array_equal(q <= level, rejected)


def test_the_plain_ranking_misleads_and_the_contrast_does_not(pair):
    a, b = pair
    found = contrast(a, b)
    assert a.top(1)[0][:2] == LOUD and found.top(1)[0][:2] == RAISED
    assert [s[:2] for s in found.significant()] == [RAISED]
    assert (found.rank_a[LOUD], found.rank[RAISED]) == (1, 1) and found.rank[LOUD] == 19
    for grid in (found.rank, found.rank_a):
        assert sorted(grid[~np.isnan(grid)]) == list(range(1, L * H))
    assert found.top(1)[0].score == found.difference[RAISED]
    assert found.top(3, by="auroc")[0].score == found.auroc[RAISED] == np.nanmax(found.auroc)
    other = contrast(b, a, alternative="less")
    assert [s[:2] for s in other.significant()] == [RAISED]
    np.testing.assert_allclose(other.rank, found.rank)
    assert other.top(1, by="auroc")[0] == (*RAISED, other.auroc[RAISED])
    either = contrast(a, b, alternative="two-sided", statistic="difference")
    assert {s[:2] for s in either.significant()} == {RAISED, LOUD}
    assert {s[:2] for s in either.top(2)} == {RAISED, LOUD}


def test_a_difference_within_noise_is_not_significant(pair):
    a, b = pair
    quiet = contrast(replace(a, noise_floor=5.0), b)
    assert quiet.q[RAISED] < 0.05 and not quiet.above_noise()[RAISED] and quiet.significant() == []
    assert "* not above the noise floor, 5" in shown(quiet, 1)


def test_heads_with_a_marked_score_are_left_out(pair):
    a, b = pair
    marked = np.zeros(b.scores.shape, bool)
    marked[3, 1, 1] = True
    scores = np.where(marked, np.nan, b.scores)
    found = contrast(a, replace(b, scores=scores, marked=marked))
    whole = contrast(a, b)
    assert found.marked_heads == [(1, 1)] and np.isnan(found.p[1, 1]) and np.isnan(found.auroc[1, 1])
    others = ~np.isnan(found.p)
    assert others.sum() == L * H - 2
    np.testing.assert_array_equal(found.auroc[others], whole.auroc[others])
    assert "left out, with scores that are not finite: 1 head: 1-1" in shown(found)
    assert found.as_json(1)["marked_heads"] == [[1, 1]] and len(found.to_pandas()) == L * H - 2
    # In a the same head leads no ranking; in b alone it must not shift the others' places.
    assert np.nanmax(found.rank) == L * H - 2


def test_signed_scores_and_rates():
    signed = {"metric": KL | {"name": "logit_diff(1, 2)", "signed": True}}
    rng = np.random.default_rng(0)
    low, high = (rng.normal(mean, 1, (12, L, H)) for mean in (-3, -1))
    found = contrast(made(12, "a", scores=high, record=signed), made(12, "b", scores=low, record=signed))
    assert (found.difference > 0).all() and (found.auroc > 0.5).all()
    rates = {"metric": KL | {"name": "asr", "unit": ""}}
    yes, no = (rng.binomial(1, share, (7, L, H)).astype(float) for share in (0.9, 0.3))
    asked = [made(7, name, scores=x, record=rates) for name, x in (("a", yes), ("b", no))]
    found = contrast(*asked)
    np.testing.assert_allclose(found.cliffs_delta, yes.mean(0) - no.mean(0), atol=1e-12)
    assert found.noise_floor == 0 and found.exact
    # Of 0 and 1 both statistics are Fisher's.
    np.testing.assert_allclose(found.p, contrast(*asked, statistic="difference").p)
    tables = [
        [[int(y), 7 - int(y)], [int(n), 7 - int(n)]]
        for y, n in zip(yes.sum(0).ravel(), no.sum(0).ravel(), strict=True)
    ]
    fisher = [stats.fisher_exact(table, alternative="greater").pvalue for table in tables]
    np.testing.assert_allclose(found.p.ravel(), fisher, rtol=1e-12)


def test_json_table_text_and_plot(pair, tmp_path):
    found = contrast(*pair)
    body = json.loads(json.dumps(found.as_json(3), allow_nan=False))
    assert [s["rank"] for s in body["top"]] == [1, 2, 3] and body["top"][0]["significant"]
    assert (body["top"][0]["layer"], body["top"][0]["head"]) == RAISED
    assert body["significant"] == {"q": 0.05, "heads": [list(RAISED)]}
    assert body["prompts"] == {"a": 20, "b": 16} and body["effect_size"] == "Hedges' g"
    assert body["test"]["relabellings"] == 99_999 and not body["test"]["exact"]
    frame = found.to_pandas()
    assert len(frame) == L * H - 1 and frame.significant.sum() == 1
    row = frame[frame.significant].iloc[0]
    assert (row.layer, row["head"], row["rank"]) == (*RAISED, 1) and row.auroc == found.auroc[RAISED]
    text = shown(found, 2)
    assert "1 of 19 heads with q at most 0.05" in text
    assert "head 3-4, the first of a alone, is number 19 of 19 here" in text
    figure = found.plot(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    first, second, difference = (axes.images[0] for axes in figure.axes if axes.images and axes.get_title())
    assert first.norm is second.norm and first.norm.vmax == np.nanmax([found.mean_a, found.mean_b])
    assert difference.norm.vmin == -difference.norm.vmax == -np.nanmax(np.abs(found.difference))
    assert repr(found).startswith(
        "ContrastResult(20 prompts and 16 prompts, 1 heads with q <= 0.05, top: 2-1 "
    )


def test_equality(pair):
    assert contrast(*pair) == contrast(*pair)
    assert contrast(*pair) != contrast(*pair, seed=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "g"}, "differ in fingerprint: the weights"),
        (
            {"ablation": {"kind": "mean"}},
            "differ in ablation: the ablation there is undifferentiated, here mean",
        ),
        ({"metric": {"name": "js"}}, "differ in metric"),
        ({"unit": "kv_group"}, "differ in unit: unit there is head, here kv_group"),
        ({"dtype": "bfloat16"}, "differ in dtype"),
        ({"heads": [[0, 1]]}, "differ in heads"),
        ({"kind": "other", "unit": "kv_group"}, "differ in kind, unit"),
        ({"prompts": [f"a{i}" for i in range(20)][::-1]}, "scans of the same prompts"),
    ],
)
def test_scans_that_are_not_alike_are_refused(pair, change, words):
    a, b = pair
    with pytest.raises(InputError, match=words) as found:
        contrast(a, replace(b, identity=b.identity | change))
    assert "\n" not in str(found.value)


def test_what_is_no_pair_of_finished_scans_is_refused(pair):
    a, b = pair
    with pytest.raises(InputError, match="b is a SubspaceResult"):
        contrast(a, SubspaceResult(np.zeros((L, H))))
    with pytest.raises(InputError, match="a is a scan that is not finished"):
        contrast(replace(a, record=a.record | {"status": "running"}), b)
    with pytest.raises(InputError, match="b has one prompt"):
        contrast(a, made(1, "b"))
    with pytest.raises(InputError, match="a has no control"):
        contrast(a)
    partly = b.scores.copy()
    partly[3, 1, 1] = np.nan
    with pytest.raises(InputError, match="b: head 1-1 has scores for 15 of 16 prompts"):
        contrast(a, replace(b, scores=partly))
    partly[:, 1, 1] = np.nan
    with pytest.raises(InputError, match="head 1-1 has scores in one of a and b only"):
        contrast(a, replace(b, scores=partly))
    with pytest.raises(InputError, match="maps of different shapes"):
        contrast(a, made(9, "b", scores=np.ones((9, L, H + 1))))
    with pytest.raises(InputError, match="alternative must be one of"):
        contrast(a, b, alternative="more")
    with pytest.raises(InputError, match="by must be one of"):
        contrast(a, b).top(3, by="p")
    with pytest.raises(InputError, match="q must be above 0"):
        contrast(a, b).significant(0)


def test_warnings(pair):
    a, b = pair
    assert contrast(a, b).warnings == []
    both = b.identity | {"prompts": [*b.identity["prompts"][:-2], "a0", "a1"]}
    (found,) = contrast(a, replace(b, identity=both)).warnings
    assert found.startswith("2 prompts in both sets")
    (found,) = contrast(a, replace(b, record=b.record | {"template": "none"})).warnings
    assert "wrapped differently: the template there is 'chat', here 'none'" in found
    (found,) = contrast(a, b, permutations=99).warnings
    assert found.startswith(
        "with 99 relabellings no p-value is below 0.01: heads reach q 0.05 only if at least 4 of 19 do"
    )
    assert found.endswith("take more permutations")
    (found,) = contrast(made(3, "a"), made(3, "b")).warnings
    assert found.startswith("with 20 relabellings no p-value is below 0.05") and found.endswith(
        "take more prompts"
    )
    (found,) = contrast(a, b, permutations=9).warnings
    assert "is below 0.1: no head can reach q 0.05: take more permutations" in found
    assert "Warning: with 99 relabellings no p-value" in shown(contrast(a, b, permutations=99))


def test_run_folders_and_further_metrics(tmp_path):
    """The same numbers as of results at hand, of every metric that both have."""
    model = build()
    sets = {"a": [[5, 6, 7, 8], [5, 6, 9], [11, 12]], "b": [[21, 22, 23], [24, 25], [30, 31, 32], [40, 41]]}
    results = [
        shipsfast.scan(model, prompts, metric=["kl", "js"], progress=False, out=tmp_path / name)
        for name, prompts in sets.items()
    ]
    found = contrast(*results)
    loaded = contrast(tmp_path / "a", str(tmp_path / "b"))
    assert isinstance(found, ContrastResult) and list(found.also) == ["js"]
    for one, other in ((found, loaded), (found.also["js"], loaded.also["js"])):
        for name, values in one.columns.items():
            np.testing.assert_array_equal(values, other.columns[name], err_msg=name)
    assert found.also["js"] == contrast(*(each.also["js"] for each in results))
    assert found.exact and found.relabellings == 35
    assert found.as_json(2)["also"]["js"]["metric"]["name"] == "js" and "Jensen-Shannon" in shown(found)
    mean = shipsfast.scan(model, sets["b"], ablation="mean", progress=False)
    with pytest.raises(InputError, match=r"differ in ablation, further_metrics|differ in ablation"):
        contrast(results[0], mean)
    with pytest.raises(InputError, match=r"is not a shipsfast run"):
        contrast(tmp_path / "c", tmp_path / "b")
