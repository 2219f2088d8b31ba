"""Several ablations, and several eps, in one scan: each is what a scan of it alone gives."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.engine.ablation import Ablation, as_ablations, passes_of
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.engine.measurement import ScanExecution
from shipsfast.errors import InputError
from shipsfast.ops.extension import extension_status
from shipsfast.runs.verify import verify
from shipsfast.scans.measurements import ShipsMeasurement
from shipsfast.scans.prepare import prepare_passes
from tests.support.manifests import edit
from tests.support.models import HEADS, LAYERS, brute_force, build
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [3, 8, 40, 41], SHARED + [7], SHARED + [3, 8, 11, 50, 51, 52, 9, 4, 1], SHARED]
OTHERS = [[*reversed(ids)] for ids in PROMPTS]
KINDS = [
    "undifferentiated", "uniform", "scale", "zero", "head_mean_q", "head_mean_k", "head_mean_v", "mean",
]  # fmt: skip
WITH_TWINS = [*KINDS, Ablation("resample", prompts=OTHERS), Ablation("mean", prompts=[[1, 2, 3, 4, 5]])]
HOW = dict(metric=["kl", "js"], rows_per_block=7, prompts_per_group=2)
TWO_PASSES = ["zero", "undifferentiated", Ablation("zero", at="end")]
needs_extension = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)


def scan(model, ablation, prompts=PROMPTS, **how):
    return shipsfast.scan(model, prompts, ablation=ablation, progress=False, **how)


def check_each(model, ablations, **how):
    found = scan(model, ablations, **how)
    assert len(found.by_ablation) == len(ablations)
    for asked, one in zip(ablations, found.by_ablation.values(), strict=True):
        alone = scan(model, asked, **(how if isinstance(asked, str) else how | {"scale": 1e-5}))
        assert alone.kl.max() > 1e-5
        np.testing.assert_allclose(one.kl, alone.kl, rtol=0, atol=1e-12)
        assert {k: x for k, x in one.identity.items() if k != "further_ablations"} == alone.identity
        assert one.record["ablation"] == alone.record["ablation"]
        assert one.record["layers"] == alone.record["layers"]
        assert one.error.rescored and one.record["spot_check_max_abs"] < 1e-6
    return found


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "gpt2", "qwen3-qknorm"])
def test_every_kind_through_the_models_own_layers(family):
    check_each(build(family), WITH_TWINS, layers="model", scale=0.3)


@needs_extension
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "qwen3-qknorm"])
def test_every_kind_through_fused_layers(family):
    check_each(build(family), WITH_TWINS, layers="fused", scale=0.3)


@needs_extension
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window"])
def test_float32_is_close_to_float64(family):
    """Within 1e-5 nats plus 1e-4 of a score, as of scans of one ablation."""
    prompts = [SHARED + list(range(24, 24 + n)) for n in (20, 24, 30)]  # long enough for gate and up by rank
    found = scan(build(family).float(), KINDS, prompts, layers="fused", scale=0.3)
    for kind, one in found.by_ablation.items():
        exact = scan(build(family), kind, prompts, layers="model", scale=0.3).kl
        np.testing.assert_allclose(one.kl, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "bamba", "mixtral"])
def test_sinks_mixtures_and_hybrids(family):
    check_each(tiny_model(family), ["undifferentiated", "mean", "zero"], prompts=[ids[:9] for ids in PROMPTS])


@pytest.mark.parametrize(
    "how",
    [dict(rows_per_block=5), dict(rows_per_block=1), dict(chunk_tokens=20, prompts_per_group=3), dict(unit="kv_group")],
    ids=["5-rows", "1-row", "chunks", "groups"],
)  # fmt: skip
def test_however_it_is_cut(how):
    """Blocks of 5 rows end between the ablations of one head."""
    check_each(build(), ["zero", "undifferentiated", "mean"], **how)


def test_against_brute_force():
    model = build("mistral-window")
    found = scan(model, ["undifferentiated", "zero", "scale"], scale=0.3)
    for kind, one in found.by_ablation.items():
        expected = brute_force(model, PROMPTS, kind, 0.3)
        np.testing.assert_allclose(one.kl, expected.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_at_the_end_and_at_every_position(family):
    """Those at the end go through in a pass of their own."""
    ablations = [
        "zero",
        Ablation("zero", at="end"),
        Ablation("undifferentiated", at="end"),
        "undifferentiated",
    ]
    found = check_each(build(family), ablations)
    assert list(found.by_ablation) == [
        "zero", "zero (at the end only)", "undifferentiated (eps 1e-05, at the end only)", "undifferentiated (eps 1e-05)"
    ]  # fmt: skip


def test_answers_and_metrics():
    answers = [[3, 4], [5], [6, 7, 8], [9]]
    how = dict(metric=["kl", "log_prob_diff", "js"], answers=answers)
    model = build()
    found = scan(model, ["zero", "mean"], **how)
    for kind, one in found.by_ablation.items():
        alone = scan(model, kind, **how)
        for name, other in {"kl": alone, **alone.also}.items():
            got = one if name == "kl" else one.also[name]
            np.testing.assert_allclose(got.scores, other.scores, rtol=0, atol=1e-12)
            for a, b in zip(got.by_token, other.by_token, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert list(found.also["js"].by_ablation) == ["zero", "mean"]
    assert found.also["js"].agreement(3)[0].heads == LAYERS * HEADS


def test_with_control_prompts(tmp_path):
    model, ordinary, out = build(), [ids[::-1] for ids in PROMPTS[:3]], tmp_path / "run"
    found = scan(model, TWO_PASSES[:2] + ["mean"], control=ordinary, out=out)
    for name, one in found.by_ablation.items():
        alone = scan(model, name, control=ordinary)
        np.testing.assert_allclose(one.kl, alone.kl, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.control.kl, alone.control.kl, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.contrast().difference, alone.contrast().difference, rtol=0, atol=1e-12)
    assert list(found.control.by_ablation) == ["zero", "undifferentiated", "mean"]
    assert verify(out)["verdict"] == "sound"
    assert shipsfast.load(out) == found
    assert scan(model, TWO_PASSES[:2] + ["mean"], control=ordinary, out=out) == found


@pytest.mark.parametrize("layers", ["model", pytest.param("fused", marks=needs_extension)])
def test_metrics_of_hidden_states(layers):
    """Heads behind the layer that is read cost nothing, by no ablation."""
    vector = np.random.default_rng(0).normal(size=32)
    model, read = build(), shipsfast.projection(vector, 1)
    for metric in (read, [read, "kl"]):
        found = scan(model, ["zero", "mean"], metric=metric, layers=layers)
        for kind, one in found.by_ablation.items():
            alone = scan(model, kind, metric=metric, layers=layers)
            np.testing.assert_allclose(one.scores, alone.scores, rtol=0, atol=1e-12)
            assert abs(one.scores[:, :2]).max() > 1e-5 and (one.scores[:, 2] == 0).all()


def test_a_metric_that_sees_all_prompts():
    def spread(base, ablated, prompt):
        return (ablated - base[prompt]).abs().amax(-1) + base.mean()

    model = build()
    found = scan(model, ["zero", "mean", Ablation("zero", at="end")], metric=spread)
    for asked, one in zip(
        ["zero", "mean", Ablation("zero", at="end")], found.by_ablation.values(), strict=True
    ):
        np.testing.assert_allclose(one.scores, scan(model, asked, metric=spread).scores, rtol=0, atol=1e-12)


def test_the_unablated_row_passes_once_for_all(monkeypatch):
    rows, real = [], GrowingBatch.run
    monkeypatch.setattr(
        GrowingBatch, "run", lambda self, mask, *a, **k: rows.append(len(mask)) or real(self, mask, *a, **k)
    )
    scan(build(), ["zero", "mean", "undifferentiated"])
    assert rows == [1 + 3 * LAYERS * HEADS]


def test_the_memory_plan_knows_of_them():
    """Rows, and in fused layers the base row's heads, off by each ablation."""
    model, prompts = build().float(), [list(range(3, 50))]
    one, three = (
        prepare_passes(model, None, ShipsMeasurement(prompts=prompts, ablation=kinds), ScanExecution())[0]
        for kinds in (["zero"], ["zero", "mean", "uniform"])
    )
    assert (len(one.rows), len(three.rows)) == (LAYERS * HEADS, 3 * LAYERS * HEADS)
    assert three.plan.rows_per_block == 3 * one.plan.rows_per_block
    if three.fused:
        more = three.plan.needs.held.per_token_bytes - one.plan.needs.held.per_token_bytes
        assert more == 2 * 2 * HEADS * 8 * 4
    tight = ScanExecution(max_memory=300_000)
    about = ShipsMeasurement(prompts=prompts, ablation=["zero", "mean", "uniform"])
    cut = prepare_passes(model, None, about, tight)[0].plan
    assert cut.rows_per_block < 3 * LAYERS * HEADS and cut.predicted_bytes <= 300_000


