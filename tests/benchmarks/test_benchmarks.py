"""The benchmark's own code, on a shape small enough for a test."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import shipsfast
from benchmarks import beyond, cpu, floor, generation, half, peers, provenance, sahara, small, stream, tables
from benchmarks.cases import ANSWER_SMOKE, CPU_CASES, GENERATION_CASES, GENERATION_SMOKE, SMOKE_CASES
from shipsfast.engine.flops import scan_flops
from shipsfast.ops.prefix_tree import pack
from tests.support.reads_oracle import Reads, with_answers

CASE = SMOKE_CASES[0]


@pytest.mark.parametrize(
    "peer", [peers.hooks_batched, peers.row_masks, peers.skip_lower_layers, peers.one_at_a_time]
)
def test_peers_measure_the_same_thing(peer):
    model = CASE.model().double()
    got = peer(model, torch.tensor(CASE.token_ids())).permute(2, 0, 1)
    expected = shipsfast.scan(model, CASE.token_ids(), progress=False).kl
    np.testing.assert_allclose(got, expected, atol=1e-6)  # the peers' KL is in float32


def test_a_run_appends_rows_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    rows = cpu.run_case(CASE, repeats=2, peaks=False, console=Console(quiet=True))
    assert [r["path"] for r in rows] == [cpu.OURS, *cpu.PEERS, cpu.LOOP]
    written = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert written == rows
    for row in rows:
        assert "failed" not in row and row["median_s"] > 0 and row["versions"]["torch"] == torch.__version__
        assert {"commit", "dirty", "device", "threads", "floor_s", "share_of_floor"} <= row.keys()


def test_a_path_that_fails_keeps_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setitem(cpu.PEERS, "layers >= l only, by hand", lambda model, case: np.full((3, 2, 2), 5.0))
    rows = cpu.run_case(CASE, repeats=1, peaks=False, console=Console(quiet=True))
    assert "differ from the float64 oracle" in rows[3]["failed"]


def test_half_precision_rows_and_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "Half precision" not in tables.render()
    rows = half.run(Console(quiet=True), repeats=1, smoke=True)
    assert [row["path"] for row in rows] == [half.OURS, half.OWN_LAYERS, half.FLOAT32, *half.PEERS]
    ours, own, single, *peers_rows = rows
    assert all("failed" not in row and row["times_slower_than_shipsfast"] > 0 for row in rows)
    assert (
        ours["layers"] == "fused_fp32_residual" and own["layers"] == "model" and single["layers"] == "fused"
    )
    errors = [row["rms_error_sqrt_nats"] for row in rows]
    assert errors[2] < errors[0] < errors[1] and min(errors[3:]) > errors[0]
    assert not any(row["noise_floor_nats"] for row in peers_rows)
    monkeypatch.setattr(tables, "CPU_CASES", (CASE,))
    assert tables.render().count("**Half precision on a CPU") == 1


def test_sahara_row(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    row = sahara.run_case(CASE, repeats=1, console=Console(quiet=True))
    assert provenance.newest("sahara", CASE.name) == row
    assert row["search_to_scan"] > 0 and row["steps"] == 3 and row["commit"]


def test_stream_row_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "Streamed" not in tables.render()
    row = stream.run_case(CASE, repeats=1, console=Console(quiet=True))
    assert provenance.newest("stream", CASE.name) == row
    assert row["equal_bits"] and row["stream_to_memory"] > 0 and row["one_reading_s"] > 0 and row["commit"]
    monkeypatch.setattr(tables, "CPU_CASES", (CASE,))
    assert "Streamed from the checkpoint" in tables.render()


def test_fixed_costs_and_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "Fixed costs" not in tables.render()
    monkeypatch.setattr(small, "STARTS", {small.PYTHON: small.STARTS[small.PYTHON]})
    monkeypatch.setattr(small, "PROCESSES", 1)
    start, scan = small.run(repeats=2, real=False, console=Console(quiet=True))
    assert (
        provenance.newest("small", small.EMBEDDED) == scan
        and provenance.newest("small", small.PYTHON) == start
    )
    assert 0 < start["least_s"] <= start["median_s"] and 0 < start["least_cpu_s"]
    assert "failed" not in scan and scan["max_abs_difference"] == 0 and scan["scores"] == 16
    # Its imports, and the threads' first words: more than the scan itself.
    assert scan["first_to_next_cpu"] > 1 and scan["layers"] == "fused"
    assert "| embedded model, 1 prompt | " in tables.render()


def test_a_scan_that_fails_keeps_its_row(monkeypatch):
    row = small.scans("no such case", processes=1, repeats=0)
    assert row["case"] == "no such case" and row["failed"]


@pytest.mark.parametrize("way", [beyond.rows_of_a_layer, beyond.rows_of_all_heads, beyond.published_loop])
def test_ways_with_a_cache_equal_plain_passes(way):
    """The published way measures what `at="end"` means: the head is off at the newest token, the cache is not."""
    model, shape = ANSWER_SMOKE.model().double(), ANSWER_SMOKE.shape
    sequences = with_answers(shape.token_ids(), ANSWER_SMOKE.answers())
    expected = np.stack(Reads(model, *sequences, "zero", at="end").scores("log_prob_diff"))
    got = way(model, ANSWER_SMOKE)
    known = np.isfinite(got)
    assert known.mean() == (0.5 if way is beyond.published_loop else 1) and abs(expected).max() > 0.1
    np.testing.assert_allclose(got[known], expected[known], rtol=0, atol=1e-12)


def test_answer_rows_and_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "newest token" not in tables.render()
    rows = beyond.run_case(ANSWER_SMOKE, repeats=1, console=Console(quiet=True))
    assert [r["path"] for r in rows] == [beyond.OURS, *beyond.PEERS, beyond.LOOP]
    assert provenance.latest("beyond", ANSWER_SMOKE.name) == rows
    for row in rows:
        assert "failed" not in row and row["scores_per_s"] > 0 and row["share_of_floor"] > 0 and row["commit"]
        assert row["max_abs_error_nats"] < beyond.TOLERANCE_NATS
    assert rows[-1]["extrapolated_from"] == "2 heads" and rows[0]["resolved_backend"]
    monkeypatch.setattr(tables, "ANSWER_CASES", (ANSWER_SMOKE,))
    text = tables.render()
    assert text.count("**Off at the newest token only") == 1 and f"{beyond.LOOP} (extrapolated) | " in text


def test_wrong_answer_scores_keep_their_row_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    name = next(iter(beyond.PEERS))
    monkeypatch.setitem(beyond.PEERS, name, lambda model, case: np.full((3, 4, 2, 2), 5.0))
    rows = beyond.run_case(ANSWER_SMOKE, repeats=1, console=Console(quiet=True))
    assert "differ from the float64 oracle" in rows[1]["failed"] and "failed" not in rows[2]


def test_generation_rows_and_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "Generation" not in tables.render()
    rows = generation.run_case(GENERATION_SMOKE, repeats=1, console=Console(quiet=True))
    assert [r["path"] for r in rows] == [generation.OURS, *generation.PEERS, generation.LOOP]
    assert provenance.latest("generation", GENERATION_SMOKE.name) == rows
    for row in rows:
        assert "failed" not in row and row["tokens_per_s"] > 0 and row["commit"]
        assert row["max_shortfall_std"] <= 1e-4 and row["equal_share"] == 1
    assert rows[-1]["extrapolated_from"] == "18 tokens" and rows[0]["resolved_backend"]
    monkeypatch.setitem(GENERATION_CASES, "village", GENERATION_SMOKE)
    text = tables.render()
    assert text.count("**Generation: ") == 1 and f"{generation.LOOP} (extrapolated) | " in text


def test_texts_of_the_smoke_case_show_the_ablation():
    texts = generation.ours(generation.Job(GENERATION_SMOKE))
    assert len({str(row) for group in texts for row in group}) > GENERATION_SMOKE.prompts


def test_a_wrong_text_keeps_its_row_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    first, second = generation.PEERS

    def wrong(job):
        texts = generation.by_group(job)
        texts[1][0][-1] = (texts[1][0][-1] + 1) % 50
        return texts

    monkeypatch.setitem(generation.PEERS, first, wrong)
    monkeypatch.setitem(
        generation.PEERS, second, lambda job: [[row[:3] for row in g] for g in generation.ours(job)]
    )
    rows = generation.run_case(GENERATION_SMOKE, repeats=1, console=Console(quiet=True))
    assert "not those of a float64 pass" in rows[1]["failed"]
    assert rows[2]["failed"] == "not every row has 6 tokens" and "failed" not in rows[3]


def test_the_loop_is_measured_at_lengths_all_along_the_text():
    job = generation.Job(GENERATION_SMOKE)
    said = generation.published_loop(job, generation.ours(job))
    assert [s.at for s in said if s.prompt == 0] == list(range(6))
    lengths = [int((i + 0.5) * 64 / 8 - 0.5) for i in range(8)]
    assert lengths == [3, 11, 19, 27, 35, 43, 51, 59]
    assert len({s.group for s in said}) > 1


def test_words_without_meaning_survive_decoding():
    """The loop's text must be that of its tokens."""
    tokenizer = GENERATION_SMOKE.tokenizer()
    ids = [3, 0, 49, 7]
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


