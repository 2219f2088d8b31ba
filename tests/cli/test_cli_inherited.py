"""evaluate --run: everything that made the run, or a line about what differs. scan --judge: does the model refuse at all?"""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.runs.verify import verify
from tests.support.command_line import refused, run

TABOO, ORDINARY = PROMPTS / "taboo.csv", PROMPTS / "ordinary.csv"
SHORT = ("--max-new-tokens", 12, "--quiet", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def made(capsys, runs, name: str, *how):
    out = runs / name
    if not out.exists():
        args = ("--limit", 2, "--heads", "0-2,1-0", "--out", out, "-q", "--device", "cpu")
        status, _, err = run(capsys, "scan", MODEL, TABOO, *args, *how)
        assert status == 0, err
    return out


HOW = {
    "scale": ("--ablation", "scale", "--scale", "0.25", "--template", "none", "--dtype", "float64"),
    "mean": ("--ablation", "mean", "--prefix", "Well,"),
    "kv": ("--ablation", "zero", "--unit", "kv_group", "--heads", "0-1"),
    "resample": ("--ablation", "resample", "--source", str(TABOO), "--limit", 1, "--template", "chat"),
}


@pytest.mark.parametrize("name", ["scale", "kv", "mean"])
def test_evaluate_inherits_what_made_the_run(capsys, runs, tmp_path, name):
    out = made(capsys, runs, name, *HOW[name])
    before = shipsfast.load(out)
    args = ("evaluate", MODEL, TABOO, "--run", out, "--top", 1, "--limit", 2, "--out", tmp_path / "e", *SHORT)
    status, text, err = run(capsys, *args)
    assert status == 0, err
    after = shipsfast.load(tmp_path / "e")
    for field in ("ablation", "unit", "dtype", "prompts"):
        assert after.identity[field] == before.identity[field], field
    assert after.record["template"] == before.record["template"]
    assert f"Ablation: {before.record['ablation']}" in text.replace("\n", " ")
    assert f"as in {out}: " in err and before.identity["ablation"]["kind"] in err
    assert after.groups[1] == [before.top(1)[0][:2]]


def test_what_is_given_wins_and_is_said(capsys, runs):
    out = made(capsys, runs, "scale", *HOW["scale"])
    args = ("evaluate", MODEL, TABOO, "--run", out, "--top", 1, "--limit", 1, "--json", *SHORT)
    status, text, err = run(capsys, *args, "--ablation", "zero", "--dtype", "float32")
    assert status == 0, err
    record = json.loads(text)["record"]
    assert record["ablation"] == "zero" and record["template"] == "none"
    assert f"not as in {out}: --ablation zero (there scale), --dtype float32 (there float64)" in err
    status, text, err = run(capsys, *args, "--scale", "0.5")
    assert json.loads(text)["record"]["ablation"] == "scale (eps 0.5)" and "--scale 0.5 (there 0.25)" in err


@pytest.fixture
def polite(tmp_path):
    """The model with a template that has a system message of its own, for conversations that have none."""
    folder = shutil.copytree(MODEL, tmp_path / "polite")
    template = (
        "{% if messages[0].role != 'system' %}<|begin|>Be kind.<|end|>{% endif %}{% if loud is defined %}!{% endif %}"
        "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        ("--system", ""),
        ("--system", "Be brief."),
        ("--prefix", "Well,"),
        ("--template-arg", "loud=true"),
    ],
    ids=["empty system", "system", "prefix", "argument"],
)
def test_what_was_around_the_prompts_is_inherited(capsys, tmp_path, polite, how):
    """An empty system message is none of the template's own."""
    common = ("--limit", 2, "-q", "--device", "cpu")
    before, plain, after = (tmp_path / name for name in ("before", "plain", "after"))
    for out, more in ((before, how), (plain, ())):
        args = ("scan", polite, TABOO, "--heads", "0-2", "--out", out, *common, *more)
        assert run(capsys, *args)[0] == 0
    tokens = shipsfast.load(before).identity["prompts"]
    assert tokens != shipsfast.load(plain).identity["prompts"]
    args = ("evaluate", polite, TABOO, "--top", 1, "--max-new-tokens", 4, *common)
    status, _, err = run(capsys, *args, "--run", before, "--out", after)
    assert status == 0 and shipsfast.load(after).identity["prompts"] == tokens, err
    status, _, err = run(capsys, *args, "--run", plain, *how)
    there = "''" if how[0] == "--prefix" else "none"
    assert status == 0 and f"not as in {plain}: {how[0]} {how[1] or repr('')} (there {there})" in err
    status, _, err = run(capsys, *args, "--run", before, *how)
    assert status == 0 and "not as in" not in err
    # What only a chat template reads goes with it.
    status, _, err = run(capsys, *args, "--run", before, "--template", "none")
    assert status == 0 and f"not as in {before}: --template none (there chat)" in err, err


