"""`scan(control=...)`: two sets of prompts in one run."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

import shipsfast
from shipsfast import InputError
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.runs.verify import verify
from shipsfast.scans.measurements import ShipsMeasurement
from tests.support.metric_scans import killed_after
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
ORDINARY = [[21, 22, 23], [24, 25], [30, 31, 32], [40, 41]]
HEADS = [(0, 1), (1, 2), (2, 3)]


def scan(prompts=PROMPTS, control=ORDINARY, **options):
    options = {"heads": HEADS, "progress": False} | options
    return shipsfast.scan(build(), prompts, control=control, **options)


@pytest.mark.parametrize("options", [{}, {"metric": ["js", "kl"]}, {"unit": "kv_group", "heads": None}])
def test_both_are_scans_of_their_own(options):
    both = scan(**options)
    first, second = scan(control=None, **options), scan(ORDINARY, control=None, **options)
    assert first.control is None
    for got, want in ((both, first), (both.control, second)):
        np.testing.assert_array_equal(got.scores, want.scores)
        assert (
            got.metric == want.metric
            and got.noise_floor == want.noise_floor
            and list(got.also) == list(want.also)
        )
        assert got.record["error"] == want.record["error"]
    found, separate = both.contrast(permutations=99), shipsfast.contrast(first, second, permutations=99)
    assert found.columns.keys() == separate.columns.keys()
    for name, values in found.columns.items():
        np.testing.assert_array_equal(values, separate.columns[name], err_msg=name)


def test_a_mean_is_that_of_the_prompts_for_both():
    both = scan(ablation="mean")
    how = shipsfast.Ablation("mean", prompts=PROMPTS)
    np.testing.assert_array_equal(both.control.scores, scan(ORDINARY, control=None, ablation=how).scores)
    assert (
        np.abs(both.control.scores - scan(ORDINARY, control=None, ablation="mean").scores)[
            ~np.isnan(both.control.scores)
        ].max()
        > 1e-6
    )
    both.contrast()
    with pytest.raises(InputError, match="differ in ablation"):
        shipsfast.contrast(both, scan(ORDINARY, control=None, ablation="mean"))


def test_run_folder(tmp_path, monkeypatch):
    out = tmp_path / "run"
    whole = scan(metric=["kl", "js"], out=out)
    assert verify(out)["verdict"] == "sound" and verify(out)["rows"] == 2 * len(HEADS) * 7
    manifests = [json.loads((out / place / "run.json").read_text()) for place in ("", "control")]
    assert manifests[0]["identity"]["control"]["prompts"] == manifests[1]["identity"]["prompts"]
    assert "control" not in manifests[1]["identity"]
    assert shipsfast.load(out) == whole and shipsfast.load(out).control == whole.control
    assert shipsfast.load(out / "control") == whole.control
    assert shipsfast.contrast(out) == whole.contrast() == shipsfast.contrast(out, out / "control")
    monkeypatch.setattr(GrowingBatch, "run", None)  # nothing is computed again
    again = scan(metric=["kl", "js"], out=out)
    assert again == whole and again.control == whole.control and list(again.control.also) == ["js"]
    with pytest.raises(InputError, match="different control.*: there is a control there only"):
        scan(metric=["kl", "js"], out=out, control=None)
    with pytest.raises(InputError, match="different control.*: the control prompts are others"):
        scan(metric=["kl", "js"], out=out, control=ORDINARY[::-1])
    monkeypatch.undo()
    scan(out=tmp_path / "without", control=None)
    with pytest.raises(InputError, match="different control.*: there is a control here only"):
        scan(out=tmp_path / "without")


@pytest.mark.parametrize("passes", [1, 3, 5])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, passes):
    """In the prompts, before the control and within it: to the same bits."""
    out, options = tmp_path / "run", {"rows_per_block": 1, "rescored": 0}
    killed_after(monkeypatch, passes)
    with pytest.raises(KeyboardInterrupt):
        scan(out=out, **options)
    report = verify(out)
    assert report["verdict"] == "unfinished" and report["status"] == "running"
    partial = shipsfast.load(out)
    known = (0 if partial.control is None else int(np.isfinite(partial.control.scores).sum())) // len(
        ORDINARY
    )
    assert (int(np.isfinite(partial.scores).sum()) // len(PROMPTS), known) == (
        min(passes, 3),
        max(0, passes - 3),
    )
    assert (partial.control is None) == (passes < 3)
    with pytest.raises(InputError, match="is not finished|has no control"):
        shipsfast.contrast(out)
    assert "not_known" in partial.as_json(3).get("contrast", {"not_known": ""})
    whole = scan(out=out, **options)
    assert verify(out)["verdict"] == "sound"
    alone = scan(**options)
    for got, want in ((whole, alone), (whole.control, alone.control)):
        np.testing.assert_array_equal(got.scores, want.scores)


def test_what_is_lost_or_wrong_of_the_control(tmp_path):
    out = tmp_path / "run"
    whole = scan(out=out)
    shutil.move(out / "control", tmp_path / "kept")
    (problem,) = verify(out)["problems"]
    assert problem["what"] == "is missing: the scan of the control prompts"
    with pytest.raises(InputError, match="is not a shipsfast run"):
        shipsfast.load(out)
    assert scan(out=out) == whole and verify(out)["verdict"] == "sound"
    shutil.rmtree(out / "control")
    (out / "control").symlink_to(tmp_path / "kept")
    assert [p["what"] for p in verify(out)["problems"]] == ["is a link, which a run never makes"]
    with pytest.raises(InputError, match="control"):
        shipsfast.load(out)
    with pytest.raises(InputError, match="is a link"):
        scan(out=out)
    (out / "control").unlink()
    scan(PROMPTS[::-1], control=None, out=out / "control")
    with pytest.raises(InputError, match="is damaged: it is not the scan of the control prompts"):
        shipsfast.load(out)
    with pytest.raises(InputError, match="in the control prompts: .* holds another run"):
        scan(out=out)
    (problem,) = verify(out)["problems"]
    assert (
        problem["path"] == str(out / "control")
        and problem["what"] == "is not the scan of the control prompts"
    )


def test_a_control_of_another_model_is_damage(tmp_path):
    """Of the same prompts, and sound by itself."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    scan(out=mine)
    shipsfast.scan(build(seed=5), PROMPTS, control=ORDINARY, heads=HEADS, progress=False, out=theirs)
    shutil.rmtree(mine / "control")
    shutil.copytree(theirs / "control", mine / "control")
    assert verify(mine)["verdict"] == "damaged"
    with pytest.raises(InputError, match="is damaged: it is not the scan of the control prompts"):
        shipsfast.load(mine)