def test_dose_and_grid():
    model, scales = build(), [1e-5, 0.5, 0.1]
    found = scan(model, "scale", scale=scales)
    assert found.dose.shape == (3, LAYERS, HEADS) and found.scales.tolist() == scales
    for eps, mean in zip(scales, found.dose, strict=True):
        np.testing.assert_allclose(mean, scan(model, "scale", scale=eps).mean(), rtol=0, atol=1e-12)
    grid = scan(model, ["undifferentiated", "scale", "zero"], scale=np.array([0.5, 0.1]))
    assert list(grid.by_ablation) == [
        "undifferentiated (eps 0.5)", "undifferentiated (eps 0.1)", "scale (eps 0.5)", "scale (eps 0.1)", "zero"
    ]  # fmt: skip
    assert set(grid.doses) == {"undifferentiated", "scale"}
    with pytest.raises(InputError, match="undifferentiated and scale were scanned at several eps"):
        _ = grid.dose
    ends = [Ablation("scale", eps, at=at) for eps in (0.5, 0.1) for at in ("all", "end")]
    apart = scan(model, ends).doses
    assert list(apart) == ["scale", "scale at the end"]
    assert all(dose.scales.tolist() == [0.5, 0.1] for dose in apart.values())


def test_sink_mass_is_in_the_record():
    model = build()
    found = scan(model, ["zero", "mean"])
    np.testing.assert_allclose(found.sink_mass.first_token, shipsfast.sink_mass(model, PROMPTS).first_token)
    assert scan(model, "zero").sink_mass is None