SYSTEMS = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}system: Be kind. {% endif %}"
    "{{ '<|user|>' if m.role == 'user' else 'system: ' }}{{ m.content }} {% endfor %}<|assistant|>"
)


def test_an_empty_system_message_is_not_the_templates_own(capsys, runs, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "chat_template.jinja").write_text(SYSTEMS)
    how = ("--limit", 2, "-q", "--device", "cpu")
    args = ("scan", model, TABOO, "--system", "", "--heads", "0-2", "--out", tmp_path / "s", *how)
    status, _, err = run(capsys, *args)
    assert status == 0, err
    args = ("evaluate", model, TABOO, "--run", tmp_path / "s", "--max-new-tokens", 4, *how)
    for more, same in (((), True), (("--system", "Be quick."), False)):
        out = tmp_path / str(same)
        assert run(capsys, *args, "--out", out, *more)[0] == 0
        hashes = [shipsfast.load(each).identity["prompts"] for each in (tmp_path / "s", out)]
        assert (hashes[0] == hashes[1]) == same


def test_answers_are_made_and_judged_as_in_a_scan_of_answers(capsys, runs, tmp_path):
    out, how = tmp_path / "asr", ("--limit", 2, "-q", "--device", "cpu")
    drawn = [
        "--max-new-tokens",
        "9",
        "--do-sample",
        "--top-k",
        "7",
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--eos-token-id",
        "40",
    ]
    asr = ["--rank-by", "asr", "--heads", "0-2,1-0", "--judge", "paper"]
    args = ("scan", MODEL, TABOO, *asr, "--out", out, *how, *drawn)
    assert run(capsys, *args)[0] == 0
    before = shipsfast.load(out)
    args = ("evaluate", MODEL, TABOO, "--run", out, "--top", 2, *how)
    status, _, err = run(capsys, *args, "--out", tmp_path / "e")
    assert status == 0 and "max_new_tokens 9" in err and "eos_token_id 40" in err and "judge paper" in err, (
        err
    )
    after = shipsfast.load(tmp_path / "e")
    assert after.identity["generation"] == before.identity["metric"]["generation"]
    assert after.identity["judge"] == before.identity["metric"]["judge"]
    rates = {tuple(group[0]): rate for group, rate in zip(after.groups[1:], after.asr[1:], strict=True)}
    assert rates == {head: before.mean()[head] for head in ((0, 2), (1, 0))}
    status, _, err = run(capsys, *args, "--max-new-tokens", 5, "--judge", "keywords")
    assert status == 0 and "--max-new-tokens 5 (there 9)" in err and "--judge keywords (there paper)" in err


def test_other_weights_are_told(capsys, runs, tmp_path):
    out = made(capsys, runs, "scale", *HOW["scale"])
    model = shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for each, told in ((MODEL, False), (model, True)):
        status, _, err = run(capsys, "evaluate", each, TABOO, "--run", out, "--top", 1, "--limit", 1, *SHORT)
        assert status == 0 and ("a model with other weights" in err) == told, err


