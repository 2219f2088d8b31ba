"""Run folders of `evaluate` and `scan_asr`: judges that fail, runs that are killed, and what the files hold."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

import shipsfast
from shipsfast.answers import decode
from shipsfast.answers.judges.keywords import KeywordJudge
from shipsfast.results.completions import Completions
from shipsfast.results.evaluation import EvalResult
from shipsfast.runs import whole_files
from shipsfast.runs.kinds import LABELS
from shipsfast.runs.part_file import ANSWER as COLUMNS
from tests.support import models
from tests.support.evaluations import (
    CONTROL,
    GROUPS,
    IDS,
    KEYWORDS,
    NEW,
    PROMPTS,
    REFUSED,
    evaluate,
    expected_labels,
    no_keyword,
    scan_asr,
    slow_texts,
    text_of,
)  # fmt: skip
from tests.support.failing_judges import Fails
from tests.support.model_state import assert_same, state
from tests.support.speaking_models import build


@pytest.fixture(scope="module")
def tokens():
    return slow_texts(IDS)


def same(one: EvalResult, other: EvalResult, text: bool = True) -> bool:
    """Every number of two results, and every text."""

    def completions(a: Completions, b: Completions) -> bool:
        fields = ("label", "num_tokens", "finished", "sha256", "nll_nats", *["text"] * text)
        return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)

    if (one.control is None) != (other.control is None) or one.groups != other.groups:
        return False
    return completions(one.completions, other.completions) and (
        one.control is None
        or completions(one.control.completions, other.control.completions)
        and np.array_equal(one.control.kl_nats, other.control.kl_nats)
        and one.control.tokens == other.control.tokens
    )


@pytest.fixture
def decoded(monkeypatch):
    """The rows that were decoded, as they came out."""
    rows, real = [], decode.decode

    def run(*args, **how):
        for batch in real(*args, **how):
            rows.extend((row.group, row.prompt) for row in batch)
            yield batch

    for user in ("label", "control"):
        monkeypatch.setattr(f"shipsfast.answers.{user}.decode", run)
    return rows


@pytest.fixture
def killed(monkeypatch):
    """Run something that is killed when it has written so many files; did it get there?"""

    def run(files: int, what) -> bool:
        real, written = whole_files.write_whole, []

        def write_whole(path, write, **how):
            if path.name != "run.backup.json":  # it comes with every manifest
                if len(written) == files:
                    raise KeyboardInterrupt
                written.append(path)
            real(path, write, **how)

        with monkeypatch.context() as patch:
            patch.setattr("shipsfast.runs.folder.write_whole", write_whole)
            try:
                what()
            except KeyboardInterrupt:
                return True
        return False

    monkeypatch.setattr("shipsfast.answers.label.WRITE_EVERY_S", 0.0)
    return run


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (OSError("the server is gone"), "the server is gone"),
        (KeyboardInterrupt(), None),
        ([True] * 99, r"judge fails: expected \d+ labels, one per completion, got 99"),
        (["fine"] * 3, "judge fails"),
    ],
    ids=["exception", "ctrl-c", "too many labels", "unknown labels"],
)
@pytest.mark.parametrize("scan", [evaluate, scan_asr], ids=["evaluate", "scan_asr"])
def test_a_judge_that_fails_midway_loses_nothing_that_is_judged(tmp_path, decoded, scan, how, message):
    settings = dict(batch_rows=3) | ({} if scan is evaluate else {"heads": [(1, None)]})
    whole = scan(judge=Fails(10**6), **settings)
    every = {(group, prompt) for group in range(5) for prompt in range(len(IDS))}
    decoded.clear()
    model = build("llama-gqa")
    model.train()
    before, judge = state(model), Fails(3, how)
    error = type(how) if isinstance(how, BaseException) else shipsfast.InputError
    with pytest.raises(error, match=message):
        scan(model=model, judge=judge, out=tmp_path / "run", **settings)
    assert_same(before, state(model))
    parts = [pd.read_parquet(part) for part in (tmp_path / "run" / "completions").iterdir()]
    kept = set(pd.concat(parts)[["group", "prompt"]].itertuples(index=False, name=None))
    assert 0 < len(kept) == judge.judged < len(decoded) < len(every)
    partial = shipsfast.load(tmp_path / "run")
    assert partial.record["status"] == "running"
    if scan is evaluate:
        assert len(partial.to_pandas()) == judge.judged
    decoded.clear()
    resumed = scan(model=model, judge=Fails(10**6), out=tmp_path / "run", **settings)
    assert sorted(decoded) == sorted(every - kept)
    if scan is evaluate:
        assert same(resumed, whole, text=False)
    else:
        assert np.array_equal(resumed.scores, whole.scores, equal_nan=True)


def test_killed_at_any_moment_it_continues_to_the_same_result(tmp_path, killed, decoded):
    how = dict(groups=GROUPS[:3], control=CONTROL[:2], control_tokens=3, batch_rows=4, keep_text=True)
    whole = evaluate(PROMPTS[:3], **how)
    decoded.clear()
    files = 0
    while killed(files, functools.partial(evaluate, PROMPTS[:3], out=tmp_path / f"{files}", **how)):
        if files:
            partial = shipsfast.load(tmp_path / f"{files}")
            assert partial.record["status"] == "running"
            todo = len(partial.completions.missing()) + len(partial.control.completions.missing())
            decoded.clear()
        resumed = evaluate(PROMPTS[:3], out=tmp_path / f"{files}", **how)
        assert same(resumed, whole)
        if files:  # what was there is not decoded again, but for a text to check, and answers for the KL
            assert todo <= len(decoded) <= todo + 4
        loaded = shipsfast.load(tmp_path / f"{files}")
        assert same(loaded, whole) and loaded.record["status"] == "complete"
        for room, rows in (("completions", 9), ("control", 8)):  # none twice
            assert len(pd.concat(map(pd.read_parquet, (tmp_path / f"{files}" / room).iterdir()))) == rows
        assert loaded.record["spot_check_max_deficit"] == 0.0
        files += 1
    assert files > 6


@pytest.mark.parametrize("scan", [evaluate, scan_asr], ids=["evaluate", "scan_asr"])
def test_a_run_that_failed_its_check_fails_again(tmp_path, monkeypatch, scan):
    """All answers are written when the check refuses them: a second run must not take them for good."""

    def refuse(_generation, row):
        assert row.tokens, "nothing to check"
        raise shipsfast.UnsupportedModelError("refused")

    with monkeypatch.context() as patch:
        patch.setattr("shipsfast.answers.label.check_generation", refuse)
        for _ in range(2):
            with pytest.raises(shipsfast.UnsupportedModelError, match="refused"):
                scan(out=tmp_path / "run")
    assert scan(out=tmp_path / "run").record["spot_check_max_deficit"] == 0.0


@pytest.mark.parametrize("control", [None, CONTROL[:2]], ids=["alone", "with control"])
def test_a_finished_run_is_not_repeated_unless_parts_are_gone(tmp_path, monkeypatch, decoded, control):
    first = evaluate(out=tmp_path / "run", control=control)
    manifest = (tmp_path / "run" / "run.json").read_text()
    decoded.clear()
    again = evaluate(out=tmp_path / "run", control=control)
    assert not decoded and same(again, first, text=False) and again.prompts == PROMPTS
    assert (tmp_path / "run" / "run.json").read_text() == manifest
    assert again.record["spot_check_max_deficit"] == first.record["spot_check_max_deficit"]
    for room in ("completions", "control", "scores") if control else ("completions",):
        for part in (tmp_path / "run" / room).iterdir():
            part.unlink()
        assert same(evaluate(out=tmp_path / "run", control=control), first, text=False)
        assert same(shipsfast.load(tmp_path / "run"), first, text=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"groups": GROUPS[:2]}, "groups"),
        ({"judge": no_keyword}, "judge"),
        ({"judge": KeywordJudge(REFUSED[:1])}, "judge"),
        ({"max_new_tokens": NEW - 1}, "generation"),
        ({"eos_token_id": 2}, "generation"),
        ({"do_sample": True}, "generation"),
        ({"keep_text": True}, "keep_text"),
        ({"prompts": [*PROMPTS[:4], "mur5n"]}, "prompts"),
        ({"control": CONTROL[1:]}, "control"),
        ({"control": None}, "control"),
        ({"control_tokens": 3}, "control"),
        ({"ablation": "zero"}, "ablation"),
        ({"model": "other"}, "fingerprint"),
    ],
)
def test_another_evaluation_is_refused_by_what_differs(tmp_path_factory, change, named):
    folder = tmp_path_factory.getbasetemp() / "an evaluation"  # made once for all of these
    if not folder.exists():
        evaluate(out=folder, control=CONTROL)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "model" in change:
        change = {"model": models.build("llama-gqa", seed=1)}
    with pytest.raises(shipsfast.InputError, match=rf"another run \(different {named}\)"):
        evaluate(**{"out": folder, "control": CONTROL} | change)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("keep", [False, True], ids=["not kept", "kept"])
def test_texts_are_in_the_folder_only_if_asked_for(tmp_path, keep, tokens):
    result = evaluate(out=tmp_path / "run", keep_text=keep, control=CONTROL)
    assert result.completions.text == [[text_of(ids) for ids in row] for row in tokens]
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    for part in (p for p in files if p.suffix == ".parquet" and p.parent.name != "scores"):
        frame = pd.read_parquet(part)
        assert list(frame.columns) == [*COLUMNS, "nll_nats", *["text"] * keep]
        if not keep:  # no string but these
            assert (
                set(frame["label"]) <= set(LABELS)
                and frame["text_sha256"].str.fullmatch("[0-9a-f]{64}").all()
            )
    found = [p for p in files if b"mur" in p.read_bytes()]
    assert {p.parent.name for p in found if p.name not in ("run.json", "run.backup.json")} == (
        {"completions", "control"} if keep else set()
    )
    assert (tmp_path / "run" / "run.backup.json").read_text() == (tmp_path / "run" / "run.json").read_text()
    manifest = (tmp_path / "run" / "run.json").read_text().replace('"mur58n"', "").replace('"mur32n"', "")
    assert ("mur" in manifest) == keep  # but for the judge's keywords
    loaded = shipsfast.load(tmp_path / "run")
    assert isinstance(loaded, EvalResult) and same(loaded, result, text=keep)
    assert loaded.prompts == (PROMPTS if keep else [""] * len(PROMPTS)) and loaded.groups == result.groups
    assert np.array_equal(loaded.interval(), result.interval()) and loaded.summary() == result.summary()
    if not keep:
        assert loaded.completions.text == [[None] * len(PROMPTS)] * len(GROUPS)


def test_running_out_of_memory_changes_no_label(tmp_path, monkeypatch, tokens):
    from shipsfast.ops.decode_attention import decode_attention

    real, calls = decode_attention, []

    def sometimes(*args, **kwargs):
        calls.append(len(args[1]))
        if len(args[1]) > 6 and len(calls) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr("shipsfast.engine.decoder.decode_attention", sometimes)
    result = evaluate(out=tmp_path / "run")
    assert result.labels == expected_labels(tokens, KEYWORDS)
    assert result.record["plan"]["slots"] < 25
    assert len(shipsfast.load(tmp_path / "run").to_pandas()) == 25


def test_scan_asr_killed_at_any_moment_continues_to_the_same_result(tmp_path, killed, decoded):
    how, files = dict(heads=[(0, 1), (2, None)], batch_rows=12), 0
    whole = scan_asr(**how)
    while killed(files, functools.partial(scan_asr, out=tmp_path / f"{files}", **how)):
        if files:
            partial = shipsfast.load(tmp_path / f"{files}")
            assert partial.record["status"] == "running" and partial.metric["name"] == "asr"
        resumed = scan_asr(out=tmp_path / f"{files}", **how)
        loaded = shipsfast.load(tmp_path / f"{files}")
        for result in (resumed, loaded):
            assert np.array_equal(result.scores, whole.scores, equal_nan=True)
            assert result.noise_floor == whole.noise_floor
            for name in ("unablated", "degenerate", "spot_check_max_deficit"):
                assert result.record[name] == whole.record[name]
        files += 1
    assert files > 4
    decoded.clear()
    again = scan_asr(out=tmp_path / "0", **how)
    assert not decoded and np.array_equal(again.scores, whole.scores, equal_nan=True)
    for part in (tmp_path / "0" / "scores").iterdir():
        part.unlink()
    again = scan_asr(out=tmp_path / "0", **how)
    assert len(decoded) <= 1 and np.array_equal(again.scores, whole.scores, equal_nan=True)


def test_another_scan_asr_is_refused_by_what_differs(tmp_path):
    scan_asr(out=tmp_path / "run", heads=[(0, 1)])
    for change, named in (
        ({"heads": [(0, 2)]}, "heads"), ({"judge": no_keyword}, "metric"), ({"keep_text": True}, "keep_text"),
        ({"max_new_tokens": 3}, "metric"), ({"unit": "kv_group"}, "unit"),
    ):  # fmt: skip
        with pytest.raises(shipsfast.InputError, match=rf"another run \(different .*{named}"):
            scan_asr(**{"out": tmp_path / "run", "heads": [(0, 1)]} | change)
    with pytest.raises(shipsfast.InputError, match="another run"):
        shipsfast.scan(build("llama-gqa"), IDS, heads=[(0, 1)], out=tmp_path / "run", progress=False)
