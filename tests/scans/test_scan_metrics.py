"""Metrics other than KL in a scan, and what an interrupted or unfinished run folder keeps."""

import functools
import json

import numpy as np
import pytest
import torch

import shipsfast
from tests.support.metric_scans import HEADS, PROMPTS, killed_after, scan, to_the_mean_of_all
from tests.support.models import LAYERS, build, next_log_probs
from tests.support.numerics import assert_close_abs


def log_probs(heads):
    model = build()
    with shipsfast.ablate(model, heads):
        return torch.stack([next_log_probs(model, ids) for ids in PROMPTS])  # [P, V]


DEFINITIONS = {
    "reverse_kl": lambda b, a: (a.exp() * (a - b)).sum(-1),
    "js": lambda b, a: 0.5 * sum(
        (x.exp() * (x - torch.log((b.exp() + a.exp()) / 2))).sum(-1) for x in (b, a)
    ),
    "total-variation": lambda b, a: 0.5 * (b.exp() - a.exp()).abs().sum(-1),
    "logit_diff:3,7": lambda b, a: (a[:, 3] - a[:, 7]) - (b[:, 3] - b[:, 7]),
    "refusal_logit:3,7": lambda b, a: torch.logit(a[:, [3, 7]].exp().sum(-1)) - torch.logit(b[:, [3, 7]].exp().sum(-1)),
}  # fmt: skip


@pytest.mark.parametrize("metric", DEFINITIONS)
@pytest.mark.parametrize("cut", [{}, {"prompts_per_group": 2, "rows_per_block": 2, "chunk_tokens": 8}])
def test_scan_equals_the_definition(metric, cut):
    result = scan(metric, **cut)
    base = log_probs([])
    for layer, head in HEADS:
        expected = DEFINITIONS[metric](base, log_probs([(layer, head)]))
        assert_close_abs(result.scores[:, layer, head], expected, 1e-11)
    with pytest.raises(shipsfast.InputError, match="in .scores"):
        _ = result.kl


@pytest.mark.parametrize("cut", [{}, {"prompts_per_group": 2, "rows_per_block": 2}])
def test_a_callable_sees_every_prompt(cut):
    result = scan(to_the_mean_of_all, **cut)
    model = build()
    logits = lambda: torch.stack([model(torch.tensor([ids])).logits[0, -1].detach() for ids in PROMPTS])
    with shipsfast.ablate(model, []):
        centre = logits().mean(0)
    for layer, head in HEADS:
        with shipsfast.ablate(model, [(layer, head)]):
            expected = (logits() - centre).norm(dim=1) + 100 * torch.arange(4)
        assert_close_abs(result.scores[:, layer, head], expected, 1e-11)
    assert result.noise_floor < 1e-10  # though the metric is far from 0 for equal logits


def test_signed_scores_are_ranked_by_size():
    result = scan("logit_diff:3,7")
    sizes = [abs(s.score) for s in result.top(3)]
    assert sizes == sorted(sizes, reverse=True) and result.signed


def test_a_callable_of_the_wrong_shape_is_refused():
    with pytest.raises(shipsfast.InputError, match="shape"):
        scan(lambda base, ablated, index: ablated)


@pytest.mark.parametrize(
    "metric", [lambda b, a, i: a[:, 0], functools.partial(lambda b, a, i, t: a[:, t], t=3)], ids=["lambda", "partial"]
)  # fmt: skip
def test_a_nameless_metric_cannot_continue_a_folder(tmp_path, metric):
    with pytest.raises(shipsfast.InputError, match="no name of its own"):
        scan(metric, out=tmp_path / "run")
    assert scan(metric).save(tmp_path / "run").exists()


CALLS = {
    "scan": lambda out: shipsfast.scan(
        build().float(), PROMPTS, out=out, progress=False, rows_per_block=4
    ),
    "scan-dataset": lambda out: shipsfast.scan_dataset(
        build().float(), PROMPTS, out=out, progress=False, rows_per_block=4
    ),
    "sahara": lambda out: shipsfast.sahara(build().float(), PROMPTS, out=out, progress=False, group_size=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
def test_a_resumed_run_keeps_its_noise_floor(kind, tmp_path, monkeypatch):
    whole = CALLS[kind](tmp_path / "whole")
    killed_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        CALLS[kind](tmp_path / "killed")
    kept = json.loads((tmp_path / "killed" / "run.json").read_text())["noise_floor"]
    assert kept > 0
    resumed = CALLS[kind](tmp_path / "killed")
    assert resumed.noise_floor >= kept and whole.noise_floor > 0
    if kind != "scan":
        assert len(resumed.record["base_singular_values"]) == 2


def test_save_completes_an_unfinished_folder(tmp_path, monkeypatch):
    killed_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        CALLS["scan-dataset"](tmp_path / "run")
    assert np.isnan(shipsfast.SubspaceResult.load(tmp_path / "run").angle_deg).sum() == LAYERS * 4 - 4
    result = CALLS["scan-dataset"](None)
    result.save(tmp_path / "run")
    np.testing.assert_array_equal(shipsfast.SubspaceResult.load(tmp_path / "run").angle_deg, result.angle_deg)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shipsfast.Ablation("mean", prompts=[1, 2, 3]), "list of at least one prompt"),
        (lambda: shipsfast.scan(build(), PROMPTS, heads=5), "heads must be a list"),
        (lambda: shipsfast.scan(build(), PROMPTS, ablation=shipsfast.Ablation("scale"), scale=0.5), "give one"),
        (lambda: shipsfast.scan_dataset(build(), PROMPTS, rank=1.5), "rank must be a whole number"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(call, words):
    with pytest.raises(shipsfast.InputError, match=words):
        call()


def test_kv_groups_of_uneven_layers_are_refused(monkeypatch):
    import dataclasses

    real = shipsfast.models.anatomy.inspect_model
    monkeypatch.setattr(
        "shipsfast.engine.subject.inspect_model",
        lambda *args: dataclasses.replace(real(*args), uniform_kv_heads=False),
    )
    with pytest.raises(shipsfast.InputError, match="differ in their key/value heads"):
        shipsfast.scan(build(), PROMPTS, unit="kv_group", progress=False)


def test_ablate_wraps_source_prompts_as_scan_does():
    from shipsfast.demo.run import MODEL
    from shipsfast.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    how = shipsfast.Ablation("mean", prompts=["How could we hide the kettle?", "Who sells the lamp?"])
    prompt = "How could we mend the blue lamp?"
    result = shipsfast.scan(
        model, [prompt], tokenizer, template="chat", ablation=how, heads=[(0, 2)], progress=False
    )
    ids = shipsfast.prompts.tokens.tokenize(tokenizer, [prompt], "chat")[0]
    base = next_log_probs(model, ids)
    with shipsfast.ablate(model, [(0, 2)], ablation=how, tokenizer=tokenizer, template="chat"):
        other = next_log_probs(model, ids)
    assert_close_abs(result.scores[0, 0, 2], (base.exp() * (base - other)).sum().detach(), 1e-4)
