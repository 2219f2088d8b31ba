"""Run folders that somebody else made or changed: read as data from inside the folder only, or refused in one line."""

import io
import json
import os
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import fuzz.prompts
import fuzz.run_folder
import shipsfast
from fuzz.engine import smoke
from shipsfast.results.sahara import SaharaResult
from shipsfast.results.ships import ShipsResult
from shipsfast.results.subspace import SubspaceResult
from shipsfast.results.tables import show
from shipsfast.runs.manifest import as_text
from tests.support.manifests import edit
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    shipsfast.scan(build(), PROMPTS, metric=["kl", "js"], out=path, progress=False)
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refused(run, message: str) -> None:
    with pytest.raises(shipsfast.InputError, match=message) as error:
        shipsfast.load(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["run.json", "scores/part-000000.parquet", "scores", "also", "also/1"])
def test_links_do_not_lead_out_of_the_folder(run, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(run / name, outside)
    (run / name).symlink_to(outside)
    refused(run, f"{name.split('/')[0]}.*is a link")


def test_pipes_do_not_block(run):
    part = run / "scores" / "part-000000.parquet"
    part.unlink()
    os.mkfifo(part)
    refused(run, "part-000000.parquet is damaged: it has 0 bytes")


def test_names_in_run_json_are_no_paths(run, tmp_path):
    """Further metrics lie where their number says, whatever they are called."""
    secret = tmp_path / "secret"
    shutil.copytree(run / "also" / "1", secret)
    (js,) = json.loads((run / "run.json").read_text())["identity"]["further_metrics"]
    edit(run, lambda m: m["identity"].update(further_metrics=[{"name": str(secret)}]))
    refused(run, "also/1 is damaged: it is not the scan of further metric 1")
    edit(run, lambda m: m["identity"].update(further_metrics=[js, *[{"name": "../../secret"}] * 2]))
    refused(run, "also/2 is not a shipsfast run")
    edit(run, lambda m: m["identity"].update(further_metrics=[js]))
    assert list(shipsfast.load(run).also) == ["js"]
    edit(run / "also" / "1", lambda m: m["identity"].update(further_metrics=[{"name": "x"}]))
    refused(run, "also/1 is damaged: it is not the scan of further metric 1")


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (5, "identity.control is not null or an object"),
        ({}, "identity.control"),
        ({"prompts": "../other"}, "identity.control.prompts is not a list of hashes"),
        ({"prompts": []}, "control is damaged: it is not the scan of the control prompts"),
        ({"prompts": "own"}, "control is damaged: it is not the scan of the control prompts"),
    ],
    ids=str,
)
def test_a_control_that_cannot_be(run, control, message):
    """The last one is a control that has a control."""
    own = json.loads((run / "run.json").read_text())["identity"]["prompts"]
    shutil.copytree(run, run / "control")
    if control == {"prompts": "own"}:
        control = {"prompts": own}
        edit(run / "control", lambda m: m["identity"].update(control=control))
    edit(run, lambda m: m["identity"].update(control=control))
    refused(run, message)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([10**9, 10**4, 10**4], "prompts is not as many as the shape has prompts"),
        ([3, 10**9, 10**9], "identity.shape is not three whole numbers"),
        ([3, 16384, 10**30], "identity.shape is not three whole numbers"),
        ([3, -1, 4], "identity.shape is not"),
        ([3.0, 3, 4], "identity.shape is not"),
        ([3, 3], "identity.shape is not"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be(run, shape, message):
    edit(run, lambda m: m["identity"].update(shape=shape))
    refused(run, message)


def test_results_that_do_not_fit_into_memory(run):
    edit(run, lambda m: m["identity"].update(shape=[10**9, 16384, 16384]) or m["identity"].pop("prompts"))
    refused(run, r"declares results of [\d,.]+ GiB, and [\d,.]+ GiB are free")


def test_rows_outside_the_shape_are_damage(run):
    """Python would count negative indices from the end, and change another head's score without a word."""
    path = run / "scores" / "part-000000.parquet"
    good = pd.read_parquet(path)
    for name, value in (("layer", -1), ("head", 4), ("prompt", 3), ("layer", 2**40)):
        frame = good.astype({name: np.int64})
        frame.loc[0, name] = value
        frame.to_parquet(path, index=False)
        edit(run)
        refused(run, f"part-000000.parquet is damaged .column '{name}'")


def test_tables_of_other_types_are_damage(run):
    path = run / "scores" / "part-000000.parquet"
    table = pq.read_table(path)
    as_text = pa.array([str(x) for x in table.column("kl_nats").to_pylist()])
    index = table.column_names.index("kl_nats")
    for column, message in (
        (as_text, "column 'kl_nats' holds string, expected numbers"),
        (pa.array([[1.0]] * len(table)), "column 'kl_nats' holds list"),
        (as_text.cast(pa.binary()), "holds binary"),
    ):
        pq.write_table(table.set_column(index, "kl_nats", column), path)
        edit(run)
        refused(run, message)
    pq.write_table(table.remove_column(index), path)
    edit(run)
    refused(run, "0 columns 'kl_nats'")
    # What pandas would make of a file's own notes is not asked.
    notes = {b"pandas": b'{"index_columns": ["layer"], "column_indexes": [], "columns": []}'}
    pq.write_table(table.replace_schema_metadata(notes), path)
    edit(run)
    assert np.isfinite(shipsfast.load(run).kl).all()
    unknown = pa.field(
        "kl_nats", pa.float64(), metadata={b"ARROW:extension:name": b"arrow.py_extension_type"}
    )
    schema = table.schema.set(index, unknown)
    pq.write_table(table.cast(schema), path)
    edit(run)
    assert np.isfinite(shipsfast.load(run).kl).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[" * 200_000, "is damaged"),
        ('{"schema": 3, "a": ' + "[" * 960 + "]" * 960 + "}", "is damaged"),
        (as_text({"schema": 3, "identity": 3, "parts": []}), "identity is not what a run writes there"),
        (
            as_text({"schema": 3, "identity": {}, "parts": [{"file": "../../x", "sha256": "", "bytes": 0}]}),
            r"parts\[0\] is not an object with file, sha256",
        ),
        ("\ud800".encode("utf-8", "surrogatepass"), "is damaged"),
        ('{"a": ' + "9" * 5000 + "}", "is damaged"),
    ],
    ids=["empty", "deep", "just as deep", "no identity", "paths", "surrogate", "digits"],
)
def test_manifests_that_are_none(run, text, message):
    (run / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run, message)


