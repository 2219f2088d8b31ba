"""Fixed costs: how long it takes before there is work to do, a scan that is hardly any work, and the first scan beside the next.

Starts of Python are timed from outside, with the CPU time of the process. Scans are timed in a process of their own that has
loaded the model before: the first call of `shipsfast.scan` with all that it imports, then the same call again. Wall time is what
a user waits for, CPU time what is left of it where others keep the machine busy.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from .provenance import ROOT, append, provenance

PYTHON = "python -c pass"  # what no program can begin in less than
STARTS = {
    PYTHON: ("-c", "pass"),
    "import shipsfast": ("-c", "import shipsfast"),
    "shipsfast --help": ("-m", "shipsfast", "--help"),
    "shipsfast scan --help": ("-m", "shipsfast", "scan", "--help"),
    "shipsfast scan, no such file": ("-m", "shipsfast", "scan", "nowhere", "nowhere.csv"),
}
EMBEDDED, REAL = "embedded model, 1 prompt", "SmolLM2-135M-Instruct, 8 prompts"
REAL_PROMPTS = 8
PROCESSES, REAL_REPEATS = 3, 3  # each has a first scan


def timed(run: Callable, who: int) -> tuple[float, float, object]:
    """Wall and CPU seconds, the second of this process or of its children, and what `run` gave."""
    before, start = resource.getrusage(who), time.perf_counter()
    found = run()
    wall, after = time.perf_counter() - start, resource.getrusage(who)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, found


def figures(taken: list[tuple[float, float]], name: str = "") -> dict:
    """taken: wall and CPU seconds of each repetition."""
    wall, cpu = zip(*taken, strict=True)
    return {
        f"{name}median_s": round(statistics.median(wall), 4), f"{name}least_s": round(min(wall), 4),
        f"{name}median_cpu_s": round(statistics.median(cpu), 4), f"{name}least_cpu_s": round(min(cpu), 4),
    }  # fmt: skip


def starts(repeats: int) -> list[dict]:
    """In turns, each in a fresh process."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for at in range(repeats + 1):
        for name, arguments in STARTS.items():
            command = [sys.executable, *arguments]
            wall, cpu, _ = timed(
                lambda command=command: subprocess.run(command, check=False, cwd=ROOT, capture_output=True),
                resource.RUSAGE_CHILDREN,
            )
            if at:  # the first one writes byte code, and brings files into the cache
                taken[name].append((wall, cpu))
    return [{"case": name, "runs": repeats, **figures(each)} for name, each in taken.items()]


def first_and_next(case: str, repeats: int) -> dict:
    """Of one process: seconds of the first scan, and of `repeats` more."""
    if case == REAL:
        from tools.real.fetch import smollm2

        name = str(smollm2())
        prompts = (ROOT / "tools" / "real" / "prompts.txt").read_text().splitlines()[:REAL_PROMPTS]
    elif case == EMBEDDED:
        name, prompts = str(ROOT / "shipsfast" / "demo" / "village"), ["How could we hide the hushtree?"]
    else:
        raise ValueError(f"unknown case {case!r}: expected {EMBEDDED!r} or {REAL!r}")
    from shipsfast.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)

    def scan():
        import shipsfast

        return shipsfast.scan(model, prompts, tokenizer, template="chat", progress=False)

    taken, scores = [], []
    for _ in range(repeats + 1):
        wall, cpu, found = timed(scan, resource.RUSAGE_SELF)
        taken.append((wall, cpu))
        scores.append(found.scores)
    record = found.record
    return {
        "first": taken[0], "next": taken[1:], "max_abs_difference": float(np.ptp(scores, axis=0).max()),
        "resolved_backend": record["attention_backend"], "layers": record["layers"], "scores": scores[0].size,
    }  # fmt: skip


def scans(case: str, processes: int, repeats: int) -> dict:
    """The first scan of a loaded model beside the next ones, in several processes."""
    command = [sys.executable, "-m", "benchmarks", "first", case, str(repeats)]
    found = []
    for _ in range(processes):
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return {"case": case, "failed": " ".join(done.stderr.split())[-300:]}
        found.append(json.loads(done.stdout.splitlines()[-1]))
    rest = [each for one in found for each in one["next"]]
    ratios = [
        [one["first"][at] / statistics.median(each[at] for each in one["next"]) for one in found]
        for at in range(2)
    ]
    return {
        "case": case, "runs": len(rest), "processes": processes, **figures(rest),
        **figures([one["first"] for one in found], "first_"),
        "first_to_next": round(statistics.median(ratios[0]), 3), "first_to_next_cpu": round(statistics.median(ratios[1]), 3),
        "max_abs_difference": max(one["max_abs_difference"] for one in found),
        **{name: found[0][name] for name in ("resolved_backend", "layers", "scores")},
    }  # fmt: skip


def run(repeats: int, real: bool, console: Console) -> list[dict]:
    """Time and append the rows; returns them. real: SmolLM2 as well, which takes minutes."""
    rows = [*starts(repeats), scans(EMBEDDED, PROCESSES, repeats)]
    if real:
        rows.append(scans(REAL, PROCESSES, REAL_REPEATS))
    common = provenance("cpu") | {"bench": "small", "dtype": "float32"}
    rows = [common | row for row in rows]
    append("small", rows)
    show(rows, console)
    return rows


def show(rows: list[dict], console: Console) -> None:
    table = Table(title="fixed costs, ms")
    for column in (
        "",
        "median",
        "least",
        "CPU, median",
        "CPU, least",
        "first",
        "first / next",
        "the same, CPU",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["case"], "failed:", row["failed"])
            continue
        names = ("median_s", "least_s", "median_cpu_s", "least_cpu_s", "first_median_s")
        cells = [f"{1000 * row[name]:,.1f}" if name in row else "" for name in names]
        ratios = [
            f"{row[name]:.2f}" if name in row else "" for name in ("first_to_next", "first_to_next_cpu")
        ]
        table.add_row(row["case"], *cells, *ratios)
    console.print(table)
