"""The C++ extension under AddressSanitizer and UndefinedBehaviorSanitizer: python tools/sanitizers.py [pytest arguments].

Copies the package and the tests to build/sanitizers, builds the CPU sources there with both sanitizers (one to
two minutes on two cores), and runs the tests of csrc/ with the sanitizers' runtime
loaded before Python. A report of either ends the run. Leaks are not looked for: Python and torch never free everything.
Needs g++ with libasan and libubsan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHERE = ROOT / "build" / "sanitizers"
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    # A one-line kernel of a library's header is not ours to sanitize: vptr checks need all of torch built so.
    " -fno-sanitize=vptr"
)
TESTS = (
    "tests/ops/test_odd_shapes.py", "tests/ops/test_kl.py", "tests/ops/test_kl_calls.py",
    "tests/ops/test_divergences.py", "tests/engine/test_fused.py", "tests/ops/test_tree_attention_torch.py",
    "tests/ops/test_decode_attention.py", "tests/ops/test_end_attention.py",
)  # fmt: skip
# Their bounds are for vector code; sanitized loops are not vectorised, and add hundreds of terms in another order.
ANOTHER_ORDER = (
    "tests/engine/test_fused.py::test_ops_against_torch[640-fp64]",
    "tests/ops/test_kl.py::test_flat_base_against_a_peak[cpp-cpu]",
    "tests/ops/test_decode_attention.py::test_matches_the_oracle[cpp-N7-H2-HKV1-C37-D256-fp32]",
)
NOT_COMPILED = "not triton and not reference and not torch-"  # paths that run none of csrc/


def main() -> int:
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    WHERE.mkdir(parents=True, exist_ok=True)
    for name in ("shipsfast", "kernels", "tests", "csrc"):
        shutil.rmtree(WHERE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, WHERE / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, WHERE / name)
    # The CPU sources only: no nvcc is found there.
    build = os.environ | {"CXX": _compiler(), "CC": _compiler(), "CUDA_HOME": str(WHERE / "no-cuda")}
    build |= {"CFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=WHERE, env=build, check=True
    )
    run = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Rows above 2^31 elements lie in maps of many GiB that are never touched.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(WHERE),
        "PYTHONMALLOC": "malloc",  # numpy and Python objects at allocations of their own
        "SHIPSFAST_SANITIZED": "1",
    }
    tests = sys.argv[1:] or [
        *TESTS, "-k", NOT_COMPILED, *(f"--deselect={name}" for name in ANOTHER_ORDER)
    ]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600", *tests]
    return subprocess.run(command, cwd=WHERE, env=run, check=False).returncode


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _library(name: str) -> str:
    found = subprocess.run(
        [_compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"sanitizers: {_compiler()} has no {name}: install the compiler's sanitizer libraries")
    return found


if __name__ == "__main__":
    sys.exit(main())
