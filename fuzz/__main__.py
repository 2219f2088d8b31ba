"""python -m fuzz TARGET [--seconds N] [--corpus FOLDER]: coverage-guided, with atheris (pip install atheris).

Prints executions, corpus size and findings. Without atheris: seeded mutations of the corpus, for as long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from .engine import Findings, corpus, smoke


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["prompts", "run_folder"])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="where new inputs are kept; default a temporary folder")
    given = parser.parse_args()
    try:
        import atheris
    except ImportError:
        target = importlib.import_module(f"fuzz.{given.target}")
        done, findings = smoke(target, sys.maxsize, seconds=given.seconds)
        return report(given.target, done, len(corpus(target)), findings, "seeded mutations")
    with atheris.instrument_imports(include=["shipsfast", "json", "fuzz.run_folder", "fuzz.prompts"]):
        target = importlib.import_module(f"fuzz.{given.target}")
    folder = given.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(corpus(target)):
        (folder / f"seed-{number:04d}").write_bytes(data)
    findings, state = Findings(), {"done": 0, "stop": time.monotonic() + given.seconds}

    def one(data: bytes) -> None:
        findings.guard(target.one, data)
        state["done"] += 1
        if time.monotonic() > state["stop"]:
            code = report(
                given.target, state["done"], len(list(folder.iterdir())), findings, "coverage-guided"
            )
            sys.stdout.flush()
            working.__exit__(None, None, None)
            import os

            os._exit(code)  # libFuzzer would end with a status of its own

    working = target.setup()
    working.__enter__()
    atheris.Setup(
        [
            sys.argv[0],
            str(folder),
            "-rss_limit_mb=4096",
            "-timeout=60",
            "-max_len=4096",
            "-print_final_stats=1",
        ],
        one,
    )
    atheris.Fuzz()
    return 0


def report(name: str, done: int, inputs: int, findings: Findings, how: str) -> int:
    print(
        json.dumps(
            {"target": name, "how": how, "executions": done, "corpus": inputs, "findings": len(findings)}
        )
    )
    for where, (data, message) in findings.items():
        print(f"  {where}: {message[:200]!r} from {data[:200]!r}")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
