"""The heads of a search are those of a complete scan, with its scores, whatever a screen and a race leave out."""

import copy
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import InputError
from shipsfast.models.anatomy import inspect_model
from shipsfast.models.wider import narrower_copy
from shipsfast.results.certificate import Certificate
from shipsfast.results.race import Race
from shipsfast.runs.folder import RunFolder
from shipsfast.runs.kinds import CERTIFICATE, SCORES, SCREEN
from shipsfast.runs.verify import verify
from shipsfast.scans import screen, top_heads, top_rounds
from shipsfast.scans.top_store import SearchStore, Stage
from tests.support.manifests import edit
from tests.support.models import build
from tests.support.overflowing import overflowing

FAMILIES = {
    "llama-gqa": {"num_hidden_layers": 8},
    "qwen2-gqa": {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8},
    "gemma2-softcap-window": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gpt2": {"n_layer": 8},
}
PROMPTS = [
    [5, 6, 7, 8],
    [5, 6, 9],
    [11, 12],
    [3, 4, 5, 6, 7],
    [20, 30, 40],
    [8, 7, 6, 5],
    [50, 51],
    [9, 10, 11, 12],
]
HOW = dict(progress=False)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Of so few heads, few are drawn."""
    monkeypatch.setattr(top_heads, "DRAWN", 6)


@pytest.fixture(scope="module")
def model():
    return build("llama-gqa", torch.float32, **FAMILIES["llama-gqa"])


@pytest.fixture(scope="module")
def scanned(model):
    return shipsfast.scan(
        model, PROMPTS, metric=["kl", "js", "total_variation", shipsfast.logit_diff(3, 5)], **HOW
    )


class Eager(Race):
    """Keeps the first half of the heads after every round, and takes a generous guess of the others' means."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.bound, self.about = "a guess", "It is made up."

    def alive(self, scores):
        left = ~np.isnan(scores).any(0)
        means = np.where(left, scores.mean(0), -np.inf)
        return left & (means >= np.median(means[left]))

    def upper(self, scores):
        seen = ~np.isnan(scores)
        mean = np.where(seen, scores, 0).sum(0) / np.maximum(seen.sum(0), 1)
        return np.where(seen.all(0), mean, 3 * mean)


@pytest.fixture
def races(monkeypatch):
    """Rounds after 2 and 5 of the 8 prompts."""
    monkeypatch.setattr(top_heads, "chosen_ends", lambda prepared, k, order: [2, 5, 8])
    monkeypatch.setattr(top_heads, "Race", Eager)


def same(found, scanned, k: int, tolerance: float = 1e-10, *, guessed: bool = False) -> None:
    """The same heads with the same scores, and everything else on the right side of them."""
    expected = scanned.top(k)
    assert [h[:2] for h in found.heads] == [h[:2] for h in expected]
    assert np.allclose(
        [h.score for h in found.heads], [h.score for h in expected], rtol=tolerance, atol=tolerance
    )
    known = ~np.isnan(found.per_prompt)
    assert np.allclose(found.per_prompt[known], scanned.scores[known], rtol=tolerance, atol=tolerance)
    assert np.array_equal(known.any(0), known.all(0)) and np.array_equal(
        np.isnan(found.scores), ~known.any(0)
    )
    mean = np.abs(scanned.mean()) if scanned.signed else scanned.mean()
    bounded = ~np.isnan(found.upper)
    assert guessed or (found.upper[bounded] >= mean[bounded]).all()
    assert not (bounded & known.any(0)).any()


