"""The benchmark of the top heads: estimates from gradients are what they say, and races are rehearsed on what complete scans gave."""

import hashlib
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from benchmarks import attribution, provenance, race, top

PROMPTS = [[5, 9, 3, 7, 1, 4], [2, 8, 6], [5, 9, 1, 1, 0, 3, 2]]
OFF = "undifferentiated"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Wide weights, so that heads matter; two query heads to a key/value head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def moved(model, head: tuple[int, int], by: float, ablation: str = OFF) -> torch.Tensor:
    """KL [P] of the unablated model against the one whose head is moved a part of the way to being off."""

    def nudge(layer, z, off):
        out = torch.zeros_like(z)
        if layer == head[0]:
            out[:, :, head[1]] = by * (off - z)[:, :, head[1]]
        return out

    with torch.no_grad():
        base = torch.log_softmax(attribution.next_logits(model, PROMPTS), -1)
        with attribution.Heads(model, ablation, nudge).watched():
            there = torch.log_softmax(attribution.next_logits(model, PROMPTS), -1)
    return (base.exp() * (base - there)).sum(-1)


@pytest.mark.parametrize("ablation", [OFF, "zero"])
def test_a_head_that_is_moved_all_the_way_is_the_ablated_head(model, ablation):
    expected = shipsfast.scan(model, PROMPTS, ablation=ablation, progress=False).kl
    for head in [(0, 1), (1, 3), (2, 0)]:
        np.testing.assert_allclose(moved(model, head, 1.0, ablation), expected[:, *head], rtol=2e-4)


@pytest.mark.parametrize("ablation", [OFF, "zero"])
def test_attribution_is_the_slope_of_the_way_to_being_off(model, ablation):
    got = attribution.patching(model, PROMPTS, ablation)
    for head in np.ndindex(3, 4):
        slope = attribution.slope_by_steps(model, PROMPTS, ablation, head, 1e-3)
        np.testing.assert_allclose(
            got[head], slope, rtol=0, atol=1e-3 * got.abs().max()
        )  # norms are in float32
    alone = torch.cat([attribution.patching(model, [each], ablation) for each in PROMPTS], -1)
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-5 * float(got.abs().max()))
    assert all(p.requires_grad for p in model.parameters())


def test_kl_has_no_first_order_at_the_unablated_model(model):
    first = attribution.patching(model, PROMPTS, OFF, attribution.kl).abs().max()
    assert first < 1e-12 and moved(model, (0, 1), 1.0).min() > 1e-3
    # Half of the way is a quarter of the score: what grows with the square has no slope at 0.
    ratio = moved(model, (0, 1), 2e-4) / moved(model, (0, 1), 1e-4)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4), rtol=1e-3, atol=0)


def test_the_second_order_is_what_kl_begins_with(model):
    got = attribution.second_order_kl(model, PROMPTS, OFF, draws=300).mean(-1)
    true = torch.stack([moved(model, head, 1e-3).mean() * 1e6 for head in np.ndindex(3, 4)]).reshape(3, 4)
    torch.testing.assert_close(got.sum(), true.sum(), rtol=0.1, atol=0)  # tokens are drawn
    assert np.corrcoef(got.ravel(), true.ravel())[0, 1] > 0.98


def test_gradients_are_checked_before_anything_is_timed(monkeypatch):
    bench = top.Bench(top.SMOKE)
    checked = bench.check_gradients()
    assert max(checked.values()) < 1e-3 and bench.model.dtype == torch.float32
    right = attribution.patching
    monkeypatch.setattr(attribution, "patching", lambda *args: 1.1 * right(*args))
    with pytest.raises(RuntimeError, match="attribution is not what it says"):
        bench.check_gradients()


def test_rows_of_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    rows = top.run_case(top.SMOKE, repeats=1, console=Console(quiet=True))
    assert [json.loads(line) for line in (tmp_path / "top.jsonl").read_text().splitlines()] == rows
    by_path = {row["path"]: row for row in rows}
    assert (
        list(by_path)[:2] == [top.COMPLETE, top.SEARCH]
        and top.LAYERS in by_path
        and "2 of 10 prompts" in by_path
    )
    for row in rows:
        assert "failed" not in row and row["median_s"] > 0 and row["share_of_complete"] > 0 and row["commit"]
        assert all(0 <= share <= 1 for share in row["recall"].values()) and row["recall"]["3"] >= 0
    assert by_path[top.COMPLETE]["recall"] == {"3": 1, "5": 1} and by_path[top.SEARCH]["recall"] == {"3": 1}
    assert by_path[top.SEARCH]["certificate"] and by_path[top.COMPLETE]["layers"]


