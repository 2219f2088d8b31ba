"""The benchmark's own code, on a shape small enough for a test."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

import shipsfast
from benchmarks import cpu, floor, peers, provenance, sahara, tables
from benchmarks.cases import CPU_CASES, SMOKE_CASES

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


def test_sahara_row(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    row = sahara.run_case(CASE, repeats=1, console=Console(quiet=True))
    assert provenance.newest("sahara", CASE.name) == row
    assert row["search_to_scan"] > 0 and row["steps"] == 3 and row["commit"]


def test_floor_counts_what_a_scan_does():
    """By hand for the smoke case: 2 layers x 2 heads, d 32, m 64, V 50; 3 prompts of 2 shared + 3 own tokens."""
    tokens, linear = 2 + 3 * 3, 2 * (4 * 32**2 + 3 * 32 * 64)
    seen = 1 + 2 + 3 * (3 + 4 + 5)
    first = 3 * (tokens * linear + 4 * 32 * seen)
    last = 5 * (tokens * 4 * 32**2 + 3 * (linear - 4 * 32**2) + 4 * 32 * 3 * 5)
    assert floor.floor_flops(CASE) == first + last + 5 * 3 * 2 * 32 * 50


def test_floors_of_the_published_cases():
    """DESIGN.md's arithmetic: 2.7x and 6.1x less work than full forwards."""
    ratios = [floor.brute_force_flops(c) / floor.floor_flops(c) for c in CPU_CASES]
    assert ratios == pytest.approx([2.7, 6.1], abs=0.1)


def test_unmeasured_figures_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    assert "not measured" in tables.render()


def test_readme_tables_are_the_committed_results():
    text = (provenance.ROOT / "README.md").read_text("utf-8")
    assert tables.render() in text, "run python -m benchmarks tables"
