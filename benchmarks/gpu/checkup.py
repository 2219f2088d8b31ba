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


def build_extension(arch: str | None) -> dict:
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
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, capture_output=True,
            text=True, check=False, timeout=BUILD_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"building the extension took more than {BUILD_TIMEOUT_S} s") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        told = [
            line for line in lines if re.search(r"error|cannot find|shipsfast:", line, re.IGNORECASE)
        ] or lines[-1:]
        raise RuntimeError("building the extension failed: " + " | ".join(told[:3]))
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(wanted)
    return {"built": True, "median_s": round(time.perf_counter() - start, 1), "runs": 1}


def gpu_tests(files: list[str], timeout_s: float) -> dict:
    """Run `pytest -m gpu` compiled, at most `timeout_s`. Returns figures of a row.

    Raises RuntimeError if one fails, TimeoutError if they take longer.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the GPU tests were not run")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["--tb=line", *files]
    if importlib.util.find_spec("xdist") is not None:
        # Most of their time goes into compiling Triton kernels on the host.
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    environment = os.environ | {"SHIPSFAST_TEST_GPU": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    start = time.perf_counter()
    code, output = bounded(command, environment, timeout_s)
    if code is None:
        raise TimeoutError(f"not finished after {timeout_s:.0f} s: {' '.join(output[-150:].split())}")
    return read_tests(output, code) | {"median_s": round(time.perf_counter() - start, 1), "runs": 1}


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
        return child.returncode, output


def read_tests(output: str, code: int) -> dict:
    """The counts of pytest's last line. Raises RuntimeError, with the first failures, unless all passed."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)}
    if code or counts.get("failed") or not counts.get("passed"):
        failures = [line for line in output.splitlines() if re.match(r"(FAILED|ERROR|E  |.*Error)", line)]
        told = " | ".join(failures[:3]) or " ".join(output.split())[-200:]
        raise RuntimeError(f"pytest -m gpu exited with {code}, {counts}: {told}")
    return {"passed": counts["passed"], "skipped": counts.get("skipped", 0)}
