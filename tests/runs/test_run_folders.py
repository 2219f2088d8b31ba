"""Run folders of schema 3: what refuses a folder and in which words, --resume, verify, and resumed runs bit for bit."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import shipsfast
from shipsfast import cli
from shipsfast.runs import manifest
from shipsfast.runs.folder import RunFolder
from shipsfast.runs.identity import in_words
from shipsfast.runs.manifest import as_text, find_parts, read_manifest
from shipsfast.runs.verify import render, verify
from tests.support.command_line import refused, run
from tests.support.faults import PROMPTS, SIZES, numbers, scan
from tests.support.models import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, numbers(scan(out, model))


def rewrite(folder, **changes) -> None:
    """run.json with other contents and a checksum that fits them."""
    body = json.loads((folder / "run.json").read_text())
    body = {k: v for k, v in (body | changes).items() if k != "checksum"}
    (folder / "run.json").write_text(as_text(body))


def test_the_manifest_lists_every_part_with_its_checksum(finished):
    import hashlib

    parts = find_parts(read_manifest(finished[0]))
    assert [part.file for part in parts] == [f"scores/part-{i:06d}.parquet" for i in range(6)]
    for part in parts:
        data = (finished[0] / part.file).read_bytes()
        assert part.sha256 == hashlib.sha256(data).hexdigest() and part.bytes == len(data)
        assert part.rows == len(pd.read_parquet(finished[0] / part.file))
    assert (finished[0] / "run.json").read_bytes() == (finished[0] / "run.backup.json").read_bytes()
    assert {p.name for p in finished[0].iterdir()} == {"run.json", "run.backup.json", "scores"}


@pytest.mark.parametrize("schema", [2, 4])
def test_another_schema_is_refused_by_its_number(tmp_path, model, finished, schema):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    body = {k: v for k, v in json.loads((out / "run.json").read_text()).items() if k != "checksum"}
    for name in ("run.json", "run.backup.json"):
        (out / name).write_text(json.dumps(body | {"schema": schema}))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for use in (shipsfast.load, lambda place: scan(place, model), verify):
        with pytest.raises(
            shipsfast.InputError, match=f"is of schema {schema}.*writes schema 3: scan again into a new"
        ):
            use(out)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(ablation="zero"), r"the ablation there is undifferentiated with logits x 1e-05, here zero with output x 0"),
        (dict(scale=1e-3), r"there is undifferentiated with logits x 1e-05, here undifferentiated with logits x 0\.001"),
        (dict(prompts=[*PROMPTS[:2], [11, 13]]), r"1 of 3 prompts are other tokens, the first is prompt 2"),
        (dict(prompts=PROMPTS[::-1]), r"the same prompts in another order"),
        (dict(prompts=PROMPTS[:2]), r"there are 3 prompts there, 2 here"),
        (dict(heads=[(0, 1)]), r"heads there is all, here \[\[0, 1\]\]"),
        (dict(metric="js"), r"metric there is .*kl.*, here .*js"),
        (dict(seed=1), r"the weights, their type or the config are not those of the model scanned there"),
        (dict(dtype=torch.float64), r"dtype there is float32, here float64"),
    ],
)  # fmt: skip
def test_what_differs_is_told_in_words(finished, model, change, words):
    change = dict(change)
    prompts = change.pop("prompts", PROMPTS)
    other = model
    if {"seed", "dtype"} & change.keys():
        other = build(dtype=change.pop("dtype", torch.float32), seed=change.pop("seed", 0))
    with pytest.raises(
        shipsfast.InputError, match=rf"another run \(different .*{words}.*; choose another output"
    ):
        shipsfast.scan(other, prompts, out=finished[0], progress=False, **SIZES | change)


def test_another_template_is_named(tmp_path, capsys, model_folder):
    prompts = tmp_path / "p.txt"
    prompts.write_text("mend a kettle\ntell a story\n")
    args = ["scan", model_folder, prompts, "--out", tmp_path / "run", "--quiet"]
    assert run(capsys, *args, "--template", "none")[0] == 0
    said = refused(capsys, *args[:-1], "--template", "query-answer")
    assert "the template there is 'none', here 'query-answer'" in said
    # A text that makes the same tokens is the same run.
    assert run(capsys, *args, "--template", "{prompt}")[0] == 0


def test_resume_needs_something_to_resume(tmp_path, capsys, model_folder):
    prompts = tmp_path / "p.txt"
    prompts.write_text("mend a kettle\ntell a story\n")
    out = tmp_path / "run"
    args = ["scan", model_folder, prompts, "--template", "none", "--resume"]
    assert "--resume goes on with the run in --out: give --out" in refused(capsys, *args)
    assert "there is no run to go on with, it does not exist" in refused(capsys, *args, "--out", out)
    out.mkdir()
    assert "no run to go on with, it has no run.json" in refused(capsys, *args, "--out", out)
    assert not list(out.iterdir())
    assert run(capsys, *args[:-1], "--out", out, "--quiet")[0] == 0
    whole = shipsfast.load(out).scores
    (out / "scores" / "part-000000.parquet").unlink()
    status, text, said = run(capsys, *args, "--out", out, "--quiet")
    assert status == 0 and "part-000000.parquet is missing: its scores are computed again" in said
    assert "nothing was run" not in text and np.array_equal(shipsfast.load(out).scores, whole)
    status, text, _ = run(capsys, *args, "--out", out, "--quiet")
    assert status == 0 and "nothing was run" in text


def test_verify_on_the_command_line(tmp_path, capsys, finished):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    status, text, _ = run(capsys, "verify", out)
    assert status == 0 and "sound and complete" in text and "(6 parts, 36 rows)" in text
    (out / "scores" / "part-000002.parquet").write_bytes(b"")
    status, text, _ = run(capsys, "verify", out, "--json")
    report = json.loads(text)
    assert status == 1 and report["verdict"] == "damaged" and len(report["problems"]) == 1
    assert report["problems"][0]["path"].endswith("part-000002.parquet")
    rewrite(out, status="running", parts=report_parts(out)[:2])
    status, text, _ = run(capsys, "verify", out)
    assert status == 1 and "not finished" in text and "rows are missing, the first is prompt 0, layer" in text
    status, text, said = run(capsys, "verify", tmp_path)
    assert status == 2 and text == "" and said.count("\n") == 1 and "is not a shipsfast run" in said


def report_parts(folder) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["parts"]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("prompt", 3, "column prompt has 3, expected 0 to 2"), ("layer", -1, "column layer has -1"),
        ("kl_nats", -1.0, "outside -0.001 to inf"),
        ("head", 0.5, "column 'head' holds double"), ("more", 1, "has the columns"), ("twice", 0, "there twice"),
    ],
)  # fmt: skip
def test_verify_looks_into_the_parts(tmp_path, finished, column, value, words):
    """A part whose checksum is right, and whose contents are not: somebody made both."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    place = out / "scores" / "part-000000.parquet"
    frame = pd.read_parquet(place)
    if column == "twice":
        frame.iloc[0] = frame.iloc[1]
        frame = frame.astype({"prompt": np.int32, "layer": np.int32, "head": np.int32})
    elif column == "head":
        frame["head"] = frame["head"] + value
    else:
        frame.loc[0, column] = value
    frame.to_parquet(place, index=False)
    entries = report_parts(out)
    entries[0] = manifest.Part.of(entries[0]["file"], place.read_bytes(), len(frame), 0).entry()
    rewrite(out, parts=entries)
    report = verify(out)
    assert report["verdict"] == "damaged" and words in report["problems"][0]["what"], render(report)