def test_a_damaged_part_of_the_control_is_computed_again(tmp_path):
    out = tmp_path / "run"
    whole = scan(out=out)
    part = next((out / "control" / "scores").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    assert verify(out)["verdict"] == "damaged"
    again = scan(out=out)
    np.testing.assert_array_equal(again.control.scores, whole.control.scores)
    assert verify(out)["verdict"] == "sound"


def test_save(tmp_path):
    whole = scan(metric=["kl", "js"])
    whole.save(tmp_path / "saved")
    loaded = shipsfast.load(tmp_path / "saved")
    assert loaded == whole and loaded.control == whole.control and list(loaded.control.also) == ["js"]
    assert loaded.contrast() == whole.contrast() and verify(tmp_path / "saved")["verdict"] == "sound"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control": []}, "in the control prompts: there are no prompts"),
        ({"control": ORDINARY[:1]}, "give at least two prompts of each"),
        ({"prompts": PROMPTS[:1]}, "give at least two prompts of each"),
        ({"control": PROMPTS[::-1]}, "the control prompts are the prompts themselves"),
        ({"control": [[5, 6], [1000]]}, "in the control prompts: prompt 1"),
        ({"control": ["a mill", "a barn"]}, "in the control prompts: prompts are text"),
        (
            {"ablation": shipsfast.Ablation("resample", prompts=[[1, 2, 3, 4], [1, 2, 3], [1, 2]])},
            "in the control prompts: ",
        ),
    ],
)
def test_control_prompts_that_cannot_be_are_refused(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(GrowingBatch, "run", None)  # before anything is scanned
    with pytest.raises(InputError, match=words):
        scan(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_description_travels():
    whole = ShipsMeasurement(prompts=PROMPTS, control=ORDINARY, ablation="mean")
    assert ShipsMeasurement.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    own = whole.of_control()
    assert own.prompts == whole.control and own.control is None and own.ablation.prompts == whole.prompts


@pytest.mark.parametrize("at", ["end", -2, ("end", 0)])
def test_where_heads_are_off_and_prompts_are_read_is_the_same_for_both(at):
    how = {"at": at} if not isinstance(at, tuple) else {"ablation": shipsfast.Ablation(at=at[0]), "at": at[1]}
    both = scan(**how)
    for got, want in ((both, scan(control=None, **how)), (both.control, scan(ORDINARY, control=None, **how))):
        np.testing.assert_array_equal(got.scores, want.scores)
    both.contrast()
    with pytest.raises(InputError, match="differ in (ablation|positions)"):
        shipsfast.contrast(both, scan(ORDINARY, control=None))


def test_what_is_said_of_each_prompt_says_nothing_of_the_control():
    with pytest.raises(InputError, match=r"answers \(--answer-column\) say something of each prompt"):
        scan(answers=[[1], [2, 3], [4]])
    with pytest.raises(InputError, match=r"positions of single prompts \(at\) say something of each prompt"):
        scan(at=[0, 1, 0])
    answered = scan(control=None, answers=[[1], [2, 3], [4]])
    other = scan(ORDINARY, control=None, answers=[[5], [6], [7, 8, 9], [2]])
    found = shipsfast.contrast(answered, other)
    np.testing.assert_array_equal(found.mean_a, answered.mean())
    console = Console(width=200)
    with console.capture() as capture:
        found.show(3, console)
    assert (
        "3 prompts with answers of 4 tokens in all (a) with 4 prompts with answers of 6 tokens in all (b)"
        in capture.get()
    )
    with pytest.raises(InputError, match="differ in answers: answers there is given, here none"):
        shipsfast.contrast(answered, scan(ORDINARY, control=None))