def test_parts_that_nobody_lists_are_not_read(run):
    (run / "scores" / "part-1x.parquet").write_bytes(b"rubbish")
    refused(run, "part-1x.parquet is not one of the parts")


def printed(result, **options) -> str:
    out = io.StringIO()
    show(result, 3, console=Console(file=out, width=300, highlight=False), **options)
    return out.getvalue()


def test_tables_print_names_as_they_are():
    """Neither markup, nor pictures, nor control codes; nothing raises over a bracket."""
    evil = "[red]x[/red][/y] :warning: \x1b[2J\x07\u202e$\\frac"
    shown = "[red]x[/red][/y] :warning: [U+001B][2J[U+0007][U+202E]$\\frac"
    metric = {"name": "m", "unit": evil, "signed": False, "label": evil, "title": evil, "floor": evil}
    record = {"ablation": evil, "attention_backend": evil, "layers": evil, "metric": metric, "seconds": 1.0}
    scores = np.arange(12.0).reshape(2, 2, 3)
    identity = {"dtype": evil, "shape": [2, 2, 3], "rank": 1, "prompts": ["a", "b"]}
    for result in (
        ShipsResult(scores, 20.0, record, identity, {"other": ShipsResult(scores, 20.0, record, identity)}),
        ShipsResult(scores > 3, 0.5, record | {"metric": metric | {"name": "asr"}}, identity),
        SubspaceResult(scores[0], 1e-9, record, identity),
        SaharaResult([(0, 1)], scores[:1], [], 1e-9, record, identity),
    ):
        text = printed(result, out=evil)
        assert shown in text
        assert not any(code in text for code in ("\x1b", "\x07", "\u202e", "⚠"))
        result.plot()


def test_pictures_take_any_name(tmp_path):
    metric = {"name": "m", "unit": "$", "signed": True, "label": "$\\frac{$ a_b^c \x1b[1m", "title": "$x$ $"}
    result = ShipsResult(np.ones((2, 2, 3)), 0.1, {"metric": metric, "ablation": "$\\nope$ $"}, {})
    result.plot(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("target", "count"), [(fuzz.prompts, 4000), (fuzz.run_folder, 250)], ids=["prompts", "run folders"]
)
def test_fuzz_smoke(target, count):
    """The kept corpus and seeded mutations; docs/fuzzing.md says how the long runs are done."""
    done, findings = smoke(target, count, seed=1, seconds=15)
    assert done >= 20
    assert not findings, "\n".join(f"{where}: {message}" for where, (_, message) in findings.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(file="../../part-000000.parquet"), r"parts\[0\]\.file is not the name of a part"),
        (dict(file=3), r"parts\[0\]\.file"),
        (dict(sha256=None), r"parts\[0\]\.sha256 is not a text"),
        (dict(rows=-1), r"parts\[0\]\.rows is not a whole number"),
        (dict(rows=True), r"parts\[0\]\.rows is not a whole number"),
        (dict(more=1), r"parts\[0\] is not an object with"),
    ],
    ids=str,
)
def test_parts_that_cannot_be(run, change, message):
    manifest = json.loads((run / "run.json").read_text())
    manifest["parts"][0] |= change
    (run / "run.json").write_text(as_text(manifest))
    refused(run, message)


def test_parts_that_are_there_twice_or_no_list(run):
    manifest = json.loads((run / "run.json").read_text())
    for parts in (manifest["parts"] * 2, {}, None, [3]):
        (run / "run.json").write_text(as_text(manifest | {"parts": parts}))
        refused(run, "parts is not a list of")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt_groups=[0, 3]), "plan.prompt_groups is not a list of numbers"),
        (dict(prompt_groups=[2]), "the plan is of 2 prompts, and there are 3"),
        (dict(chunk_tokens="many"), "plan.chunk_tokens is not a whole number"),
        (dict(rows_per_block=0), "plan.rows_per_block is not a whole number"),
        (dict(more=1), "plan is not an object with"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_not_gone_on_with(run, change, message):
    edit(run, lambda m: m.update(status="running", plan=m["plan"] | change))
    with pytest.raises(shipsfast.InputError, match=message):
        shipsfast.scan(build(), PROMPTS, metric=["kl", "js"], out=run, progress=False)
