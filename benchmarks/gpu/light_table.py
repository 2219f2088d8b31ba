"""`python -m benchmarks gpu-table DIR`: what a folder of the GPU benchmark's rows says, a line for each path.

Made to be the last thing on a terminal: short, and printed with nothing but the standard library, whatever else is
broken. Exit code 0 if something was measured, also something wrong; 3 if nothing was; 2 without a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import rows as words

STAGES = "stages.txt"  # written by benchmarks/first_light.sh, a line for each stage
NOT_FIGURES = ("build", "tests")
REASON = 100  # characters
HEADER = ("case", "path", "time", "share", "x ours", "check", "note")
WIDTHS = (20, 34, 11, 6, 7, 7, 0)
NOTES = (
    ("tflops_per_s", "{:.0f} TFLOP/s"), ("burst_tflops_per_s", "{:.0f} in a burst"), ("gb_per_s", "{:.0f} GB/s"),
    ("gemm_tflops_per_s", "floor at {:.0f} TFLOP/s"), ("rows_per_s", "{:.1f} rows/s"), ("chunk_tokens", "chunk {}"),
    ("layers", "layers {}"), ("timed_by", "{}"), ("spearman", "Spearman {:.4f}"), ("passed", "{} passed"),
    ("failed_tests", "{} failed"), ("extrapolated_from", "from {}"), ("busy_s", "{:.2f} s busy"),
)  # fmt: skip


def read_folder(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.jsonl")) for row in words.read(file)]


def table(rows: list[dict]) -> list[str]:
    """A header, and a line for the newest row of each case and path."""
    lines = [_line(HEADER)]
    for case in dict.fromkeys(row["case"] for row in rows):
        paths = words.newest(rows, case)
        ours_failed = words.problem(paths.get(words.OURS, {}))
        lines += [_line(_cells(row, bool(ours_failed))) for row in paths.values()]
    return lines


def _cells(row: dict, ours_failed: bool) -> tuple[str, ...]:
    ratio = "" if ours_failed else words.number_cell(row, "times_slower_than_shipsfast", "{:.2f}")
    check = "WRONG" if words.problem(row) else "ok" if row.get("check") else ""
    notes = [form.format(row[name]) for name, form in NOTES if row.get(name) not in (None, "")]
    why = words.reason(row)
    note = why[:REASON] if why else ", ".join(notes)
    if "failed" in row:
        check = "FAILED"
    return row["case"], row["path"], words.time_cell(row), words.share_cell(row), ratio, check, note


def _line(cells: tuple[str, ...]) -> str:
    return " ".join(
        f"{cell:{width}.{width}}" if width else cell for cell, width in zip(cells, WIDTHS, strict=True)
    ).rstrip()


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if len(argv) == 1 and not argv[0].startswith("-") else None
    if folder is None or not folder.is_dir():
        print("usage: python -m benchmarks gpu-table DIR, a folder that --results named", file=sys.stderr)
        return 2
    rows = read_folder(folder)
    stages = folder / STAGES
    print(*(stages.read_text("utf-8").splitlines() if stages.is_file() else []), *table(rows), sep="\n")
    last = {(row["case"], row["path"]): row for row in rows}.values()
    figures = [row for row in last if words.timed(row) and row["case"] not in NOT_FIGURES]
    bad = [row for row in last if words.problem(row)]
    missing = [row for row in last if "not_measured" in row]
    device = (
        ", ".join(dict.fromkeys(f"{row['device']}, commit {row['commit']}" for row in rows)) or "no device"
    )
    print(f"{len(figures)} measured, {len(bad)} failed or wrong, {len(missing)} not measured; {device}")
    return 0 if figures else 3