def test_verify_knows_every_kind(tmp_path, model):
    from tests.support.evaluations import CONTROL, GROUPS, evaluate, scan_asr

    def dataset(out):
        return shipsfast.scan_dataset(model, PROMPTS, out=out, heads=[(0, None), (1, 2)], progress=False)

    def top(out):
        return shipsfast.top_heads(model, PROMPTS, out=out, k=2, screen="bfloat16", progress=False)

    def sahara(out):
        return shipsfast.sahara(
            model, PROMPTS, out=out, heads=[(0, None), (1, 2)], group_size=3, beam=2, rank=2, progress=False
        )

    def several(out):
        return scan(out, model, metric=["kl", "js"])

    def answers(out):
        return evaluate(out=out, groups=GROUPS[:2], control=CONTROL[:2], keep_text=True)

    def rates(out):
        return scan_asr(out=out, heads=[(1, None)])

    for kind in (dataset, top, sahara, several, answers, rates):
        out = tmp_path / kind.__name__
        result = kind(out)
        report = verify(out)
        assert report["verdict"] == "sound", render(report)
        shipsfast.load(out)
        if hasattr(result, "save"):
            result.save(tmp_path / "saved" / kind.__name__)
            report = verify(tmp_path / "saved" / kind.__name__)
            assert report["verdict"] == "sound", render(report)
    place = tmp_path / "several" / "also" / "1" / "scores" / "part-000003.parquet"
    place.unlink()
    report = verify(tmp_path / "several")
    assert report["verdict"] == "damaged" and report["problems"][0]["path"] == str(place)
    with pytest.raises(shipsfast.InputError, match="part-000003.parquet is missing"):
        shipsfast.load(tmp_path / "several")
    assert np.array_equal(
        several(tmp_path / "several").also["js"].scores, scan(None, model, metric="js").scores
    )
    assert verify(tmp_path / "several")["verdict"] == "sound"


