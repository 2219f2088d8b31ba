"""How likely the unablated model finds answers, and which of them are incoherent: against a pass of its own for each token."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import shipsfast
from shipsfast.answers import likelihood
from shipsfast.runs.verify import verify
from tests.support import hooks
from tests.support.evaluations import (
    CONTROL,
    END,
    GROUPS,
    IDS,
    KEYWORDS,
    NEW,
    ORDINARY,
    PROMPTS,
    evaluate,
    expected_labels,
    scan_asr,
    slow_texts,
)
from tests.support.manifests import edit
from tests.support.speaking_models import build

RULE = {"margin_nats": 0.05, "turn_nats": 0.5}  # so tight that random models meet it


@pytest.fixture(scope="module")
def tokens():
    return slow_texts(IDS)


def oracle_nll(model, prompt, answer) -> float:
    """The definition, one pass per token."""
    so_far, terms = list(prompt), []
    for token in answer:
        terms.append(hooks.forward(model, so_far).logits[-1].log_softmax(-1)[token].item())
        so_far.append(token)
    if len(answer) < NEW:
        p = hooks.forward(model, so_far).logits[-1].softmax(-1)
        terms.append(np.log(sum(p[end].item() for end in END)))
    return -float(np.mean(terms))


def oracle(model, ids, tokens) -> np.ndarray:
    return np.array([[oracle_nll(model, ids[p], answer) for p, answer in enumerate(row)] for row in tokens])


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_likelihoods_are_those_of_a_pass_per_token(rows, tokens):
    model = build("llama-gqa")
    lengths = {len(answer) for row in tokens for answer in row}
    assert 0 in lengths and NEW in lengths and len(lengths) > 3, "answers of one kind: this shows less"
    result = evaluate(model=model, control=CONTROL, control_tokens=2, batch_rows=rows)
    expected = oracle(model, IDS, tokens)
    np.testing.assert_allclose(result.completions.nll_nats, expected, rtol=0, atol=6e-7)  # of six digits
    np.testing.assert_allclose(result.perplexity, np.exp(expected.mean(1)), rtol=1e-6)
    ordinary = oracle(model, ORDINARY, slow_texts(ORDINARY, [*GROUPS, []]))
    np.testing.assert_allclose(result.control.completions.nll_nats, ordinary, rtol=0, atol=6e-7)


def test_equal_answers_are_looked_at_once_and_batches_stay_small(monkeypatch):
    seen, real = [], likelihood.plain_pass

    def pass_(model, ids, **how):
        seen.append([tuple(each) for each in ids])
        return real(model, ids, **how)

    monkeypatch.setattr(likelihood, "plain_pass", pass_)
    evaluate(groups=[[], [(0, 1)], []], prompts=[PROMPTS[0], PROMPTS[0], PROMPTS[2]])
    assert len([row for rows in seen for row in rows]) == 4
    seen.clear()
    monkeypatch.setattr(likelihood, "HEAD_BYTES", 1)
    evaluate(prompts=PROMPTS[:2])
    assert seen and all(len(rows) == 1 for rows in seen)


def test_numbers_that_are_none_are_refused():
    one = SimpleNamespace(subject=SimpleNamespace(token_ids=[[1]]), end_tokens={0})
    row = SimpleNamespace(prompt=0, tokens=[1], finished=False)
    with pytest.raises(shipsfast.UnsupportedModelError, match="likelihood of an answer to prompt 0"):
        likelihood.Likelihood(one)._nll(row, torch.full((2, 3), torch.nan))


def by_hand(nll: np.ndarray, tokens, own: list[float]) -> np.ndarray:
    count = np.array([[len(answer) + (len(answer) < NEW) for answer in row] for row in tokens])
    return (count * nll - RULE["turn_nats"]) / count > max(own) + RULE["margin_nats"]


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[1:]], ids=["with none", "without"])
def test_incoherent_answers_of_a_run_and_of_its_folder(groups, tokens, monkeypatch, tmp_path):
    """Whether the unablated model is a group or not, its own answers set the limit, and only `complied` changes."""
    for user in ("evaluate", "asr"):
        monkeypatch.setattr(f"shipsfast.answers.{user}.rule", lambda _: RULE)
    model = build("llama-gqa")
    plain = evaluate(model=model, groups=groups, judge="paper")
    assert plain.identity["incoherent"] is None and "incoherent" not in {
        x for row in plain.labels for x in row
    }
    nll = oracle(model, IDS, tokens)
    judge = KEYWORDS
    result = evaluate(model=model, groups=groups, judge=judge, out=tmp_path / "run")
    said = expected_labels(tokens, judge)
    own = [nll[0, p] for p in range(len(IDS)) if said[0][p] != "degenerate"]
    unlikely = by_hand(nll, tokens, own)
    expected = [
        ["incoherent" if unlikely[g, p] and said[g][p] == "complied" else said[g][p] for p in range(len(IDS))]
        for g in range(len(GROUPS))
    ]
    assert any("incoherent" in row for row in expected), "none: this shows less"
    assert result.labels == expected[len(GROUPS) - len(groups) :] and len(result.asr) == len(groups)
    assert result.limit_nats == pytest.approx(max(own) + RULE["margin_nats"], abs=1e-6)
    loaded = shipsfast.load(tmp_path / "run")
    for each in (loaded, evaluate(model=model, groups=groups, judge=judge, out=tmp_path / "run")):
        assert each.labels == result.labels and each.as_json(3)["groups"] == result.as_json(3)["groups"]
        assert each.as_json(3)["unablated"] == result.as_json(3)["unablated"]
        assert np.array_equal(each.difference(), result.difference(), equal_nan=True)
    assert verify(tmp_path / "run")["verdict"] == "sound"
    complied = np.array([[x == "complied" for x in row] for row in expected])
    np.testing.assert_allclose(
        result.difference()[:, 0], (complied.mean(1) - complied[0].mean())[len(GROUPS) - len(groups) :]
    )


def test_a_scan_of_every_head_has_the_same(monkeypatch, tmp_path):
    for user in ("evaluate", "asr"):
        monkeypatch.setattr(f"shipsfast.answers.{user}.rule", lambda _: RULE)
    heads = [(0, 1), (2, 0), (2, 3)]
    groups = evaluate(groups=[[], *([head] for head in heads)])
    result = scan_asr(heads=heads, out=tmp_path / "run")
    for at, (layer, head) in enumerate(heads, 1):
        for name, value in (("incoherent", groups.share("incoherent")), ("perplexity", groups.perplexity),
                            ("cut", groups.cut)):  # fmt: skip
            assert result.record[name][layer][head] == value[at]
        assert result.difference(layer, head) == tuple(groups.difference()[at])
        assert result.mean()[layer, head] == groups.asr[at]
    assert groups.share("incoherent").any(), "none: this shows less"
    assert result.record["warnings"] == groups.warnings() and result.record["warnings"]
    loaded = shipsfast.load(tmp_path / "run")
    assert loaded.difference(2, 0) == result.difference(2, 0)
    assert verify(tmp_path / "run")["verdict"] == "sound"


def test_folders_from_before_likelihoods_are_read_and_not_continued(tmp_path):
    """They lack the column and the rule: labels are the judge's, nothing is compared that is not there."""
    run = tmp_path / "run"
    now = evaluate(out=run, control=CONTROL)
    for part in (*run.glob("completions/*.parquet"), *run.glob("control/*.parquet")):
        pd.read_parquet(part).drop(columns="nll_nats").to_parquet(part, index=False)
    edit(run, lambda manifest: [manifest["identity"].pop("incoherent"), manifest.pop("warnings")])
    assert verify(run)["verdict"] == "sound", verify(run)["problems"]
    before = shipsfast.load(run)
    assert before.labels == now.labels and np.isnan(before.perplexity).all() and before.limit_nats is None
    assert before.as_json(3)["groups"][1]["perplexity"] is None
    assert "perplexity" not in before.sheet().columns
    with pytest.raises(shipsfast.InputError, match="before likelihoods of answers were kept"):
        evaluate(out=run, control=CONTROL)


def test_damaged_likelihoods_are_found(tmp_path):
    run = tmp_path / "run"
    evaluate(out=run)
    part = next(run.glob("completions/*.parquet"))
    frame = pd.read_parquet(part)
    frame.loc[0, "nll_nats"] = np.nan
    frame.to_parquet(part, index=False)
    edit(run)
    assert "nll_nats has values that are not numbers" in verify(run)["problems"][0]["what"]
    edit(run, lambda manifest: manifest["identity"].update(incoherent={"margin_nats": "much"}))
    with pytest.raises(shipsfast.InputError, match=r"identity\.incoherent"):
        shipsfast.load(run)