@pytest.mark.parametrize(
    ("ablation", "scale", "words"),
    [
        ([], 1e-5, "there are no ablations or no scales"),
        ("zero", [], "there are no ablations or no scales"),
        (["zero", "zero"], 1e-5, "ablation zero is given twice"),
        ("scale", [0.5, 0.5], r"ablation scale \(eps 0.5\) is given twice"),
        (["zero", "mean"], [0.1, 0.2], "zero and mean have no eps"),
        (["zero", "none"], 1e-5, "unknown ablation 'none'"),
        (Ablation("scale", 0.3), [0.1, 0.2], "the ablation has scale 0.3"),
        ("scale", [0.1, "x"], "scale must be a number"),
    ],
)
def test_refused(ablation, scale, words):
    with pytest.raises(InputError, match=words):
        scan(build(), ablation, scale=scale)


@pytest.mark.parametrize("other", [shipsfast.scan_dataset, shipsfast.sahara])
def test_other_scans_take_one(other):
    with pytest.raises(
        InputError, match="2 ablations were given .*only scans of the next token take several"
    ):
        other(build(), PROMPTS, ablation=["zero", "mean"], progress=False)


def test_a_list_of_one_is_one():
    model = build()
    found = scan(model, ["zero"], scale=[0.5])
    assert not found.further and "further_ablations" not in found.identity
    assert found == scan(model, "zero")


def test_which_go_through_together():
    ablations = as_ablations(
        ["zero", "mean", Ablation("resample", prompts=OTHERS), Ablation("zero", at="end"), "uniform",
         Ablation("mean", prompts=OTHERS), Ablation("mean", at="end")]
    )  # fmt: skip
    assert passes_of(ablations) == [[0, 1, 4], [2], [3, 6], [5]]
    assert passes_of([Ablation("resample", prompts=OTHERS), Ablation("zero")]) == [[0], [1]]


def test_as_json_and_back():
    about = ShipsMeasurement(prompts=PROMPTS, ablation=["zero", Ablation("mean", prompts=OTHERS)], at="end")
    assert [how.at for how in about.ablations] == ["end", "end"]
    assert ShipsMeasurement.from_json(json.loads(json.dumps(about.to_json()))) == about


