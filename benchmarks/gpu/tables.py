"""Tables of the GPU's rows for README.md and docs/performance.md. What nobody measured reads `not measured`, a target that
was missed says so, and figures of a result that did not pass its check stand for no target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import provenance
from .chunks import CASES as CHUNKS
from .kernel_attention import DECODES, TREES
from .kernel_kl import CASES as KL
from .kernel_small_ops import OPS
from .precision import CASE as PRECISION
from .rows import NOT_MEASURED, OURS, newest, number_cell, problem, read, reason, share_cell, time_cell
from .scans import LOOP, PEERS, SAHARA, SCANS

FLEX = "FlexAttention, compiled"
RATIO = "x shipsfast"
GENERATION = "llama2-7b-generation"


@dataclass(frozen=True)
class Target:
    """`value` reads it off the rows of a case by their paths, None where it cannot; at least `limit`, or at most."""

    case: str
    what: str
    limit: float
    value: Callable[[dict[str, dict]], float | None]
    form: str = "{:.0%}"
    at_least: bool = True

    def cells(self, rows: dict[str, dict]) -> str:
        ours_failed = problem(rows.get(OURS, {}))  # then times beside ours mean nothing either
        measured = self.value({} if ours_failed else {p: row for p, row in rows.items() if not problem(row)})
        sign = ">=" if self.at_least else "<="
        wanted = f"{sign} {self.form.format(self.limit)}"
        if measured is None:
            wrong = any(map(problem, rows.values())) and self.value(rows) is not None
            return f"{wanted} | {'a check failed' if wrong else NOT_MEASURED} | |"
        good = measured >= self.limit if self.at_least else measured <= self.limit
        return f"{wanted} | {self.form.format(measured)} | {'reached' if good else '**missed**'} |"


def _figure(path: str, name: str) -> Callable[[dict[str, dict]], float | None]:
    return lambda rows: rows.get(path, {}).get(name)


def _best_peer(rows: dict[str, dict]) -> float | None:
    """How many times slower the best peer is, if all were measured."""
    ratios = [rows.get(name, {}).get("times_slower_than_shipsfast") for name in PEERS]
    return None if None in ratios else min(ratios)


TARGETS = (
    *(
        Target(name, "share of the floor", 0.85, _figure(OURS, "share_of_floor"))
        for name in SCANS
        if name != "llama2-7b-template"
    ),
    Target("llama2-7b-short", "times the best peer", 3, _best_peer, "{:.2g}x"),
    Target(
        "llama2-7b-short", "times the reference", 100, _figure(LOOP, "times_slower_than_shipsfast"), "{:.3g}x"
    ),
    Target("llama2-7b-template", "times the best peer", 15, _best_peer, "{:.2g}x"),
    Target(
        SAHARA,
        "dataset-level scan, in KL scans",
        1.05,
        _figure("dataset-level scan", "scans"),
        "{:.2f}",
        False,
    ),
    Target(
        SAHARA, "three Sahara steps, in KL scans", 3.1, _figure("3 Sahara steps", "scans"), "{:.2f}", False
    ),
    Target(GENERATION, "share of the decode floor", 0.7, _figure(OURS, "share_of_floor")),
    Target(GENERATION, "full-generation scan, seconds", 600, _figure(OURS, "full_scan_s"), "{:.0f}", False),
    *(
        Target(name, "times FlexAttention", 1.3, _figure(FLEX, "times_slower_than_shipsfast"), "{:.2f}x")
        for name in (*TREES, *DECODES)
    ),
    *(Target(name, "share of copy bandwidth", 0.9, _figure(OURS, "share_of_ceiling")) for name in KL),
)
CASES = ("ceilings", *SCANS, *CHUNKS, SAHARA, GENERATION, *TREES, *DECODES, *KL, *OPS, PRECISION)


def devices() -> dict[str, list[dict]]:
    """Rows by results file, newest device first; smoke runs do not count."""
    found = {}
    for file in sorted(provenance.RESULTS.glob("*.jsonl")):
        rows = read(file)
        if rows and not file.stem.startswith("smoke"):
            found[file.stem] = rows
    return dict(sorted(found.items(), key=lambda item: item[1][-1]["date"], reverse=True))


def targets(rows: list[dict], cases: tuple[str, ...] = CASES) -> list[str]:
    lines = ["| case | target | | measured | |", "|---|---|---:|---:|---|"]
    for target in TARGETS:
        if target.case not in cases:
            continue
        lines.append(f"| {target.case} | {target.what} | {target.cells(newest(rows, target.case))}")
    return lines


COLUMNS = (
    ("time", time_cell),
    (RATIO, lambda row: number_cell(row, "times_slower_than_shipsfast", "{:.2f}")),
    ("share", share_cell),
    ("TFLOP/s", lambda row: number_cell(row, "tflops_per_s", "{:.0f}")),
    ("GB/s", lambda row: number_cell(row, "gb_per_s", "{:.0f}")),
    ("peak MiB (planned)", lambda row: _memory(row)),
    ("ran", lambda row: row.get("resolved_backend") or ""),
    ("layers", lambda row: row.get("layers") or ""),
    ("chunk, tokens", lambda row: number_cell(row, "chunk_tokens", "{}")),
)


def case_table(rows: dict[str, dict]) -> list[str]:
    """Every path of a case; columns that nobody fills are left out."""
    if not rows:
        return [NOT_MEASURED + "."]
    measured = [row for row in rows.values() if "failed" not in row and "not_measured" not in row]
    columns = [(name, cell) for name, cell in COLUMNS if any(cell(row) for row in measured)]
    if problem(rows.get(OURS, {})):
        columns = [column for column in columns if column[0] != RATIO]
    if any("spearman" in row for row in measured):
        columns += [
            ("top 10", lambda row: number_cell(row, "top10_overlap", "{:.0%}")),
            ("Spearman", lambda row: number_cell(row, "spearman", "{:.4f}")),
            ("noise floor, nats", lambda row: number_cell(row, "noise_floor_nats", "{:.2g}")),
        ]
    lines = ["| path |" + "".join(f" {name} |" for name, _ in columns), "|---|" + "---:|" * len(columns)]
    for path, row in rows.items():
        label = path + (
            f" (extrapolated from {row['extrapolated_from']})" if row.get("extrapolated_from") else ""
        )
        if row in measured:
            wrong = problem(row)
            label += f" **({wrong.replace('|', '/')})**" if wrong else ""
            lines.append(f"| {label} |" + "".join(f" {cell(row)} |" for _, cell in columns))
        else:
            lines.append(f"| {label} | {reason(row).replace('|', '/')} |" + " |" * (len(columns) - 1))
    first = next(iter(rows.values()))
    if first.get("floor_s"):
        lines += [
            "",
            f"Floor {first['floor_s']:.3g} s at {first['gemm_tflops_per_s']:.0f} TFLOP/s measured in the same run.",
        ]
    return lines


def _memory(row: dict) -> str:
    if row.get("peak_mib") is None:
        return ""
    planned = f" ({row['predicted_mib']:.0f})" if "predicted_mib" in row else ""
    return f"{row['peak_mib']:.0f}{planned}"


def origin(row: dict) -> str:
    commit = row["commit"] or f"unknown, sources {row['sources']}"
    versions = row["versions"]
    return (
        f"{row['device']}, driver {row.get('driver') or 'unknown'}, CUDA {row.get('cuda')}, torch {versions['torch']}, "
        f"triton {versions.get('triton')}, transformers {versions['transformers']}, {row['date']}, commit {commit}"
        + (" with uncommitted changes" if row["dirty"] else "")
    )


def readme() -> list[str]:
    """The targets of whole runs on the device that was measured last."""
    found = devices()
    lines = ["", "**On a GPU: what is to be reached, and what was**", ""]
    rows = next(iter(found.values()), [])
    if not rows:
        lines += [
            "No GPU has run this version: `benchmarks/first_light.sh DIR` on one measures the first of this, `python -m benchmarks gpu` all.",
            "",
        ]
    lines += targets(rows, (*SCANS, SAHARA, GENERATION))
    lines += [
        "",
        "Each path of each case, kernels alone and precision: [docs/performance.md](docs/performance.md).",
    ]
    if rows:
        lines += ["", f"{origin(rows[-1])}."]
    return lines


def document() -> str:
    """docs/performance.md's generated part: targets and every case, by device."""
    found = devices()
    lines: list[str] = []
    for name, rows in (found or {NOT_MEASURED: []}).items():
        heading = origin(rows[-1]) if rows else f"GPU: {NOT_MEASURED}"
        lines += [f"### {rows[-1]['device'] if rows else heading}", ""]
        lines += [f"{heading}. Rows: benchmarks/results/{name}.jsonl.", ""] if rows else []
        lines += [*targets(rows), ""]
        for case in CASES:
            title = f": {SCANS[case].title}" if case in SCANS else ""
            lines += [f"**{case}**{title}", "", *case_table(newest(rows, case)), ""]
    return "\n".join(lines)
