"""Tables of the GPU's rows for README.md and docs/performance.md. What nobody measured reads `not measured`, and a
target that was missed says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from .. import provenance
from .kernel_attention import DECODES, TREES
from .kernel_kl import CASES as KL
from .kernel_small_ops import OPS
from .precision import CASE as PRECISION
from .scans import LOOP, PEERS, SAHARA, SCANS
from .session import OURS

NOT_MEASURED = "not measured"
FLEX = "FlexAttention, compiled"
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
        measured = self.value(rows)
        sign = ">=" if self.at_least else "<="
        wanted = f"{sign} {self.form.format(self.limit)}"
        if measured is None:
            return f"{wanted} | {NOT_MEASURED} | |"
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
CASES = ("ceilings", *SCANS, SAHARA, GENERATION, *TREES, *DECODES, *KL, *OPS, PRECISION)


def devices() -> dict[str, list[dict]]:
    """Rows by results file, newest device first; smoke runs do not count."""
    found = {}
    for file in sorted(provenance.RESULTS.glob("*.jsonl")):
        rows = [
            row for row in map(json.loads, file.read_text("utf-8").splitlines()) if row.get("bench") == "gpu"
        ]
        if rows and not file.stem.startswith("smoke"):
            found[file.stem] = rows
    return dict(sorted(found.items(), key=lambda item: item[1][-1]["date"], reverse=True))


def newest(rows: list[dict], case: str) -> dict[str, dict]:
    """By path: the newest row that was measured or failed; one that was not even begun counts only if it is alone."""
    out: dict[str, dict] = {}
    for row in rows:
        if row["case"] != case:
            continue
        if "not_measured" in row and "not_measured" not in out.get(row["path"], {"not_measured": ""}):
            continue
        out[row["path"]] = row
    return out


def targets(rows: list[dict], cases: tuple[str, ...] = CASES) -> list[str]:
    lines = ["| case | target | | measured | |", "|---|---|---:|---:|---|"]
    for target in TARGETS:
        if target.case not in cases:
            continue
        lines.append(f"| {target.case} | {target.what} | {target.cells(newest(rows, target.case))}")
    return lines


COLUMNS = (
    ("time", lambda row: _time(row)),
    ("x shipsfast", lambda row: _number(row, "times_slower_than_shipsfast", "{:.2f}")),
    (
        "share",
        lambda row: _number(row, "share_of_floor", "{:.0%}") or _number(row, "share_of_ceiling", "{:.0%}"),
    ),
    ("TFLOP/s", lambda row: _number(row, "tflops_per_s", "{:.0f}")),
    ("GB/s", lambda row: _number(row, "gb_per_s", "{:.0f}")),
    ("peak MiB (planned)", lambda row: _memory(row)),
    ("ran", lambda row: row.get("resolved_backend") or ""),
    ("layers", lambda row: row.get("layers") or ""),
)


def case_table(rows: dict[str, dict]) -> list[str]:
    """Every path of a case; columns that nobody fills are left out."""
    if not rows:
        return [NOT_MEASURED + "."]
    measured = [row for row in rows.values() if "failed" not in row and "not_measured" not in row]
    columns = [(name, cell) for name, cell in COLUMNS if any(cell(row) for row in measured)]
    if any("spearman" in row for row in measured):
        columns += [
            ("top 10", lambda row: _number(row, "top10_overlap", "{:.0%}")),
            ("Spearman", lambda row: _number(row, "spearman", "{:.4f}")),
            ("noise floor, nats", lambda row: _number(row, "noise_floor_nats", "{:.2g}")),
        ]
    lines = ["| path |" + "".join(f" {name} |" for name, _ in columns), "|---|" + "---:|" * len(columns)]
    for path, row in rows.items():
        label = path + (
            f" (extrapolated from {row['extrapolated_from']})" if row.get("extrapolated_from") else ""
        )
        why = (
            row.get("failed")
            and f"failed: {row['failed']}"
            or row.get("not_measured")
            and f"{NOT_MEASURED}: {row['not_measured']}"
        )
        if why:
            lines.append(f"| {label} | {why.replace('|', '/')} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {label} |" + "".join(f" {cell(row)} |" for _, cell in columns))
    first = next(iter(rows.values()))
    if first.get("floor_s"):
        lines += [
            "",
            f"Floor {first['floor_s']:.3g} s at {first['gemm_tflops_per_s']:.0f} TFLOP/s measured in the same run.",
        ]
    return lines


def _time(row: dict) -> str:
    if "median_s" in row:
        return f"{row['median_s']:.2f} s"
    return f"{row['median_ms']:.3f} ms" if "median_ms" in row else ""


def _number(row: dict, name: str, form: str) -> str:
    return "" if row.get(name) is None else form.format(row[name])


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
        lines += ["No GPU has run this version: `python -m benchmarks gpu` on one fills this table.", ""]
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