@pytest.mark.parametrize("name", ["none", "bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_a_scan(family, name):
    model = build(family, **FAMILIES[family])
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen=name, **HOW)
    same(found, shipsfast.scan(model, PROMPTS, **HOW), 3)
    sure = found.certificate
    assert sure.screen == (None if name == "none" else name) and sure.scored + sure.unscored == sure.heads
    assert found.record["screen"]["dtype"] == sure.screen and sure.chance <= 0.01
    if name == "float32":  # rounding as small as that rules out what is not close
        assert sure.unscored and sure.work["exact"] < 0.8 and sure.errors >= sure.drawn == 6


@pytest.mark.parametrize("unit", ["head", "kv_group"])
@pytest.mark.parametrize("k", [1, 4, "all"])
def test_any_k_of_either_unit(model, unit, k):
    scanned = shipsfast.scan(model, PROMPTS[:3], unit=unit, **HOW)
    k = scanned.mean().size if k == "all" else k
    found = shipsfast.top_heads(model, PROMPTS[:3], None, k, screen="bfloat16", unit=unit, **HOW)
    same(found, scanned, k, 1e-5)
    assert found.unit == unit and len(found.heads) == k


@pytest.mark.parametrize("metric", ["js", "total_variation", shipsfast.logit_diff(3, 5)])
@pytest.mark.parametrize("name", ["none", "bfloat16"])
def test_metrics_with_and_without_a_sign(model, scanned, metric, name):
    found = shipsfast.top_heads(model, PROMPTS, k=3, metric=metric, screen=name, **HOW)
    same(found, scanned.also[getattr(metric, "name", metric)], 3, 1e-5)
    assert found.certificate.by_root == (metric == "js" and name != "none")
    with pytest.raises(InputError, match="this search measured"):
        _ = found.kl


def test_a_metric_of_hidden_states_and_heads_behind_it(model):
    metric = shipsfast.projection(np.linspace(-1, 1, 32), 3, name="ramp")
    found = shipsfast.top_heads(model, PROMPTS, k=3, metric=metric, screen="bfloat16", **HOW)
    same(found, shipsfast.scan(model, PROMPTS, metric=metric, **HOW), 3, 1e-5)
    assert (found.scores[4:] == 0).all()  # they take no work


@pytest.mark.parametrize(
    "ablation", ["mean", shipsfast.Ablation("resample", prompts=[p[::-1] for p in PROMPTS], align="end")]
)
@pytest.mark.parametrize("name", ["none", "bfloat16"])
def test_ablations_that_take_other_prompts(model, ablation, name, races):
    """Rounds are of some of the prompts: means are of all of them, and pairs stay pairs."""
    found = shipsfast.top_heads(model, PROMPTS, k=3, ablation=ablation, screen=name, **HOW)
    same(found, shipsfast.scan(model, PROMPTS, ablation=ablation, **HOW), 3, 1e-5, guessed=True)


def test_one_prompt_some_heads_and_off_at_the_end(model):
    how = dict(heads=[(0, None), (2, None), (5, None)], at="end", **HOW)
    found = shipsfast.top_heads(model, PROMPTS[:1], k=2, screen="bfloat16", **how)
    same(found, shipsfast.scan(model, PROMPTS[:1], **how), 2, 1e-5)
    assert (
        found.certificate.heads == 12 and np.isnan(found.scores[1]).all() and np.isnan(found.upper[1]).all()
    )


def test_equal_heads_go_by_their_place():
    """Heads 1 and 2 of a layer are one and the same, so that which one is in the top k is a tie."""
    model = build("llama-mha", **FAMILIES["llama-gqa"])
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
                weight[16:24] = weight[8:16]
            attention.o_proj.weight[:, 16:24] = attention.o_proj.weight[:, 8:16]
    scanned = shipsfast.scan(model, PROMPTS, **HOW)
    order = scanned.top(32)
    tie = next(
        k
        for k in range(1, 12)
        if order[k - 1].layer == order[k].layer and abs(order[k - 1].score - order[k].score) < 1e-12
    )
    for name in ("none", "float32"):
        found = shipsfast.top_heads(model, PROMPTS, k=tie, screen=name, **HOW)
        assert {h[:2] for h in found.heads[:-1]} == {h[:2] for h in order[: tie - 1]}
        last = found.heads[-1]
        assert abs(last.score - order[tie].score) < 1e-12
        assert not np.isnan(found.scores[order[tie].layer, [1, 2]]).any()  # both were looked at


def test_a_screen_that_is_wrong_is_found_out(model, scanned, monkeypatch):
    def spoilt(*args):
        torch.manual_seed(1)
        model, anatomy = narrower_copy(*args)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model, anatomy

    plain = shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)
    monkeypatch.setattr(screen, "narrower_copy", spoilt)
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)
    same(found, scanned, 3, 1e-5)
    assert found.certificate.scored > plain.certificate.scored and found.certificate.extra
    assert found.certificate.error_sd > 10 * plain.certificate.error_sd


