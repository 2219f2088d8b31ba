"""What a row of the GPU benchmark says: whether it holds, and the words for it. Nothing but the standard library is
imported here, so that a table can be printed where the rest cannot even be loaded.

A row has figures, or `failed`, or `not_measured`, with the reason. Where a result was held against a better one, `check`
has the verdict: "passed", "failed: ...", or PENDING in a row that was written before its check and never followed by
the one that has the verdict.
"""

from __future__ import annotations

import json
import math
import numbers
from pathlib import Path

OURS = "shipsfast"
NOT_MEASURED = "not measured"
PASSED, PENDING = "passed", "pending"


def verdict(problem: str | None) -> str:
    """The field `check` for what is wrong with a result, None for nothing."""
    return PASSED if problem is None else f"failed: {problem}"


def held(error: float, allowed: float, against: str, unit: str = "") -> dict:
    """Figures of a result whose largest error is that; what is no number is never allowed."""
    wrong = None
    if not error <= allowed:
        wrong = f"differs from {against} by {error:.3g}{unit.replace('_', ' ')}, allowed are {allowed:.3g}"
    return {"check": verdict(wrong), f"max_abs_error{unit}": error, f"allowed_error{unit}": allowed}


def problem(row: dict) -> str | None:
    """Why a row's figures do not count: it failed, or its check did. None also where it was not measured."""
    if row.get("failed"):
        return f"failed: {row['failed']}"
    check = row.get("check", PASSED)
    if check == PASSED:
        return None
    return "never checked" if check == PENDING else f"check {check}"


def reason(row: dict) -> str | None:
    """Why a row has no figures that count, None if it has."""
    if row.get("not_measured"):
        return f"{NOT_MEASURED}: {row['not_measured']}"
    return problem(row)


def timed(row: dict) -> bool:
    """Whether there is a time or a rate in it, also one that does not count."""
    return any(row.get(name) is not None for name in ("median_s", "median_ms", "tflops_per_s"))


def finite(value):
    """The same without numbers that JSON has no word for: they become None."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, numbers.Real) and not math.isfinite(value) else value


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


def read(file: Path) -> list[dict]:
    """The GPU benchmark's rows of a file; a line that was cut off when its writer was ended is none."""
    rows = []
    for line in file.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("bench") == "gpu":
            rows.append(row)
    return rows


def time_cell(row: dict) -> str:
    if row.get("median_s") is not None:
        return f"{row['median_s']:.2f} s"
    return f"{row['median_ms']:.3f} ms" if row.get("median_ms") is not None else ""


def number_cell(row: dict, name: str, form: str) -> str:
    return "" if row.get(name) is None else form.format(row[name])


def share_cell(row: dict) -> str:
    return number_cell(row, "share_of_floor", "{:.0%}") or number_cell(row, "share_of_ceiling", "{:.0%}")
