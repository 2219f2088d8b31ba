"""Where a benchmark row comes from, and where rows are kept: benchmarks/results/<device>.jsonl."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch
import transformers

import shipsfast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance(device: str) -> dict:
    """Commit, device, threads and versions of this run."""
    if device == "cpu":
        name, extra = _processor(), {"threads": torch.get_num_threads()}
    else:
        name, extra = torch.cuda.get_device_name(device), {"cuda": torch.version.cuda}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        ),
        "device": name,
        **extra,
        "versions": {
            "shipsfast": shipsfast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def append(device: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{device}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def newest(name: str, case: str) -> dict | None:
    """The newest row of a case, None if it was never measured."""
    return next(reversed(_rows(name, case)), None)


def _rows(name: str, case: str) -> list[dict]:
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if row["case"] == case]


def latest(device: str, case: str) -> list[dict]:
    """The rows of the newest run of a case, empty if it was never measured."""
    rows = _rows(device, case)
    start = max((i for i, row in enumerate(rows) if row["path"] == "shipsfast"), default=0)
    return rows[start:]


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
