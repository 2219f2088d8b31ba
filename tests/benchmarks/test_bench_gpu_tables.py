"""The GPU's tables: what was not measured says so, a missed target is shown as missed."""

import json

import pytest

from benchmarks import provenance, tables
from benchmarks.gpu import tables as gpu
from benchmarks.gpu.scans import LOOP, PEERS

BASE = {
    "bench": "gpu", "device": "NVIDIA H200", "driver": "580", "cuda": "13.0", "commit": None, "sources": "abc", "dirty": None,
    "date": "2026-12-01", "versions": {"torch": "2.11", "triton": "3.6", "transformers": "5.17"},
}  # fmt: skip


def row(case, path, **figures) -> dict:
    return BASE | {"case": case, "path": path} | figures


def scan_rows(share=0.8, ratio=3.5):
    ours = row(
        "llama2-7b-short", "shipsfast", median_s=17.0, share_of_floor=share, times_slower_than_shipsfast=1.0,
        floor_s=14.2, gemm_tflops_per_s=780.0, peak_mib=20000.0, predicted_mib=21000.0, resolved_backend="triton",
    )  # fmt: skip
    peers = [
        row("llama2-7b-short", name, median_s=60.0, times_slower_than_shipsfast=ratio + number)
        for number, name in enumerate(PEERS)
    ]
    loop = row(
        "llama2-7b-short", LOOP, median_s=2400.0, times_slower_than_shipsfast=141.0, extrapolated_from="90 of 102500 passes"
    )  # fmt: skip
    return [ours, *peers, loop]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)

    def write(rows, name="nvidia-h200"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    return write


def test_without_rows_everything_is_not_measured(results):
    results([row("llama2-7b-short", "shipsfast", median_s=1.0, share_of_floor=1.0)], "smoke-cpu")
    text = "\n".join(gpu.readme())
    assert "No GPU has run this version" in text
    assert text.count("not measured") == sum(
        t.case not in (*gpu.TREES, *gpu.DECODES, *gpu.KL) for t in gpu.TARGETS
    )
    assert "reached" not in text.replace("to be reached", "")
    assert gpu.document().count("not measured.") == len(gpu.CASES)


def test_reached_and_missed(results):
    results(scan_rows())
    text = gpu.document()
    assert "| llama2-7b-short | share of the floor | >= 85% | 80% | **missed** |" in text
    assert "| llama2-7b-short | times the best peer | >= 3x | 3.5x | reached |" in text
    assert "| llama2-7b-short | times the reference | >= 100x | 141x | reached |" in text
    assert "(extrapolated from 90 of 102500 passes)" in text and "20000 (21000)" in text and "triton" in text
    assert "Floor 14.2 s at 780 TFLOP/s" in text and "commit unknown, sources abc" in text
    results(scan_rows(share=0.9, ratio=2.0))
    text = gpu.document()
    assert "| 90% | reached |" in text and "| 2x | **missed** |" in text


def test_a_best_peer_needs_all_peers(results):
    results([r for r in scan_rows() if r["path"] != next(iter(PEERS))])
    assert "times the best peer | >= 3x | not measured | |" in gpu.document()


def test_what_failed_or_did_not_fit_is_told(results):
    rows = scan_rows()
    rows += [
        row("qwen3-8b", "shipsfast", failed="out of memory: a | b"),
        row("gemma2-9b", "shipsfast", not_measured="3 s left"),
    ]
    results(rows)
    text = gpu.document()
    assert (
        "| shipsfast | failed: out of memory: a / b |" in text
        and "| shipsfast | not measured: 3 s left |" in text
    )


def test_a_result_that_failed_its_check_is_marked_and_reaches_no_target(results):
    rows = scan_rows(share=0.99, ratio=9.0)
    rows[0] |= {"check": "failed: scores differ | by 0.1"}
    results(rows)
    text = gpu.document()
    assert "| shipsfast **(check failed: scores differ / by 0.1)** | 17.00 s | 99% |" in text
    for what in (
        "share of the floor | >= 85%",
        "times the best peer | >= 3x",
        "times the reference | >= 100x",
    ):
        assert f"| llama2-7b-short | {what} | a check failed | |" in text
    table = gpu.case_table(gpu.newest(rows, "llama2-7b-short"))
    assert "x shipsfast" not in table[0], "ratios to a wrong result"
    assert "reached" not in "\n".join(gpu.readme()).replace("to be reached", "")
    assert "99%" not in "\n".join(gpu.readme()) and "9x" not in "\n".join(gpu.readme())


def test_a_result_that_was_never_checked_reaches_no_target(results):
    """Its process was ended between the time and the verdict."""
    rows = scan_rows(share=0.99)
    rows[0] |= {"check": "pending"}
    results(rows)
    assert "| shipsfast **(never checked)** |" in gpu.document()
    assert "| a check failed | |" in "\n".join(gpu.readme())
    results([*rows, rows[0] | {"check": "passed"}])
    assert "| 99% | reached |" in "\n".join(gpu.readme())


def test_a_peer_that_is_off_is_not_the_best(results):
    rows = scan_rows()
    rows[1] |= {"check": "failed: wrong"}
    results(rows)
    text = gpu.document()
    assert "times the best peer | >= 3x | a check failed | |" in text
    assert "| share of the floor | >= 85% | 80% |" in text and " x shipsfast |" in text


def test_a_line_that_was_cut_off_is_no_row(results, tmp_path):
    results(scan_rows())
    with open(tmp_path / "nvidia-h200.jsonl", "a") as file:
        file.write('{"bench": "gpu", "case": "llama')
    assert "| 80% | **missed** |" in gpu.document()


def test_a_later_run_that_did_not_get_to_a_case_leaves_its_figures(results):
    rows = scan_rows()
    late = row("llama2-7b-short", "shipsfast", not_measured="0 s left")
    assert gpu.newest([*rows, late], "llama2-7b-short")["shipsfast"]["share_of_floor"] == 0.8
    failed = row("llama2-7b-short", "shipsfast", failed="wrong")
    assert gpu.newest([*rows, failed], "llama2-7b-short")["shipsfast"]["failed"] == "wrong"


def test_targets_name_cases_and_paths_that_exist():
    assert {target.case for target in gpu.TARGETS} <= set(gpu.CASES)


def test_the_committed_page_is_generated():
    text = (provenance.ROOT / "docs" / "performance.md").read_text("utf-8")
    assert gpu.document() in text, "run python -m benchmarks tables"
    assert "\n".join(gpu.readme()) in tables.render()