def test_floor_counts_what_a_scan_does():
    """By hand for the smoke case: 2 layers x 2 heads, d 32, m 64, V 50; 3 prompts of 2 shared + 3 own tokens."""
    tokens, linear = 2 + 3 * 3, 2 * (4 * 32**2 + 3 * 32 * 64)
    seen = 1 + 2 + 3 * (3 + 4 + 5)
    fork = 2 * (
        16 * 32 + 32 * 128 + 64 * 32
    )  # a head's slice of the output projection, the MLP; rank 16 does not pay
    first = tokens * linear + 2 * 4 * 32 * seen + 2 * tokens * fork  # attention once more, with all heads off
    last = (
        3 * (tokens * 4 * 32**2 + 3 * (linear - 4 * 32**2) + 4 * 32 * 3 * 5) + 4 * 32 * 3 * 5 + 2 * 3 * fork
    )
    assert floor.floor_flops(CASE) == first + last + 5 * 3 * 2 * 32 * 50


def test_floor_of_answers_counts_what_a_scan_does():
    """By hand for 2 layers x 2 heads, d 32, m 64, V 50; 3 prompts of 2 shared + 3 own tokens, each with 4 answer tokens, of
    which the last is only read."""
    tokens, reads, linear = 2 + 3 * (3 + 3), 3 * 4, 2 * (4 * 32**2 + 3 * 32 * 64)
    seen = 1 + 2 + 3 * (3 + 4 + 5 + 6 + 7 + 8)
    at_reads = 3 * (5 + 6 + 7 + 8)
    fork = 2 * (16 * 32 + 32 * 128 + 64 * 32)
    base = (
        tokens * linear + 4 * 32 * seen + tokens * 2 * 2 * 32**2
    )  # all of the first layer; keys and values of the last
    first = reads * linear + 2 * 4 * 32 * at_reads + 2 * reads * fork
    last = 3 * (reads * linear + 4 * 32 * at_reads) + 4 * 32 * at_reads + 2 * reads * fork
    assert floor.answer_floor_flops(ANSWER_SMOKE) == base + first + last + 5 * reads * 2 * 32 * 50


def test_floors_of_the_published_cases():
    """2.7x and 6.1x less work than full forwards where rows that fork pass their layer in full, and less in fused layers."""
    ratios = [floor.brute_force_flops(c) / floor.floor_flops(c) for c in CPU_CASES]
    assert ratios == pytest.approx([3.0, 6.8], abs=0.1)
    for case, ratio in zip(CPU_CASES, [2.7, 6.1], strict=True):
        own = [replace(layer, forks=None) for layer in floor.costs(case).layers]
        whole = scan_flops(
            replace(floor.costs(case), layers=tuple(own)), [pack(case.token_ids())], case.units
        )
        assert floor.brute_force_flops(case) / whole == pytest.approx(ratio, abs=0.1)


def test_unmeasured_figures_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "not measured" in tables.render()


def test_readme_tables_are_the_committed_results():
    text = (provenance.ROOT / "README.md").read_text("utf-8")
    assert tables.render() in text, "run python -m benchmarks tables"