def test_the_ablation_of_a_scan_does_not_keep_the_unablated_model_from_answering(capsys, tmp_path):
    args = ("--limit", 1, "--heads", "0-2", "--judge", "keywords", "--out", tmp_path / "run", *SHORT)
    status, text, err = run(capsys, "scan", MODEL, TABOO, *HOW["resample"], *args)
    assert status == 0 and "the unablated model refuses 1 of 1 prompt" in " ".join(text.split()), err


def test_what_a_folder_does_not_hold_is_asked_for(capsys, runs):
    out = made(capsys, runs, "mean", *HOW["mean"])
    args = ("evaluate", MODEL, ORDINARY, "--run", out, "--top", 1, "--limit", 2)
    status, text, err = run(capsys, *args, *SHORT)
    assert status == 2 and text == "" and "give the run's with --source" in err
    prompts = runs / "two.csv"
    prompts.write_text("".join(TABOO.read_text().splitlines(keepends=True)[:3]))
    status, text, err = run(capsys, *args, *SHORT, "--source", prompts)
    assert status == 0 and "Ablation: mean" in text and "not as in" not in err, err
    status, _, err = run(capsys, *args, *SHORT, "--source", ORDINARY)
    assert status == 0 and "the mean there is of other prompts" in err


def test_a_run_that_text_cannot_follow_is_refused(capsys, runs):
    out = made(capsys, runs, "resample", *HOW["resample"])
    assert "new text has no counterpart" in refused(capsys, "evaluate", MODEL, TABOO, "--run", out)
    kv = made(capsys, runs, "kv", *HOW["kv"])
    status, _, err = run(capsys, "evaluate", MODEL, TABOO, "--run", kv, "--unit", "head", "-q")
    assert status == 2 and "is about kv_groups" in err


@pytest.mark.parametrize(("prompts", "refuses"), [(TABOO, 3), (ORDINARY, 0)], ids=["taboo", "ordinary"])
def test_a_scan_says_how_often_the_model_refuses(capsys, tmp_path, prompts, refuses):
    out = tmp_path / "run"
    args = (
        "scan",
        MODEL,
        prompts,
        "--limit",
        3,
        "--heads",
        "0-2",
        "--out",
        out,
        "--judge",
        "keywords",
        *SHORT,
    )
    status, text, err = run(capsys, *args)
    assert status == 0, err
    text = " ".join(text.split())
    assert f"the unablated model refuses {refuses} of 3 prompts (" in text and "judge keywords" in text
    assert ("refuses none of these 3 prompts" in text) == (refuses == 0)
    found = shipsfast.load(out).record["refusals"]
    assert (found["refused"], found["prompts"]) == (refuses, 3) and verify(out)["verdict"] == "sound"
    status, text, err = run(capsys, *args, "--json")
    assert status == 0 and json.loads(text)["record"]["refusals"] == found, err
    plain = ("scan", MODEL, prompts, "--limit", 3, "--heads", "0-2", "--out", out, "-q", "--device", "cpu")
    status, text, err = run(capsys, *plain)
    assert status == 0 and f"refuses {refuses} of 3" in " ".join(text.split()) and "nothing was run" in text


def test_progress_moves_while_answers_decode(capsys, monkeypatch):
    """Rows that all end in the same step: the bar has moved before, and ends at all of them."""
    from shipsfast.answers import answers_bar

    seen = []

    class Bar(answers_bar.AnswersBar):
        def underway(self, tokens):
            super().underway(tokens)
            seen.append((self.finished, self._bar.n))

    monkeypatch.setattr("shipsfast.answers.queue.AnswersBar", Bar)
    args = (
        "scan",
        MODEL,
        TABOO,
        *["--rank-by", "asr", "--limit", "2", "--heads", "0-2", "--eos-token-id", "none"],
    )
    assert run(capsys, *args, "--max-new-tokens", 8, "--device", "cpu", "--template", "chat")[0] == 0
    moved = [n for finished, n in seen if finished == 0]
    assert moved == sorted(moved) and len(moved) >= 5 and 0 < moved[0] < moved[-1] < 4
    assert seen[-1] == (4, 4)