def numbers(folder) -> list[np.ndarray]:
    found = shipsfast.load(folder)
    return [x.scores for one in found.by_ablation.values() for x in (one, *one.also.values())]


def test_run_folder(tmp_path, monkeypatch):
    model, out = build(), tmp_path / "run"
    found = scan(model, TWO_PASSES, out=out, **HOW)
    assert verify(out)["verdict"] == "sound"
    again = shipsfast.load(out)
    assert again == found and list(again.by_ablation) == list(found.by_ablation)
    assert shipsfast.load(out / "by_ablation" / "1").record["ablation"] == "undifferentiated (eps 1e-05)"
    assert (out / "by_ablation" / "2" / "also" / "1").is_dir()
    monkeypatch.setattr(GrowingBatch, "run", None)  # nothing is computed again
    assert scan(model, TWO_PASSES, out=out, **HOW) == found
    with pytest.raises(
        InputError,
        match="the further ablations there are undifferentiated with logits x 1e-05, zero with output x 0, heads off at the end only, here zero",
    ):
        scan(model, ["zero", Ablation("zero", at="end")], out=out, **HOW)
    with pytest.raises(InputError, match="different further_ablations"):
        scan(model, "zero", out=out, **HOW)


@pytest.mark.parametrize("lost", ["by_ablation/1", "by_ablation/2/also/1", "also/1"])
def test_a_lost_folder_is_measured_again(tmp_path, lost):
    import shutil

    model, out = build(), tmp_path / "run"
    scan(model, TWO_PASSES, out=out, **HOW)
    before = numbers(out)
    shutil.rmtree(out / lost)
    assert verify(out)["verdict"] == "damaged"
    scan(model, TWO_PASSES, out=out, **HOW)
    assert verify(out)["verdict"] == "sound"
    for one, other in zip(numbers(out), before, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_killed_run_ends_as_it_would_have(tmp_path, after):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    scan(build(), TWO_PASSES, out=whole, **HOW)
    child = os.fork()
    if child == 0:  # killed as by the system, at its first parts
        from shipsfast.runs.folder import RunFolder

        real, left = RunFolder.write_parts, [after]

        def write(self, *args, **how):
            real(self, *args, **how)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        RunFolder.write_parts = write
        scan(build(), TWO_PASSES, out=cut, **HOW)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert verify(cut)["verdict"] == "unfinished"
    assert shipsfast.load(cut).record["status"] == "running"
    scan(build(), TWO_PASSES, out=cut, **HOW)
    assert verify(cut)["verdict"] == "sound"
    for one, other in zip(numbers(cut), numbers(whole), strict=True):
        assert np.array_equal(one, other)


def test_each_pass_goes_on_as_it_was_cut(tmp_path, monkeypatch):
    """Passes have plans of their own."""
    scan(build(), TWO_PASSES, out=tmp_path, rescored=0)
    for folder in (tmp_path, *(tmp_path / "by_ablation").iterdir()):
        edit(folder, lambda m: m.update(status="running", parts=[]))
    edit(tmp_path / "by_ablation" / "2", lambda m: m["plan"].update(rows_per_block=5))
    found = scan(build(), TWO_PASSES, out=tmp_path, rescored=0).by_ablation.values()
    cut = [one.record["plan"]["rows_per_block"] for one in found]
    assert cut[2] == 5 and 5 not in cut[:2]


def test_marked_scores_are_marked_where_they_are():
    """An eps that overflows marks its own heads, and leaves the other ablation alone."""
    model = build().float()
    found = scan(model, ["zero", "scale"], scale=1e38, nonfinite="mark")
    assert found.marked is None and found.by_ablation["scale"].marked.any()
    np.testing.assert_allclose(found.kl, scan(model, "zero").kl, atol=1e-6)
    assert found.several.heads < LAYERS * HEADS
    with pytest.raises(InputError, match=r"with scale \(eps 1e\+38\)"):
        scan(model, ["zero", "scale"], scale=1e38)


def test_out_of_memory_halves_the_rows(monkeypatch):
    model, real = build(), GrowingBatch.run

    def run(self, mask, *args, **how):
        if len(mask) > 6:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, mask, *args, **how)

    expected = scan(model, ["zero", "mean"])
    monkeypatch.setattr(GrowingBatch, "run", run)
    found = scan(model, ["zero", "mean"])
    for one, other in zip(found.by_ablation.values(), expected.by_ablation.values(), strict=True):
        np.testing.assert_allclose(one.kl, other.kl, rtol=0, atol=1e-12)


