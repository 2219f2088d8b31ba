"""`python -m benchmarks gpu`: every case in order of importance, within a budget of time, a row for each.

Rows, the profiler's table and the output of the tests go to the folder of --results, and nothing anywhere else but the
extension, which is built where it is imported. Without a GPU, `--smoke` runs all of it at small shapes on the CPU, to try
the command itself; its rows go where --results says, or nowhere that counts.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import checkup
from .rows import OURS, problem

QUICK_BUDGET_S = 460.0
TEST_SHARE = 0.15  # of the budget, for each run of GPU tests
# By name: files, and what pytest chooses among their tests.
TESTS = {
    "whole runs": (["tests/gpu/test_on_gpu.py", "tests/ops/test_kl.py"], None),
    "pytest -m gpu": ([], None),
}
# With --quick: does it run at all, is it right, and does what leans on the newest torch run.
QUICK_FILTER = "(test_a_scan or float32_residual or generation) and (llama or gemma2) and bf16"
QUICK_TESTS = {"whole runs, a few": (["tests/gpu/test_on_gpu.py"], QUICK_FILTER)}
QUICK_BUILD_S, QUICK_TESTS_S = 90.0, 80.0  # at most
HANG_S = 60.0  # beyond the budget, after which the process tells where it stands and ends
# Seconds that a case needs with --quick at the least, on an H100, from arithmetic: below that it is not begun. They are
# run in this order: by importance, and cases of one model beside each other.
NEEDS_S = {
    "build": 5, "tests": 20, "ceilings": 8, "llama2-7b-short": 65, "profile": 20, "llama2-7b-template": 50, "chunk-tokens": 25,
    "kernels-attention": 25, "kernels-kl": 15, "kernels-small-ops": 20, "llama2-7b-generation": 45, "llama31-8b": 20,
    "head-chunk": 15, "precision": 30, "llama2-7b-sahara": 90, "qwen3-8b": 20, "gemma2-9b": 25, "mistral-7b": 20,
}  # fmt: skip
NAMES = tuple(NEEDS_S)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few tests, one run of ours, small samples of the peers, 460 s in all",
    )
    parser.add_argument(
        "--case", action="append", default=[], choices=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument(
        "--budget-s", type=float, help="seconds in all; cases that do not fit are `not measured`"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of all that is written (default benchmarks/results)"
    )
    parser.add_argument(
        "--no-build", action="store_true", help="take the extension as it is, also if it is missing"
    )
    parser.add_argument("--profile", action="store_true", help="also write the profiler's table")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU, to try the command")
    args = parser.parse_args(argv)
    if args.budget_s is None:
        args.budget_s = QUICK_BUDGET_S if args.quick else float("inf")
    args.device = "cpu" if args.smoke else args.device
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    wanted = args.case or [name for name in NAMES if name != "profile"]
    if args.profile and "profile" not in wanted:
        wanted = [*wanted, "profile"]
    if "build" not in wanted and not args.no_build:  # costs nothing where it is done
        wanted = ["build", *wanted]
    return [name for name in NAMES if name in wanted]


def main(argv: list[str]) -> int:
    args = parse(argv)
    started = time.perf_counter()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    problem = checkup.missing_modules(on_gpu=not args.smoke)
    if problem:
        print(f"python -m benchmarks gpu: {problem}", file=sys.stderr)
        return 2
    import torch

    if not args.smoke and not torch.cuda.is_available():
        print(
            f"python -m benchmarks gpu: torch {torch.__version__} sees no CUDA GPU; --smoke tries the command on a CPU",
            file=sys.stderr,
        )
        return 2
    from .session import Session

    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if args.results is None:
        from ..provenance import RESULTS

        args.results = Path(tempfile.mkdtemp(prefix="shipsfast-smoke-")) if args.smoke else RESULTS
    session = Session(device, args.results, args.budget_s, args.quick, args.smoke, started)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what it has started
    faulthandler.register(signal.SIGTERM, chain=True)  # and says where it stands
    if args.budget_s != float("inf"):
        faulthandler.dump_traceback_later(args.budget_s + HANG_S, exit=True)
    try:
        return run(session, chosen(args), args)
    finally:
        gc.unfreeze()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


def run(session, names: list[str], args: argparse.Namespace) -> int:
    """The cases; 1 if anything failed. A device that no longer answers gets a process of its own for the rest."""
    todo = stages(session)
    gc.collect()
    gc.freeze()  # what was imported stays: collecting between paths need not look at it
    for place, name in enumerate(names):
        needed = 0 if session.smoke else NEEDS_S[name]
        if session.left_s < needed:
            session.write(
                name, OURS, {"not_measured": f"{max(0, session.left_s):.0f} s of the budget were left"}
            )
            continue
        try:
            todo[name](session)
        except SystemExit:
            for rest in names[place:]:
                session.write(rest, OURS, {"not_measured": "the benchmark was told to end"})
            raise
        if session.broken is not None:
            print(
                f"the device no longer answers ({session.broken}): the rest runs in a new process", flush=True
            )
            return max(1, elsewhere(session, names[place + 1 :], args))
    session.drop_model()
    failed = [row for row in session.rows if problem(row)]
    missing = sum("not_measured" in row for row in session.rows)
    print(
        f"{len(session.rows)} rows in {session.results / session.file}.jsonl, {len(failed)} failed, {missing} not "
        f"measured; {time.perf_counter() - session.started:.0f} s",
        flush=True,
    )
    return 1 if failed else 0


def elsewhere(session, names: list[str], args: argparse.Namespace) -> int:
    if not names:
        return 0
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "gpu",
        "--results",
        str(session.results),
        "--device",
        args.device,
    ]
    command += [part for name in names for part in ("--case", name)] + ["--quick"] * args.quick
    command += ["--no-build"] * args.no_build
    if session.budget_s != float("inf"):
        command += ["--budget-s", str(max(0.0, session.left_s))]
    return subprocess.run(command, cwd=checkup.ROOT, check=False).returncode


def stages(session) -> dict[str, Callable]:
    from . import (
        ceilings,
        chunks,
        generation,
        kernel_attention,
        kernel_kl,
        kernel_small_ops,
        precision,
        profile,
        scans,
    )

    table: dict[str, Callable] = {
        "build": build,
        "tests": tests,
        "ceilings": ceilings.ceilings,
        "kernels-attention": kernel_attention.attention_kernels,
        "kernels-kl": kernel_kl.kl_kernels,
        "kernels-small-ops": kernel_small_ops.small_op_kernels,
        "llama2-7b-generation": generation.run_generation,
        "precision": precision.precision,
        "llama2-7b-sahara": scans.run_sahara,
        "profile": profile.run_profile,
    }
    table |= {name: functools.partial(chunks.run_chunks, case=name) for name in chunks.CASES}
    return table | {name: functools.partial(scans.run_scan, case=case) for name, case in scans.SCANS.items()}


def build(session) -> None:
    import torch

    from shipsfast.ops.divergences import kl_backend
    from shipsfast.ops.extension import extension_status

    with session.guarded("build", "extension"):
        if session.smoke:
            figures = {"built": False}
        else:
            arch = "{}.{}".format(*torch.cuda.get_device_capability(session.device))
            most = QUICK_BUILD_S if session.quick else checkup.BUILD_TIMEOUT_S
            figures = checkup.build_extension(arch, min(most, session.left_s))
        loaded, where = extension_status()
        if not loaded:
            raise RuntimeError(where)
        if session.on_gpu and kl_backend(session.device) != "cpp":
            raise RuntimeError(f"{where} has no CUDA kernels: delete it, and see why nvcc was not used")
        session.write("build", "extension", figures)


def tests(session) -> None:
    from .session import NotMeasured

    for name, (files, chosen) in (QUICK_TESTS if session.quick else TESTS).items():
        with session.guarded("tests", name):
            if session.smoke:
                raise NotMeasured("needs a CUDA GPU")
            left = session.left_s if session.budget_s != float("inf") else 2400.0
            limit = min(QUICK_TESTS_S, left - 5) if session.quick else max(20.0, TEST_SHARE * left)
            session.write(
                "tests", name, checkup.gpu_tests(files, chosen, limit, session.results / "tests.log")
            )