def test_a_head_drawn_at_random_that_the_screen_had_ruled_out(model, scanned, monkeypatch):
    """The screen has no score for the first head but 0: where it is drawn, all heads are scored."""
    best, keep = scanned.top(1)[0][:2], Stage.keep

    def without(self, scores, reads, block):
        if self.room == "screen":
            scores = np.where([[tuple(unit) == best] for unit in block], 0.0, scores)
        keep(self, scores, reads, block)

    monkeypatch.setattr(Stage, "keep", without)
    monkeypatch.setattr(top_heads, "drawn", lambda usable, count, seed: [best, (1, 1), (2, 2), (6, 1)])
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)
    same(found, scanned, 3, 1e-5)
    assert found.heads[0][:2] == best and found.certificate.contradicted and not found.certificate.unscored


def test_a_screened_score_that_is_no_number(model, scanned, monkeypatch):
    bad, keep = scanned.top(2)[1][:2], Stage.keep

    def spoilt(self, scores, reads, block):
        if self.room == "screen":
            scores = np.where([[tuple(unit) == bad] for unit in block], np.nan, scores)
        keep(self, scores, reads, block)

    monkeypatch.setattr(Stage, "keep", spoilt)
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)
    same(found, scanned, 3, 1e-5)
    assert np.isnan(found.screened[bad]) and found.marked is None


def test_what_auto_takes(model, monkeypatch):
    def chosen(model, k=1, **how):
        found = shipsfast.top_heads(model, PROMPTS[:2], k=k, **how, **HOW)
        return found.record["screen"]["dtype"], found.record["screen"]["why"]

    monkeypatch.setattr(screen, "products_dtype", lambda dtype: dtype)
    assert chosen(model) == ("bfloat16", "products in bfloat16 are faster on this CPU, as measured")
    assert chosen(model, error=0) == (None, "error=0 leaves nothing to chance")
    assert chosen(model, k=20) == (
        None,
        "with one, 30 of 32 heads would still be scored exactly, and nothing saved",
    )
    assert "may be used" in chosen(model, max_memory=100_000)[1]
    monkeypatch.setattr(screen, "products_dtype", lambda dtype: torch.float32)
    assert chosen(model) == (None, "products in bfloat16 are no faster on this CPU, as measured")
    wide = build("llama-gqa", **FAMILIES["llama-gqa"])
    assert chosen(wide) == ("float32", "the model is in float64")
    assert chosen(copy.deepcopy(model).bfloat16()) == (None, "the model is in bfloat16 itself")
    with pytest.raises(InputError, match="float32 is no narrower; use screen='none' or 'auto'"):
        chosen(model, screen="float32")
    with pytest.raises(InputError, match="a copy in bfloat16 takes .* may be used"):
        chosen(model, screen="bfloat16", max_memory=100_000)


def test_a_copy_that_does_not_run(model, scanned, monkeypatch, capsys, tmp_path):
    def failing(*args):
        raise RuntimeError("expected scalar type Float\nbut found BFloat16")

    monkeypatch.setattr(screen, "products_dtype", lambda dtype: dtype)
    monkeypatch.setattr(screen, "narrower_copy", failing)
    found = shipsfast.top_heads(model, PROMPTS, k=3, out=tmp_path / "run", **HOW)
    same(found, scanned, 3, 1e-5)
    assert found.record["screen"] == {
        "dtype": None,
        "why": "a copy in bfloat16 does not run: expected scalar type Float",
    }
    assert "no screen: the copy in bfloat16 does not run" in capsys.readouterr().err
    with pytest.raises(InputError, match="screen 'bfloat16' .* cannot run: expected scalar type Float; use"):
        shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)


