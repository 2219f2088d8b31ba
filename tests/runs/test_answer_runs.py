"""Run folders of scans along answers: what is written is what is read, a killed scan continues, others are refused; answers
of a file, on the command line."""

import json

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.engine.growing_batch import GrowingBatch
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import sample_prompts
from shipsfast.runs.verify import render, verify
from tests.support.command_line import refused, run
from tests.support.models import build
from tests.support.overflowing import overflowing
from tests.support.read_cases import ANSWERS, PROMPTS, how, model_of

LENGTHS = [len(answer) for answer in ANSWERS]


def scan(name: str, ablation="zero", prompts=PROMPTS, answers=ANSWERS, **options):
    return shipsfast.scan(
        model_of(name), prompts, ablation=ablation, answers=answers, progress=False, **options
    )


METRICS_KEPT = ["kl", "log_prob_diff"]


@pytest.mark.parametrize("at", ["all", "end"])
@pytest.mark.parametrize("name", ["llama-gqa", "lfm2"])
def test_a_killed_scan_goes_on_with_the_same_bits(tmp_path, monkeypatch, name, at):
    """With convolutions and heads off at the end only, each token of an answer is a pack of its own."""
    options = dict(rows_per_block=2, prompts_per_group=1 if name == "lfm2" else 2, metric=METRICS_KEPT)
    whole = scan(name, how("resample", at=at), out=tmp_path / "whole", **options)
    real, calls = GrowingBatch.run, []

    def run_some(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run_some)
    with pytest.raises(KeyboardInterrupt):
        scan(name, how("resample", at=at), out=tmp_path / "run", **options)
    partial = shipsfast.load(tmp_path / "run")
    found = sum(np.isfinite(each).sum() for each in partial.by_token)
    assert partial.record["status"] == "running" and 0 < found < sum(each.size for each in whole.by_token)
    scan(name, how("resample", at=at), out=tmp_path / "run", **options)
    resumed = shipsfast.load(tmp_path / "run")
    for mine, each in zip([resumed, *resumed.also.values()], [whole, *whole.also.values()], strict=True):
        assert_same_results(mine, each)
    assert resumed.record["status"] == "complete"


