"""`shipsfast verify` on folders with marked scores, saved results, links, and parts and manifests made by hand."""

import shutil
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shipsfast
from shipsfast.runs.folder import kept
from shipsfast.runs.verify import render, verify
from shipsfast.text import counted
from tests.support.evaluations import scan_asr
from tests.support.manifests import edit
from tests.support.models import build
from tests.support.overflowing import PROMPTS, overflowing, scan


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    scan(build(), metric=["kl", "js"], out=path)
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_marked_scores_are_sound_and_counted(tmp_path):
    result = scan(overflowing(), ablation="zero", nonfinite="mark", metric=["kl", "js"], out=tmp_path / "run")
    result.save(tmp_path / "saved")
    for name in ("run", "saved"):
        report = verify(tmp_path / name)
        assert report["verdict"] == "sound" and report["marked"] == 6, render(report)
        assert "72 rows, 6 of them marked as not finite" in render(report)


def test_one_part_is_one_part(tmp_path):
    shipsfast.scan(build(), PROMPTS[:1], heads=[(0, 1)], out=tmp_path / "run", progress=False)
    assert render(verify(tmp_path / "run")).endswith("is as it was written (1 part, 1 row)")
    assert kept(tmp_path / "run").endswith("(1 row in 1 part), run again to continue")
    assert [counted(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]


def test_rates_have_no_marks(tmp_path):
    scan_asr(out=tmp_path / "run", heads=[(0, 1)])
    part = tmp_path / "run" / "scores" / "part-000000.parquet"
    frame = pd.read_parquet(part)
    frame.loc[0, "score"] = np.nan
    frame.to_parquet(part, index=False)
    edit(tmp_path / "run")
    assert "values that are not numbers" in render(verify(tmp_path / "run"))


def test_saved_and_loaded_results_are_sound(tmp_path):
    """Of every kind, saved from a scan and again from what was loaded."""
    model, how = build(), dict(progress=False, heads=[(0, None), (1, 2)])
    results = [
        scan(model, metric=["kl", "js"]),
        shipsfast.scan_dataset(model, PROMPTS, **how),
        shipsfast.top_heads(model, PROMPTS, k=2, screen="bfloat16", **how),
        shipsfast.sahara(model, PROMPTS, group_size=3, beam=2, **how),
        scan_asr(heads=[(1, None)]),
    ]
    for number, result in enumerate(results):
        first, second = tmp_path / f"{number}a", tmp_path / f"{number}b"
        result.save(first)
        shipsfast.load(first).save(second)
        for place in (first, second):
            report = verify(place)
            assert report["verdict"] == "sound", render(report)
        again = shipsfast.load(second)
        array = "angle_deg" if hasattr(result, "angle_deg") else "scores"
        assert np.array_equal(getattr(again, array), getattr(result, array), equal_nan=True)
        assert again.record["status"] == "complete" and again.noise_floor == result.noise_floor


@pytest.mark.parametrize("name", ["scores", "also", "also/1"])
def test_links_are_told(run, tmp_path, name):
    shutil.move(run / name, tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    report = verify(run)
    assert report["verdict"] == "damaged"
    assert report["rows"] == (72 if name == "scores" else 36)  # what lies elsewhere is not looked at
    assert f"{run / name}: is a link, which a run never makes; take it away" in render(report)


def test_no_more_memory_than_there_is(run, monkeypatch):
    class Small:
        available = 4000  # the result fits, its table as it is read does not

    monkeypatch.setattr("psutil.virtual_memory", lambda: Small)
    assert "it declares 36 rows" in render(verify(run))


def test_names_in_files_steer_no_terminal(run):
    part = run / "scores" / "part-000000.parquet"
    table = pq.read_table(part)
    inner = pa.array([{"\x1b[2J": 1.0}] * len(table))
    for changed in (
        table.rename_columns(["prompt", "layer", "head", "\x1b[31m\u202ered"]),
        table.set_column(3, "kl_nats", inner),
    ):
        pq.write_table(changed, part)
        edit(run)
        text = render(verify(run))
        assert "U+001B" in text and not any(code in text for code in ("\x1b", "\u202e"))


def test_gaps_in_texts_are_told(tmp_path):
    scan_asr(out=tmp_path / "run", heads=[(0, 1)])
    part = next((tmp_path / "run" / "completions").iterdir())
    for column in ("label", "text_sha256"):
        table = pq.read_table(part)
        changed = pa.array([None] * len(table), pa.string())
        place = tmp_path / column
        shutil.copytree(tmp_path / "run", place)
        pq.write_table(
            table.set_column(table.column_names.index(column), column, changed),
            place / part.relative_to(tmp_path / "run"),
        )
        edit(place)
        assert f"column {column} has gaps" in render(verify(place))


@pytest.mark.parametrize("size", [3, 1 << 17, 1 << 20])
def test_huge_searches_are_counted_at_once(tmp_path, size):
    shipsfast.sahara(build(), PROMPTS, out=tmp_path / "run", group_size=2, progress=False)
    edit(
        tmp_path / "run",
        lambda m: m["identity"].update(group_size=size, shape=[3, 600, 600], beam=5, prompts=["a", "b", "c"]),
    )
    started = time.process_time()
    text = render(verify(tmp_path / "run"))
    assert time.process_time() - started < 10
    assert "rows are missing" in text or "does not describe its run" in text
    if size == 3:  # one group, then five, of 360,000 heads
        assert f"of {360_000 + 5 * 359_999 + 5 * 359_998} rows are missing" in text
