"""--ablation and --scale more than once."""

import json

import numpy as np
import pytest

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.demo.run import PROMPTS as FOLDER
from tests.support.command_line import refused, run
from tests.support.prompt_files import write

PROMPTS = FOLDER / "taboo.csv"
FEW = ("--limit", 3)
THREE = ("--ablation", "undifferentiated", "--ablation", "mean", "--ablation", "zero")


def test_three_ablations(capsys, tmp_path):
    out, plot = tmp_path / "run", tmp_path / "maps.png"
    asked = (
        "scan",
        MODEL,
        PROMPTS,
        *FEW,
        *THREE,
        "--metric",
        "kl",
        "--metric",
        "js",
        "--out",
        out,
        "--plot",
        plot,
    )
    status, said, err = run(capsys, *asked, "--top", 3, "--quiet")
    assert status == 0, err
    said = " ".join(said.split())
    assert (
        "3 ablations compared: KL(base || ablated)" in said and "undifferentiated and zero: Spearman" in said
    )
    assert "sink: the unablated head's mean attention weight on the first token" in said
    assert plot.exists() and plot.with_stem("maps-2").exists()
    found = shipsfast.load(out)
    assert list(found.by_ablation) == ["undifferentiated", "mean", "zero"]
    _, alone, _ = run(
        capsys, "scan", MODEL, PROMPTS, *FEW, "--ablation", "mean", "--json", "--quiet", "--top", 1
    )
    first = json.loads(alone)["top"][0]
    assert found.by_ablation["mean"].mean()[first["layer"], first["head"]] == pytest.approx(
        first["mean_kl_nats"]
    )
    status, said, _ = run(capsys, *asked, "--json", "--quiet")
    body = json.loads(said)
    assert [pair["second"] for pair in body["several"]["agreement"]] == ["mean", "zero", "zero"]
    assert (
        body["several"]["top"][0]["sink"]["first_token"] > 0 and body["record"]["sink_mass"]["prompts"] == 3
    )
    status, said, _ = run(capsys, "show", out)
    assert status == 0 and "3 ablations compared" in said
    assert run(capsys, "verify", out)[0] == 0


def test_scales_and_a_source(capsys, tmp_path):
    plot = tmp_path / "dose.png"
    other = write(tmp_path / "other.csv", ("prompt",), [("Name the metal of the old bell.",)])
    asked = (
        "--ablation",
        "scale",
        "--ablation",
        "mean",
        "--scale",
        "0.1",
        "--scale",
        "0.5",
        "--source",
        other,
    )
    status, said, err = run(capsys, "scan", MODEL, PROMPTS, *FEW, *asked, "--json", "--quiet", "--plot", plot)
    assert status == 0, err
    body = json.loads(said)
    assert list(body["by_ablation"]) == ["scale (eps 0.1)", "scale (eps 0.5)", "mean"]
    assert body["doses"]["scale"]["scales"] == [0.1, 0.5] and body["doses"]["scale"]["neighbours"]
    assert plot.with_stem("dose-dose-scale").exists()


def test_groups_are_recorded_for_all(capsys, tmp_path):
    file = write(
        tmp_path / "p.csv", ("prompt", "kind"), [("Mend a kettle.", "a"), ("Name a bird.", "b"), ("Hi.", "a")]
    )
    out = tmp_path / "run"
    asked = ("scan", MODEL, file, *THREE, "--out", out, "--quiet", "--heads", "0")
    assert run(capsys, *asked)[0] == 0
    assert run(capsys, *asked, "--group-by", "kind")[0] == 0
    for one in shipsfast.load(out).by_ablation.values():
        assert one.record["prompts_from"]["group_by"]["labels"] == ["a", "b", "a"]
        assert np.isfinite(one.by_group().result.mean()[0]).all()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("scan", "--ablation", "zero", "--ablation", "zero"), "ablation zero is given twice"),
        (("scan", "--scale", "0.1", "--scale", "x"), "--scale must be a number, got 'x'"),
        (("scan", "--ablation", "zero", "--scale", "0.1", "--scale", "1"), "zero have no eps"),
        (("scan", "--ablation", "zero", "--ablation", "resample"), "--ablation resample needs --source"),
        (("scan", "--ablation", "zero", "--ablation", "uniform", "--source", PROMPTS), "--source is for mean and resample"),
        (("scan", "--ablation", "zero", "--ablation", "mean", "--align", "end"), "--align is for resample"),
        (("scan", "--rank-by", "asr", *THREE), "only scans of the next token take several"),
        (("scan-dataset", *THREE), "3 ablations were given"),
        (("sahara", "--ablation", "zero", "--ablation", "mean"), "2 ablations were given"),
        (("evaluate", "--groups", "none", "--ablation", "zero", "--ablation", "mean"), "2 ablations were given"),
    ],
    ids=lambda x: " ".join(map(str, x))[:50] if isinstance(x, tuple) else "",
)  # fmt: skip
def test_refused(capsys, asked, words):
    command, *options = asked
    assert words in refused(capsys, command, MODEL, PROMPTS, *options, *FEW)