def assert_same_results(mine, each) -> None:
    assert np.array_equal(mine.scores, each.scores, equal_nan=True)
    for a, b in zip(mine.by_token, each.by_token, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_a_folder_is_what_was_measured(tmp_path):
    result = scan("llama-gqa", how("zero"), out=tmp_path / "run", metric=METRICS_KEPT, heads=[(0, 1), (2, 3)])
    loaded = shipsfast.load(tmp_path / "run")
    result.save(tmp_path / "saved")
    for found in (loaded, shipsfast.load(tmp_path / "saved")):
        assert_same_results(found, result)
        assert_same_results(found.also["log_prob_diff"], result.also["log_prob_diff"])
    frame = result.to_pandas()
    assert "token" in frame and len(frame) == sum(LENGTHS) * 2


MOVED = dict(prompts=[PROMPTS[0] + ANSWERS[0][:1], *PROMPTS[1:]], answers=[ANSWERS[0][1:], *ANSWERS[1:]])
CHANGES = {
    "shorter": dict(answers=[[11], *ANSWERS[1:]]),
    "another last token": dict(answers=[[*ANSWERS[0][:-1], 16], *ANSWERS[1:]]),
    "an answer that begins later": MOVED,
    "no answers": dict(answers=None),
    "off everywhere": dict(at="all"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_of_other_answers_is_refused(tmp_path, change):
    options = dict(answers=ANSWERS, at="end", heads=[(0, 1)], out=tmp_path / "run")
    scan("llama-gqa", "zero", **options)
    with pytest.raises(shipsfast.InputError, match="another run"):
        scan("llama-gqa", "zero", **options | change)


def test_a_folder_is_sound(tmp_path):
    result = scan("llama-gqa", how("zero"), out=tmp_path / "run", metric=METRICS_KEPT)
    result.save(tmp_path / "saved")
    for name in ("run", "saved"):
        report = verify(tmp_path / name)
        assert report["verdict"] == "sound", render(report)
        assert report["rows"] == 2 * sum(LENGTHS) * result.kl[0].size


@pytest.mark.parametrize("at", ["all", "end"])
def test_marked_scores(tmp_path, at):
    """Where single tokens have no number, neither has the mean."""
    how = dict(answers=ANSWERS, ablation="zero", at=at, nonfinite="mark", progress=False)
    result = shipsfast.scan(overflowing(), PROMPTS, **how, out=tmp_path / "run")
    assert result.marked_heads == [(1, 2)] and np.isnan(result.kl[:, 1, 2]).all()
    for each in result.by_token:
        assert np.isnan(each[:, 1, 2]).all() and np.isnan(each).sum() == len(each)
    found = shipsfast.load(tmp_path / "run")
    assert_same_results(found, result)
    assert np.array_equal(found.marked, result.marked) and found.marks() == result.marks()
    report = verify(tmp_path / "run")
    assert report["verdict"] == "sound" and report["marked"] == sum(LENGTHS), render(report)
    with pytest.raises(shipsfast.InputError, match="head 1-2 on prompt 1, token 0 of its answer is"):
        shipsfast.scan(overflowing(), PROMPTS, **how | {"nonfinite": "raise"})


@pytest.mark.parametrize("kind", ["head_mean_k", "resample"])
def test_streamed_from_its_checkpoint(tmp_path, kind):
    build("llama-gqa", torch.float32).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    options = dict(answers=ANSWERS, ablation=how(kind), progress=False, rescored=0, max_memory=1 << 30)
    memory, streamed = (
        shipsfast.scan(load_model(str(tmp_path / "model"), stream=stream), PROMPTS, **options)
        for stream in (False, True)
    )
    assert streamed.record["weights"] != memory.record["weights"]
    assert_same_results(streamed, memory)


ROWS = [
    ("How do I mend a kettle?", " With tin."),
    ("Tell me a story about a kite.", "It flew, and came down.  "),
    ("Say 4.", "4"),
]


@pytest.fixture
def table(tmp_path):
    lines = ["prompt,answer", *(f'"{prompt}","{answer}"' for prompt, answer in ROWS)]
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "p.csv"


def in_python(model_folder, rows=ROWS, **options):
    """The same without the command line."""
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    texts, answers = map(list, zip(*rows, strict=True))
    options = dict(answers=answers, heads=[(0, None)], progress=False) | options
    return shipsfast.scan(model, texts, tokenizer, **options)


def test_on_the_command_line(capsys, tmp_path, table, model_folder):
    status, out, err = run(
        capsys, "scan", model_folder, table, "--answer-column", "answer", "--at", "end", "--heads", "0",
        "--metric", "kl", "--metric", "abs_prob_diff", "--out", tmp_path / "run", "--json", "-q",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["also"]["abs_prob_diff"]["metric"]["name"] == "abs_prob_diff"
    wanted = in_python(model_folder, at="end", metric=["kl", "abs_prob_diff"])
    found = shipsfast.load(tmp_path / "run")
    assert_same_results(found, wanted)
    assert_same_results(found.also["abs_prob_diff"], wanted.also["abs_prob_diff"])


def test_answers_of_some_prompts(capsys, tmp_path, table, model_folder):
    """An answer goes with its prompt."""
    args = (
        "--answer-column",
        "answer",
        "--heads",
        "0",
        "--sample",
        2,
        "--seed",
        1,
        "--out",
        tmp_path / "run",
        "-q",
    )
    status, _, err = run(capsys, "scan", model_folder, table, *args)
    assert status == 0, err
    chosen = sample_prompts(range(3), sample=2, seed=1)
    assert_same_results(
        shipsfast.load(tmp_path / "run"), in_python(model_folder, [ROWS[row] for row in chosen])
    )


def test_a_place_in_the_prompt_and_the_end_of_it_alone(capsys, tmp_path, table, model_folder):
    args = ("--at", "end", "--at", "1", "--heads", "0", "--ablation", "zero", "--out", tmp_path / "run", "-q")
    status, _, err = run(capsys, "scan", model_folder, table, *args)
    assert status == 0, err
    how = dict(ablation=shipsfast.Ablation("zero", at="end"), at=1, answers=None)
    assert np.array_equal(
        shipsfast.load(tmp_path / "run").kl, in_python(model_folder, **how).kl, equal_nan=True
    )


def test_a_plan_of_answers(capsys, table, model_folder):
    args = ("scan", model_folder, table, "--plan", "--json", "-q", "--answer-column", "answer")
    flops = []
    for at in ("end", "all"):
        status, out, err = run(capsys, *args, "--at", at)
        assert status == 0, err
        flops.append(json.loads(out)["flops"])
    assert 0 < flops[0] < flops[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--answer-column", "reply"), ("reply", "prompt, answer")),
        (("--answer-column", "prompt"), ("prompt",)),
        (("--answer-column", "answer", "--at", "2"), ("--answer-column", "(--at)")),
        (("--answer-column", "answer", "--rank-by", "asr"), ("--answer-column", "asr")),
        (("--at", "end", "--rank-by", "asr"), ("at the end only", "at='end'")),
        (("--at", "2", "--rank-by", "asr"), ("--at", "asr")),
        (("--metric", "prob"), ("prob", "--answer-column")),
        (("--at", "teapot"), ("teapot", "prompt 0")),
        (("--at", "1", "--at", "2"), ("--at 1, 2",)),
        (("--at", "end", "--at", "all"), ("--at end, all",)),
        (("--at", ""), ("at",)),
    ],
)
def test_the_command_line_refuses(capsys, table, model_folder, args, words):
    said = refused(capsys, "scan", model_folder, table, *args)
    assert all(word in said for word in words), said


def test_an_empty_answer_of_a_file_is_named(capsys, tmp_path, model_folder):
    (tmp_path / "p.csv").write_text("prompt,answer\nHow are you?,Well.\nAnd you?,\n")
    said = refused(capsys, "scan", model_folder, tmp_path / "p.csv", "--answer-column", "answer")
    assert "answer" in said and ("row 2" in said or "answer 1" in said)