@pytest.mark.parametrize("killed", [False, True])
def test_a_copy_that_fails_in_a_later_round_leaves_nothing(model, monkeypatch, tmp_path, killed):
    prompts = [[3 + (7 * i + j) % 50 for j in range(4 + i % 5)] for i in range(40)]
    how = dict(k=2, error=0.3, progress=False, rescored=4, out=tmp_path / "run")
    monkeypatch.setattr(screen, "products_dtype", lambda dtype: dtype)
    monkeypatch.setattr(top_heads, "chosen_ends", lambda *_: [20, 40])
    own, kill = SearchStore.run, [killed]

    def run(self, whole, room, number, *args):
        if room == SCREEN and number == 1:
            raise RuntimeError("no kernel for this")
        if room == SCORES and kill and kill.pop():
            raise KeyboardInterrupt
        return own(self, whole, room, number, *args)

    monkeypatch.setattr(SearchStore, "run", run)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            shipsfast.top_heads(model, prompts, **how)
    found = shipsfast.top_heads(model, prompts, **how)
    assert found.record["screen"]["dtype"] is None and "no kernel" in found.record["screen"]["why"]
    assert np.isnan(found.screened).all() and not list((tmp_path / "run" / SCREEN).glob("part-*"))
    assert shipsfast.load(tmp_path / "run") == found and verify(tmp_path / "run")["verdict"] == "sound"
    assert [each[:2] for each in found.heads] == [
        each[:2] for each in shipsfast.scan(model, prompts, progress=False).top(2)
    ]


def test_the_copy_keeps_what_a_checkpoint_does_not_have(model):
    anatomy = inspect_model(model, PROMPTS[0], 8)
    narrow, own = narrower_copy(model, anatomy, torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16} and model.dtype == torch.float32
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32
    assert own.layers[0].module is narrow.model.layers[0]
    tied = build("gpt2")
    twin, _ = narrower_copy(tied, inspect_model(tied, PROMPTS[0], 8), torch.float32)
    assert twin.lm_head.weight is twin.transformer.wte.weight


@pytest.mark.parametrize("name", ["none", "bfloat16"])
def test_heads_drop_out_on_the_way(model, scanned, name, races):
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen=name, **HOW)
    same(found, scanned, 3, 1e-5, guessed=True)
    sure, by_prompt = found.certificate, ~np.isnan(found.stored["scores" if name == "none" else "screen"])
    order = np.random.default_rng(0).permutation(8)
    seen = by_prompt[order].reshape(8, -1)
    assert seen[:2].all() and seen.sum(1).tolist() == [32] * 2 + [16] * 3 + [8] * 3
    assert (seen[1:] <= seen[:-1]).all()  # who is out stays out
    assert (
        sure.rounds == (2, 5, 8)
        and sure.dropped == 24
        and sure.work["exact" if name == "none" else "screen"] < 0.8
    )
    assert sure.race_allowed == (0.01 if name == "none" else 0.005) and sure.chance <= 0.01
    assert (
        "24 heads dropped after 2, 5 of 8" in sure.text() and "bound: a guess. It is made up." in sure.text()
    )
    if name == "none":
        assert sure.scored == 8 and np.isnan(found.scores).sum() == 24 and sure.chance == 0.01


