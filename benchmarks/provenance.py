"""Where a benchmark row comes from, and where rows are kept: benchmarks/results/<device>.jsonl."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

import shipsfast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# For a copy of the tree without its history: what `git rev-parse --short=12 HEAD` says where it came from.
COMMIT_VARIABLE = "SHIPSFAST_COMMIT"
SOURCES = (
    "shipsfast/**/*.py",
    "kernels/**/*.py",
    "kernels/configs/*.json",
    "csrc/*",
    "benchmarks/**/*.py",
    "setup.py",
)


def provenance(device: str) -> dict:
    """Commit, device, threads and versions of this run."""
    if device == "cpu":
        name, extra = _processor(), {"threads": torch.get_num_threads()}
    else:
        name = torch.cuda.get_device_name(device)
        extra = {
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
            "memory_mib": torch.cuda.get_device_properties(device).total_memory >> 20,
        }
    commit = changes = None
    if (ROOT / ".git").exists():  # a copy may lie inside of some other repository
        commit = _output("git", "rev-parse", "--short=12", "HEAD")
        changes = _output(
            "git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
        )
    versions = {
        "shipsfast": shipsfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device != "cpu":
        versions["triton"] = _version("triton")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit or os.environ.get(COMMIT_VARIABLE) or None,
        "dirty": None if changes is None else bool(changes),
        "sources": sources_hash(),
        "device": name,
        **extra,
        "versions": versions,
    }


def sources_hash() -> str:
    """Of everything that is measured, so that a row can be matched with a commit where there is no history."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def append(device: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{device}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def newest(name: str, case: str) -> dict | None:
    """The newest row of a case, None if it was never measured."""
    return next(reversed(rows_of(name, case)), None)


def rows_of(name: str, case: str) -> list[dict]:
    """Every row of a case, the oldest first."""
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if row["case"] == case]


def latest(device: str, case: str) -> list[dict]:
    """The rows of the newest run of a case, empty if it was never measured."""
    rows = rows_of(device, case)
    start = max((i for i, row in enumerate(rows) if row["path"] == "shipsfast"), default=0)
    return rows[start:]


def _output(*command: str) -> str | None:
    """What a program prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