def test_wrong_scores_of_a_search_keep_their_row_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    right = top.Bench.search

    def wrong(self):
        found = right(self)
        found.scores[next(iter(found.exact))] += 0.01
        return found

    monkeypatch.setattr(top.Bench, "search", wrong)
    rows = top.run_case(top.SMOKE, repeats=1, console=Console(quiet=True))
    assert "differ from the complete scan's by 0.01" in rows[1]["failed"] and "failed" not in rows[2]


def test_recall_counts_heads_that_were_found():
    bench = top.Bench.__new__(top.Bench)
    bench.case, bench.complete = top.SMOKE, np.arange(12.0)[None].reshape(1, 3, 4)
    scores = np.full((3, 4), np.nan)
    scores[2] = [4, 3, 2, 1]  # every head of the top layer, in the wrong order
    assert bench.recall(top.Found(scores)) == {"3": 2 / 3, "5": 0.8}
    assert top.Found(scores).top(9) == {(2, h) for h in range(4)}


def test_races_are_rehearsed_on_kept_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    made = []

    def scanned(*_):
        made.append(1)
        rng = np.random.default_rng(0)
        x = rng.gamma(4, np.exp(rng.normal(-4, 1, (5, 9))), (32, 5, 9))
        return {"kl": x, "total_variation": np.clip(x, 0, 1)}

    monkeypatch.setattr(race, "_scanned", scanned)
    monkeypatch.setattr("shipsfast.models.loading.load_model", lambda *_, **__: None)
    monkeypatch.setattr(race, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(race, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr("tools.real.fetch.smollm2", lambda: "")
    first, again = race.smollm2(), race.smollm2()
    assert len(made) == 1 and np.allclose(first["kl"], again["kl"], rtol=1e-7)
    rows = race.run({"made up": race.smollm2}, 2, Console(quiet=True))
    assert [json.loads(line) for line in (tmp_path / "race.jsonl").read_text().splitlines()] == rows
    by_spread = [row for row in rows if row["bound"] == "studentised"]
    assert {(row["metric"], row["k"], row["error"]) for row in by_spread} == {
        (metric, k, error) for metric in race.METRICS for k in race.TOPS for error in race.ERRORS
    }
    assert all(row["whole"] == 1 and row["share"] < 1 and row["orders"] == 2 for row in by_spread)
    capped = [row for row in rows if row["bound"] != "studentised"]
    assert len(capped) == 1 and capped[0]["whole"] == 1 and capped[0]["share"] > 0.9


def test_the_kept_scores_are_of_the_prompts_beside_them():
    with np.load(provenance.RESULTS / race.STORED) as kept:
        assert kept["prompts"] == hashlib.sha256(race.MILD.read_bytes()).hexdigest()
        assert kept["kl"].shape == (64, 30, 9) and len(race.MILD.read_text().splitlines()) == 64


def test_the_page_has_the_committed_results():
    text = (provenance.ROOT / "docs" / "top-heads.md").read_text("utf-8")
    assert race.table() in text and top.table() in text, "run python -m benchmarks tables"


def test_tables_say_what_was_not_measured_and_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "not measured" in race.table() and "not measured" in top.table()
    row = {"case": top.SMOLLM2.name, "tokens": 9, "dtype": "float32", "heads": 4, "device": "x", "threads": 2,
           "versions": {"torch": "2"}, "date": "d", "commit": "c"}  # fmt: skip
    times = {"median_s": 2.0, "share_of_complete": 0.25}
    older = [row | times | {"path": top.COMPLETE, "recall": {"10": 0.5, "20": 0.5}}]
    rows = [
        row | times | {"path": top.COMPLETE, "recall": {"10": 1, "20": 1}},
        row | {"path": top.SEARCH, "failed": "no"},
    ]
    provenance.append("top", older + rows)
    text = top.table()
    assert (
        "| complete scan | 100% | 100% | 2.0 | 25% |" in text and "failed: no" in text and "50%" not in text
    )