def test_marked_heads_do_not_race(model, scanned, races, monkeypatch):
    """A head without a mean is in no ranking: the others' heads are those of a scan that marks it too."""
    bad, keep = scanned.top(2)[1][:2], Stage.keep

    def spoilt(self, scores, reads, block):
        scores = np.where([[tuple(unit) == bad] for unit in block], np.nan, scores)
        keep(self, scores, reads, block)

    monkeypatch.setattr(Stage, "keep", spoilt)
    for name in ("none", "bfloat16"):
        found = shipsfast.top_heads(model, PROMPTS, k=3, screen=name, nonfinite="mark", **HOW)
        assert [h[:2] for h in found.heads] == [h[:2] for h in scanned.top(4) if h[:2] != bad]
        assert found.certificate.left_out == 1 and found.marks()["heads"] == [list(bad)]
        assert "1 head left out: a score of theirs is not finite" in found.certificate.text()


@pytest.mark.parametrize("name", ["none", "bfloat16", "bfloat16-and-nan"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(model, scanned, name, races, tmp_path, monkeypatch):
    """After each of its parts, in every stage; with a score of the second round that is not a number as well."""
    name, _, spoilt = name.partition("-")
    bad, prompt, keep = scanned.top(1)[0][:2], int(np.random.default_rng(0).permutation(8)[3]), Stage.keep

    def spoil(self, scores, reads, block):
        if self.room == "screen":
            hit = [[tuple(u) == bad and self.prompts[read] == prompt for read in reads] for u in block]
            scores = np.where(hit, np.nan, scores)
        keep(self, scores, reads, block)

    if spoilt:
        monkeypatch.setattr(Stage, "keep", spoil)
    how = dict(k=3, screen=name, rows_per_block=16, **HOW)
    whole = shipsfast.top_heads(model, PROMPTS, out=tmp_path / "whole", **how)
    assert whole == shipsfast.top_heads(model, PROMPTS, **how) == shipsfast.load(tmp_path / "whole")
    parts = len(list((tmp_path / "whole").rglob("part-*.parquet")))
    write = RunFolder.write_parts
    for last in range(0, parts, 2):
        left = [last]

        def cut(self, *args, left=left, **more):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(self, *args, **more)

        out = tmp_path / f"cut {last}"
        monkeypatch.setattr(RunFolder, "write_parts", cut)
        with pytest.raises(KeyboardInterrupt):
            shipsfast.top_heads(model, PROMPTS, out=out, **how)
        monkeypatch.setattr(RunFolder, "write_parts", write)
        with pytest.raises(InputError, match="a search that is not finished"):
            shipsfast.load(out)
        assert verify(out)["verdict"] == "unfinished"
        assert shipsfast.top_heads(model, PROMPTS, out=out, **how) == whole == shipsfast.load(out)
        assert verify(out)["verdict"] == "sound"
        assert len(list(out.rglob("part-*.parquet"))) == parts


def test_a_folder_of_another_search(model, tmp_path):
    how = dict(k=2, screen="bfloat16", **HOW)
    first = shipsfast.top_heads(model, PROMPTS[:2], out=tmp_path / "run", **how)
    assert shipsfast.top_heads(model, PROMPTS[:2], out=tmp_path / "run", **how) == first
    for other in (
        dict(k=3),
        dict(error=0.1),
        dict(screen="none"),
        dict(seed=1),
        dict(metric="js"),
        dict(ablation="zero"),
    ):
        with pytest.raises(InputError, match=f"holds another run .different {next(iter(other))}"):
            shipsfast.top_heads(model, PROMPTS[:2], out=tmp_path / "run", **how | other)
    with pytest.raises(InputError, match="different prompts"):
        shipsfast.top_heads(model, PROMPTS[1:3], out=tmp_path / "run", **how)
    with pytest.raises(InputError, match="different kind"):
        shipsfast.scan(model, PROMPTS[:2], out=tmp_path / "run", **HOW)
    place = first.save(tmp_path / "saved")
    assert shipsfast.TopHeads.load(place) == first and verify(place)["verdict"] == "sound"
    first.save(tmp_path / "saved")
    assert shipsfast.load(place) == first and verify(place)["verdict"] == "sound"


REFUSED = [
    (dict(k=33), "k=33 is above the 32 heads to choose from: lower it"),
    (dict(k=9, heads=[(0, None)]), "k=9 is above the 4 heads"),
    (dict(k=0), "k must be a whole number of at least 1"),
    (dict(error=0.6), "error must be a chance from 0 to 0.5, got 0.6"),
    (dict(error=float("nan")), "error must be a chance"),
    (dict(error=True), "error must be a chance"),
    (dict(screen="int8"), "unknown screen 'int8'"),
    (dict(screen="bfloat16", error=0), "error=0 allows none"),
    (dict(metric=["kl", "js"]), "goes by one metric, and 2 were given"),
    (dict(metric=lambda base, out, at: out[:, 0]), "sees all prompts at once"),
    (dict(metric="log_prob"), "of an answer's own tokens"),
    (dict(nonfinite="skip"), "unknown nonfinite"),
    (dict(ablation=["zero", "mean"]), "2 ablations were given"),
    (dict(at=-2), "only scans of the next token read other positions"),
    (dict(seed=-1), "seed must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_is_refused(model, how, said):
    with pytest.raises(InputError, match=said):
        shipsfast.top_heads(model, PROMPTS, **dict(k=2, **HOW) | how)


def test_rounds_are_cut_where_that_saves_work(model):
    """Prompts that are all the same but for their last token cost as much in each round as all together."""
    from shipsfast.scans.prepare import prepare
    from shipsfast.scans.top_measurement import TopMeasurement

    def ends(prompts):
        execution = shipsfast.top_heads.execution(**HOW)
        prepared = prepare(model, None, TopMeasurement(prompts=prompts), execution)
        return top_rounds.chosen_ends(prepared, 3, list(range(len(prompts))))

    shared = list(range(5, 45))
    assert ends([[*shared, last] for last in range(8)]) == [8]
    assert ends([[3, 4]]) == [1]


def test_the_copy_is_gone_before_the_finish(model, monkeypatch):
    """Memory that it takes is for exact scores then."""
    copies, gone, keep = [], [], Stage.keep

    def made(*args):
        found = narrower_copy(*args)
        copies.append(weakref.ref(found[0].model.layers[0].mlp.up_proj.weight))
        return found

    def look(self, *args):
        if self.room == "scores":
            gone.append(copies[0]() is None)
        keep(self, *args)

    monkeypatch.setattr(screen, "narrower_copy", made)
    monkeypatch.setattr(Stage, "keep", look)
    gc.disable()
    try:
        shipsfast.top_heads(model, PROMPTS, k=3, screen="bfloat16", **HOW)
    finally:
        gc.enable()
    assert gone and all(gone)


@pytest.mark.parametrize("name", ["none", "bfloat16"])
def test_an_ablation_that_overflows_ends_the_search_or_is_marked(name, races, tmp_path):
    model, how = overflowing(), dict(k=3, ablation="zero", screen=name, out=tmp_path / "run", **HOW)
    order = np.random.default_rng(0).permutation(8)
    first = min(order[: 2 if name == "none" else 8].tolist(), key=lambda at: PROMPTS[at])  # of the first pack
    with pytest.raises(
        InputError, match=f"the score of head 1-2 on prompt {first} is not a number.*overflow float32"
    ):
        shipsfast.top_heads(model, PROMPTS, **how)
    found = shipsfast.top_heads(model, PROMPTS, nonfinite="mark", **how)
    scanned = shipsfast.scan(model, PROMPTS, ablation="zero", nonfinite="mark", **HOW)
    assert [h[:2] for h in found.heads] == [h[:2] for h in scanned.top(3)]
    assert found.marks()["heads"] == [[1, 2]] and found.marks()["first"]["prompt"] == first
    assert "1 head left out" in found.certificate.text() and verify(tmp_path / "run")["verdict"] == "sound"
    assert (
        shipsfast.load(tmp_path / "run")
        == found
        == shipsfast.top_heads(model, PROMPTS, nonfinite="mark", **how)
    )
    with pytest.raises(InputError, match="holds .* marked scores?: the score of head 1-2"):
        shipsfast.top_heads(model, PROMPTS, **how)
    assert "scores not finite" in " ".join(t.get_text() for axes in found.plot().axes for t in axes.texts)


def test_without_scores_that_are_computed_again(model, tmp_path):
    found = shipsfast.top_heads(
        model, PROMPTS[:3], k=2, screen="bfloat16", rescored=0, out=tmp_path / "run", **HOW
    )
    assert found.error.reason == "none was asked for (rescored=0)" and found.noise_floor >= 0
    assert found == shipsfast.load(tmp_path / "run")


def test_all_of_a_certificate_is_checked(model, tmp_path):
    found = shipsfast.top_heads(model, PROMPTS[:3], k=2, screen="bfloat16", **HOW)
    assert CERTIFICATE.keys() == found.certificate.to_json().keys()
    assert Certificate.from_json(json.loads(json.dumps(found.certificate.to_json()))) == found.certificate
    found.save(tmp_path / "run")
    for name, value in (
        ("certificate", {}),
        ("upper", [[1.0]]),
        ("rows", {"scores": -1, "screen": 0}),
        ("round_ends", [2, 1]),
    ):
        out = shutil.copytree(tmp_path / "run", tmp_path / name)
        edit(out, lambda manifest, name=name, value=value: manifest.update({name: value}))
        with pytest.raises(InputError, match=f"run.json is damaged: {name}"):
            shipsfast.load(out)


def test_intervals_are_of_exact_means_and_ranks_of_all_heads(model, capsys):
    found = shipsfast.top_heads(model, PROMPTS, k=3, screen="float16", **HOW)
    found.show()
    shown = capsys.readouterr().out
    assert "Top 3 of 32 heads: KL(base || ablated)" in shown and found.certificate.text() in shown
    low, high = found.intervals()
    known = ~np.isnan(found.scores)
    assert (
        found.certificate.unscored
        and (low[known] <= found.scores[known]).all()
        and (high[known] >= low[known]).all()
    )
    assert np.isnan(low[~known]).all()
    with pytest.raises(InputError, match="have no exact score: shipsfast.scan has them all"):
        found.stability()
    assert "not_known" in found.as_json(3)["stability"]
    every = shipsfast.top_heads(model, PROMPTS, k=3, screen="none", error=0, **HOW)
    assert every.stability().k == 3 and every.certificate.chance == 0
    frame = found.to_pandas()
    assert (
        len(frame) == 32 and frame["rank"].notna().sum() == 3 and frame["upper"].isna().sum() == known.sum()
    )


def test_every_step_goes_on_as_it_was_cut(model, races, tmp_path, monkeypatch):
    """With more memory than before: blocks of another size would round otherwise."""
    how = dict(k=3, screen="bfloat16", out=tmp_path / "run", **HOW)
    write, kept = RunFolder.write_parts, []

    def cut(self, *args, **more):
        if kept:
            raise KeyboardInterrupt
        write(self, *args, **more)
        kept.append(json.loads((tmp_path / "run" / "run.json").read_text())["plans"])

    monkeypatch.setattr(RunFolder, "write_parts", cut)
    with monkeypatch.context() as less:
        less.setattr("shipsfast.engine.memory_plan.free_bytes", lambda device: 90_000)
        with pytest.raises(KeyboardInterrupt):
            shipsfast.top_heads(model, PROMPTS, **how)
    monkeypatch.setattr(RunFolder, "write_parts", write)

    def size(plans):
        return [plans["screen 0"][name] for name in ("rows_per_block", "chunk_tokens", "head_rows")]

    fresh = size(shipsfast.top_heads(model, PROMPTS, **how | {"out": None}).record["plans"])
    found = size(shipsfast.top_heads(model, PROMPTS, **how).record["plans"])
    assert found == size(kept[-1]) != fresh
