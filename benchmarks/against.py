"""What benchmarks of scans share: scores held against an oracle, rows beside a floor of arithmetic, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from .timing import Paths


class Oracle:
    """Scores in float64, and how far each path was from them. of: the scores of what a path returned."""

    def __init__(self, scores, of: Callable, tolerance_nats: float) -> None:
        self.expected, self.of, self.tolerance = of(scores), of, tolerance_nats
        self.errors: dict[str, float] = {}

    def check(self, name: str, scores) -> str | None:
        """Why a path's scores do not count, None if they do."""
        error = float(np.nanmax(np.abs(self.of(scores) - self.expected)))
        self.errors[name] = max(self.errors.get(name, 0.0), error)
        if self.errors[name] <= self.tolerance:
            return None
        return f"scores differ from the float64 oracle by {self.errors[name]:.2g} nats"


def floor_rows(
    common: dict,
    paths: Paths,
    oracle: Oracle,
    scores: int,
    flops: float,
    rates: Sequence[float],
    *,
    ours: str,
    extrapolated: dict,
) -> list[dict]:
    """One row for each path. rates: FLOP/s around each run of ours; extrapolated: path -> from what."""
    rate = statistics.median(rates)
    common = common | {"gemm_gflops_per_s": round(rate / 1e9, 1), "floor_s": round(flops / rate, 4)}
    rows = []
    for name, taken in paths.times.items():
        row = common | {"path": name, "max_abs_error_nats": oracle.errors.get(name)} | paths.figures(name)
        if "failed" not in row:
            row |= {
                "scores_per_s": round(scores / statistics.median(taken), 1),
                "share_of_floor": round(share(flops, taken, rates if name == ours else [rate]), 4),
                "extrapolated_from": extrapolated.get(name),
            }
        rows.append(row)
    return rows


def share(flops: float, times: Sequence[float], rates: Sequence[float]) -> float:
    """Median over runs of floor / time, the floor at the rate measured around that run."""
    if len(rates) == 1:
        return flops / rates[0] / statistics.median(times)
    return statistics.median(flops / r / t for t, r in zip(times, rates, strict=True))


def show(case: str, scores: int, rows: list[dict], console: Console) -> None:
    title = f"{case}: {scores} scores, floor {rows[0]['floor_s']:.2f} s"
    table = Table(title=title, title_justify="left")
    peaks = any("peak_mib" in row for row in rows)
    columns = [
        "path",
        "median s",
        "p20",
        "p80",
        "scores/s",
        "x shipsfast",
        "of floor",
        "max error, nats",
        *["peak MiB"] * peaks,
    ]
    for name in columns:
        table.add_column(name, justify="left" if name == "path" else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["path"], "failed: " + row["failed"])
            continue
        sampled = f" (extrapolated from {row['extrapolated_from']})" if row["extrapolated_from"] else ""
        table.add_row(
            row["path"] + sampled, f"{row['median_s']:.3f}", f"{row['p20_s']:.3f}", f"{row['p80_s']:.3f}",
            f"{row['scores_per_s']:.0f}", f"{row['times_slower_than_shipsfast']:.2f}", f"{row['share_of_floor']:.0%}",
            f"{row['max_abs_error_nats']:.1e}", *[f"{row.get('peak_mib', float('nan')):.0f}"] * peaks,
        )  # fmt: skip
    console.print(table)
