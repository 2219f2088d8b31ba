"""What must be right before anything is measured: modules, a built extension, and the GPU tests.

Imports nothing but the standard library at the top: it has to say what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "psutil",
    "tqdm",
    "safetensors",
    "tokenizers",
    "rich",
)
STAMP = ROOT / "build" / ".extension"
BUILD_TIMEOUT_S = 400


def missing_modules(on_gpu: bool) -> str | None:
    """One line on what is not installed, None if all is there."""
    wanted = MODULES + (("triton",) if on_gpu else ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"not installed for {sys.executable}: {', '.join(missing)}; install them (pip install {' '.join(missing)})"


def extension_sources(arch: str) -> str:
    """What a built extension belongs to: its sources, torch and the architecture."""
    import torch

    digest = hashlib.sha256(
        f"{torch.__version__} {torch.version.cuda} {sys.version_info[:2]} {arch}".encode()
    )
    for path in sorted([*ROOT.glob("csrc/*"), ROOT / "setup.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build_extension(arch: str | None, timeout_s: float = BUILD_TIMEOUT_S) -> dict:
    """Build it if it is missing or of other sources; arch "9.0", None on a CPU. Returns figures of a row.

    Raises RuntimeError with the compiler's first complaint.
    """
    wanted = extension_sources(arch or "cpu")
    built = next(iter(ROOT.glob("shipsfast/_C*.so")), None)
    if built is not None and STAMP.is_file() and STAMP.read_text() == wanted:
        return {"built": False}
    start = time.perf_counter()
    environment = dict(os.environ)
    if arch is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = arch
    code, output = bounded([sys.executable, "setup.py", "build_ext", "--inplace"], environment, timeout_s)
    if code is None:
        raise RuntimeError(f"building the extension took more than {timeout_s:.0f} s")
    if code:
        lines = output.splitlines()
        told = [
            line for line in lines if re.search(r"error|cannot find|shipsfast:", line, re.IGNORECASE)
        ] or lines[-1:]
        raise RuntimeError("building the extension failed: " + " | ".join(told[:3]))
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(wanted)
    return {"built": True, "median_s": round(time.perf_counter() - start, 1), "runs": 1}


def gpu_tests(files: list[str], chosen: str | None, timeout_s: float, log: Path) -> dict:
    """Run `pytest -m gpu` compiled, at most `timeout_s`; its output is appended to `log`.

    chosen: pytest's -k. Returns figures of a row: the counts, also of tests that were not finished, and `failed` or
    `not_measured` unless all passed. Raises RuntimeError if there is no pytest.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the GPU tests were not run")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider"]
    command += ["--tb=line", *files, *(["-k", chosen] if chosen else [])]
    if importlib.util.find_spec("xdist") is not None:
        # Most of their time goes into compiling Triton kernels on the host.
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    environment = os.environ | {
        "SHIPSFAST_TEST_GPU": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    start = time.perf_counter()
    code, output = bounded(command, environment, timeout_s)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(output)
    return read_tests(output, code, timeout_s) | {
        "median_s": round(time.perf_counter() - start, 1),
        "runs": 1,
    }


def bounded(command: list[str], environment: dict, timeout_s: float) -> tuple[int | None, str]:
    """(exit code, output) of a program; None if it was ended, with all it had started, after `timeout_s`."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            output, _ = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its workers too, which would keep the GPU
            return None, child.communicate()[0] or ""
        except BaseException:  # this process is to end
            os.killpg(child.pid, signal.SIGKILL)
            raise
        return child.returncode, output


def read_tests(output: str, code: int | None, timeout_s: float = 0.0) -> dict:
    """Figures of a row, of what `pytest -v` printed: counts, and `failed` or `not_measured` with the reason unless all
    passed. code: None if it was ended after `timeout_s`: then the counts are those so far."""
    if code is None:
        # "[gw0] [ 12%] PASSED file::test" of xdist's workers, "file::test PASSED [ 12%]" without them.
        ends = re.findall(
            r"^(?:\[gw\d+\] \[ *\d+%\] |\S+::.* )(PASSED|FAILED|SKIPPED|ERROR)\b", output, re.MULTILINE
        )
        counts = {word: ends.count(word.upper()) for word in ("passed", "failed", "skipped", "error")}
    else:
        last = output.strip().rpartition("\n")[2]
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)s?\b", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    figures = {
        "passed": counts.get("passed", 0),
        "failed_tests": failed,
        "skipped": counts.get("skipped", 0),
    }
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "none"
    first = [line for line in output.splitlines() if re.match(r"(FAILED|ERROR|E  |.*Error)", line)][:3]
    if code is None:
        asked = next(
            filter(None, (re.search(x, output) for x in (r"\[(\d+) items?\]", r"(\d+) selected", r"collected (\d+)"))), None
        )  # fmt: skip
        of = f" of {asked[1]}" if asked else ""
        why = f"not finished after {timeout_s:.0f} s; so far{of}: {told}"
        return figures | {"failed" if failed else "not_measured": " | ".join([why, *first])}
    if code or failed or not figures["passed"]:
        why = " | ".join(first) or " ".join(output.split())[-200:]
        figures["failed"] = f"pytest exited with {code}; {told}: {why}"[:400]
    return figures
