"""--group-by, and `show`, which shows a run again."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.models.loading import load_model, load_tokenizer
from tests.support.command_line import refused, run
from tests.support.manifests import edit

MIXED = PROMPTS / "requests.csv"
ASKED = ("scan", MODEL, MIXED, "--group-by", "category", "--sample", 9, "--seed", 5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("groups") / "run"
    frame = pd.read_csv(MIXED)
    prompts, labels = frame["prompt"].tolist(), frame["category"].tolist()
    rows = sorted(np.random.default_rng(5).choice(len(frame), 9, replace=False).tolist())
    return out, [prompts[i] for i in rows], [labels[i] for i in rows]


@pytest.fixture
def scanned(capsys, finished):
    """The run folder of ASKED, its prompts and their groups."""
    if not finished[0].exists():
        status, text, err = run(capsys, *ASKED, "--out", finished[0])
        assert status == 0 and "2 groups by category" in err, err
        assert "ordinary, taboo" in text
    return finished


def test_labels_stay_with_their_prompts(scanned):
    out, prompts, labels = scanned
    assert len(set(labels)) == 2
    found = shipsfast.load(out)
    assert found.record["prompts_from"]["group_by"] == {"column": "category", "labels": labels}
    groups = found.by_group()
    for name, mean in zip(groups.names, groups.mean(), strict=True):
        own = [p for p, label in zip(prompts, labels, strict=True) if label == name]
        alone = shipsfast.scan(load_model(MODEL), own, load_tokenizer(MODEL), template="chat", progress=False)
        assert alone.mean() == pytest.approx(mean, rel=1e-4, abs=1e-7)
    assert not any(text in (out / "run.json").read_text() for text in prompts)


def test_a_run_is_shown_again(capsys, scanned, tmp_path):
    out, _, _ = scanned
    status, text, err = run(capsys, "show", out, "--top", 3, "--plot", tmp_path / "heads.png")
    assert status == 0 and err == "" and "ordinary, taboo" in text and "tops of 3 share" in text
    assert (tmp_path / "heads.png").exists() and (tmp_path / "heads-groups.png").exists()
    status, text, _ = run(capsys, "show", out, "--json")
    found = json.loads(text)
    assert [each["group"] for each in found["by_group"]["groups"]] == ["ordinary", "taboo"]
    assert found["run_folder"] == str(out) and found["top"][0]["head"] == 2
    assert run(capsys, "verify", out)[0] == 0


def test_groups_of_a_run_that_was_finished_without(capsys, scanned, tmp_path):
    out, _, labels = scanned
    bare = shutil.copytree(out, tmp_path / "run")
    edit(bare, lambda manifest: manifest["prompts_from"].pop("group_by"))
    assert "ordinary, taboo" not in run(capsys, "show", bare)[1]
    status, text, err = run(capsys, *ASKED, "--out", bare, "-q")
    assert status == 0 and "ordinary, taboo" in text, err
    assert shipsfast.load(bare).by_group().labels == labels
    assert run(capsys, "verify", bare)[0] == 0
    assert "ordinary, taboo" in run(capsys, *ASKED[:3], *ASKED[5:], "--out", bare, "-q")[1]


@pytest.mark.parametrize("wrong", [["a"] * 8, ["a"] * 8 + [3], "a" * 9, None])
def test_groups_that_no_run_has_written(scanned, tmp_path, wrong):
    damaged = shutil.copytree(scanned[0], tmp_path / "run")
    edit(damaged, lambda manifest: manifest["prompts_from"]["group_by"].update(labels=wrong))
    with pytest.raises(shipsfast.InputError, match="prompts_from.* is not"):
        shipsfast.load(damaged)


def test_groups_of_several_metrics_and_of_rates(capsys, tmp_path):
    args = (*ASKED[:5], "--limit", 4, "-q", "--heads", "0", "--out")
    status, text, err = run(
        capsys, *args, tmp_path / "run", "--metric", "kl", "--metric", "js", "--plot", tmp_path / "h.png"
    )
    assert status == 0 and text.count("ordinary, taboo") == 2, err
    assert all((tmp_path / f"h{end}.png").exists() for end in ("", "-groups", "-2", "-2-groups"))
    status, text, err = run(
        capsys, *args, tmp_path / "asr", "--rank-by", "asr", "--max-new-tokens", 6, "--json"
    )
    assert status == 0 and json.loads(text)["by_group"]["agreement"]["heads"] == 4, err


def test_attack_success_rates_by_group(capsys, tmp_path):
    out = tmp_path / "run"
    args = ("evaluate", MODEL, MIXED, "--group-by", "category", "--limit", 10, "--groups", "none; 0-2", "-q")
    status, text, err = run(capsys, *args, "--max-new-tokens", 24, "--out", out)
    assert status == 0 and text.count("ordinary") == text.count("taboo") == 2, err
    found = shipsfast.load(out)
    rates = found.by_group()
    complied = np.array(found.completions.label) == 0
    of = np.array(pd.read_csv(MIXED)["category"][:10])
    for row in rates.itertuples():
        own = complied[["none", "0-2"].index(row.heads)][of == row.group]
        assert row.asr == own.mean() and row.prompts == 5 and row.asr_low <= row.asr <= row.asr_high
    assert rates.query("heads == 'none' and group == 'taboo'")["asr"].item() == 0
    status, text, _ = run(capsys, "show", out, "--json")
    assert json.loads(text)["by_group"]["rates"] == rates.to_dict("records")
    assert "no map of heads" in run(capsys, "show", out, "--plot", tmp_path / "x.png")[2]


def test_what_is_refused(capsys, tmp_path):
    scan = ("scan", MODEL, MIXED)
    assert "no column 'kind': it has category, prompt" in refused(capsys, *scan, "--group-by", "kind")
    assert "holds the prompts" in refused(capsys, *scan, "--group-by", "prompt")
    (tmp_path / "p.csv").write_text(f"prompt,note\nMend a kettle.,{'x' * 81}\n")
    assert "at most 80: name a column of short names" in refused(
        capsys, "scan", MODEL, tmp_path / "p.csv", "--group-by", "note"
    )
    assert "--group-by would do nothing" in refused(capsys, *scan, "--plan", "--group-by", "category")
    status, _, err = run(capsys, "show", tmp_path)
    assert status == 2 and "run.json" in err