def test_less_memory_than_at_the_beginning_is_told(tmp_path, capfd, model):
    out = tmp_path / "run"
    how = dict(prompts_per_group=None, rows_per_block=None, chunk_tokens=None)
    whole = scan(out, model, **how)
    (out / "scores" / "part-000000.parquet").unlink()
    capfd.readouterr()
    smaller = scan(out, model, **how, max_memory=120_000)
    assert "begun with more memory than is free now" in capfd.readouterr().err
    np.testing.assert_allclose(smaller.kl, whole.kl, rtol=0, atol=1e-6)
    (out / "scores" / "part-000000.parquet").unlink()
    again = scan(out, model, **how)
    assert again.record["plan"]["rows_per_block"] == smaller.record["plan"]["rows_per_block"]


def test_another_machine_measures_its_noise_again(tmp_path, monkeypatch, model):
    out, calls = tmp_path / "run", []
    scan(out, model)
    monkeypatch.setattr("shipsfast.scans.ships.packing_noise_nats", lambda *args: calls.append(1) or 0.5)
    (out / "scores" / "part-000005.parquet").unlink()
    assert scan(out, model).noise_floor < 0.5 and not calls
    versions = read_manifest(out)["versions"] | {"torch": "1.0"}
    rewrite(out, versions=versions)
    (out / "scores" / "part-000005.parquet").unlink()
    assert scan(out, model).noise_floor == 0.5 and calls == [1]


def test_a_folder_writes_a_part_and_its_manifest_or_neither(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", {"kind": "ships", "shape": [1, 1, 1]})
    folder.write_manifest({"status": "running"})
    frame = pd.DataFrame({"prompt": [0]})
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_commit", lambda self: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            folder.write_part(frame)
    assert not list((tmp_path / "run").rglob("*.parquet")) and folder.parts == []
    folder.write_part(frame)
    folder.close()
    assert [p.file for p in find_parts(read_manifest(tmp_path / "run"))] == ["scores/part-000000.parquet"]


def test_help_names_verify_without_heavy_imports():
    assert "verify" in {command.name or command.callback.__name__ for command in cli.app.registered_commands}


def test_a_resumed_run_is_cut_as_it_was_begun(tmp_path, monkeypatch, model):
    """Blocks of 2, 3, 2, 3 units; what is missing after the first, cut anew, would be 2, 3, 3."""
    from shipsfast.scans.ships import _Work

    real, blocks = _Work._block, []

    def block(self, units, group):
        blocks.append((tuple(units), tuple(group)))
        real(self, units, group)

    monkeypatch.setattr(_Work, "_block", block)
    how = dict(heads=[(0, None), (1, None), (2, 1), (2, 3)], rows_per_block=3)
    whole = numbers(scan(tmp_path / "run", model, **how))
    begun = list(blocks)
    assert [len(units) for units, _ in begun] == [2, 3, 2, 3] * 2
    blocks.clear()
    for number in (1, 2, 3, 6):
        (tmp_path / "run" / "scores" / f"part-{number:06d}.parquet").unlink()
    assert numbers(scan(tmp_path / "run", model, **how)) == whole
    assert blocks == [begun[number] for number in (1, 2, 3, 6)]


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ([[1, h] for h in range(30)], [[1, h] for h in range(40)], "30 heads there, 40 here, 1-30 only here"),
        ([[0, 0], [0, 1]], [[0, 0]], "2 heads there, 1 here, 0-1 only there"),
    ],
)
def test_long_lists_of_heads_are_told_apart(before, now, said):
    assert in_words(["heads"], {"heads": before}, {"heads": now}, {}, {}) == said