def test_by_ablation_has_no_more_of_itself():
    found = scan(build(), ["zero", "mean"])
    assert not found.by_ablation["zero"].further
    assert found == replace(found) and "further" not in repr(found)


FOREIGN = {"another model's": {"model": 3}, "another ablation": {"ablation": ["zero", "uniform"]}, "other prompts": {"prompts": OTHERS}}  # fmt: skip


@pytest.mark.parametrize("inner", ["by_ablation/1", "also/1", "by_ablation/1/also/1"])
@pytest.mark.parametrize("other", FOREIGN)
def test_a_folder_of_another_run_inside_is_damage(tmp_path, inner, other):
    """Each is sound by itself, and no part of this run."""
    asked, how = FOREIGN[other], dict(metric=["kl", "js"], rescored=0)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    scan(build(), ["zero", "mean"], out=mine, **how)
    ablations, prompts = asked.get("ablation", ["zero", "mean"]), asked.get("prompts", PROMPTS)
    scan(build(seed=asked.get("model", 0)), ablations, prompts, out=theirs, **how)
    shutil.rmtree(mine / inner)
    shutil.copytree(theirs / inner, mine / inner)
    if other == "another ablation" and inner == "also/1":  # which is the same run
        assert verify(mine)["verdict"] == "sound"
        return
    assert verify(mine)["verdict"] == "damaged"
    with pytest.raises(InputError, match=f"{inner} is damaged: it is not the scan of further"):
        shipsfast.load(mine)


def test_folders_in_another_order_are_damage(tmp_path):
    scan(build(), ["zero", "mean", "uniform"], out=tmp_path, rescored=0)
    first, second = (tmp_path / "by_ablation" / name for name in "12")
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert verify(tmp_path)["verdict"] == "damaged"
    with pytest.raises(InputError, match="it is not the scan of further ablation 1"):
        shipsfast.load(tmp_path)


def test_contrasts_go_by_their_own_ablation_alone():
    """What else was scanned beside it does not matter; one prompt for all of `resample` is the same for both sets."""
    resample = Ablation("resample", prompts=[SHARED], align="end")
    found = scan(build(), ["zero", resample], control=OTHERS[:3], rescored=0)
    for asked, one in zip(["zero", resample], found.by_ablation.values(), strict=True):
        own, other = (scan(build(), asked, prompts, rescored=0) for prompts in (PROMPTS, OTHERS[:3]))
        assert np.array_equal(one.contrast().p, shipsfast.contrast(own, other).p)
        assert np.array_equal(one.contrast().auroc, shipsfast.contrast(own, other).auroc)
    alone = scan(build(), "zero", OTHERS[:3], rescored=0)
    assert np.array_equal(shipsfast.contrast(found, alone).auroc, found.contrast().auroc)
    with pytest.raises(InputError, match="on both sides, and these prompts are others"):
        another = Ablation("resample", prompts=[SHARED[::-1]], align="end")
        shipsfast.contrast(found.by_ablation["resample"], scan(build(), another, OTHERS[:3], rescored=0))


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_run_that_ends_with_its_first_manifests_can_go_on(tmp_path, monkeypatch, written):
    """Folders of further metrics and ablations are there before anything says whose they are."""
    from shipsfast.runs.folder import RunFolder

    class Ended(BaseException):
        pass

    real, left, out = RunFolder.write_manifest, [written], tmp_path / "run"

    def write(self, *args, **how):
        if not left[0]:
            raise Ended
        left[0] -= 1
        real(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_manifest", write)
        with pytest.raises(Ended):
            scan(build(), ["zero", "mean"], out=out, metric=["kl", "js"], rescored=0)
    assert (out / "by_ablation" / "1" / "also" / "1").is_dir()
    scan(build(), ["zero", "mean"], out=out, metric=["kl", "js"], rescored=0)
    assert verify(out)["verdict"] == "sound"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "by_ablation" / "1").mkdir(parents=True)
    (tmp_path / "by_ablation" / "1" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a shipsfast run"):
        scan(build(), ["zero", "mean"], out=tmp_path)
