"""Builds shipsfast, and its native extension shipsfast._C.

Needs torch in the environment (`pip install --no-build-isolation`) and a C++ compiler; no GPU. With a CUDA
build of torch and a matching nvcc, the CUDA kernels are built too. SHIPSFAST_NO_EXT=1 skips the extension:
shipsfast then computes the same in torch, more slowly.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Named one by one, and never found: a package called `kernels` would be picked up by transformers. `check_packages` holds
# the list against the folders.
ROOMS = (
    "answers", "answers.judges", "cli", "demo", "engine", "kernels", "models", "ops", "prompts", "results", "runs", "scans",
)  # fmt: skip
PACKAGES = ["shipsfast", *(f"shipsfast.{room}" for room in ROOMS)]
PACKAGE_DIR = {"shipsfast": "shipsfast", "shipsfast.kernels": "kernels"}
PACKAGE_DATA = {
    "shipsfast.kernels": ["configs/*.json"],
    "shipsfast.demo": ["**/*"],
    "shipsfast.results": ["*.jinja"],
}
TORCH_ABI = "0x020b000000000000"  # torch 2.11, the oldest supported: newer ones keep its stable ABI
CUDA_LIBRARIES = ("lib*/libcudart*", "targets/*/lib/libcudart*")  # the second is conda's
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # said here, because torch would otherwise ask the GPU, if there is one


def stop(message: str) -> None:
    sys.exit(f"shipsfast: {message}; or set SHIPSFAST_NO_EXT=1 to install without the native extension")


def folder(package: str) -> Path:
    return ROOT / PACKAGE_DIR.get(package, package.replace(".", "/"))


def check_packages() -> None:
    """A folder with code that is not named would be left out of every wheel, without a word."""
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "shipsfast").rglob("*.py")}
    missing = sorted(found - set(PACKAGES))
    absent = [name for name in PACKAGES if not folder(name).is_dir()]
    if missing or absent:
        sys.exit(
            f"shipsfast: setup.py names packages that are not the folders: {', '.join(missing + absent)}"
        )


def has_compiler() -> bool:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names)


def cuda_home() -> str | None:
    """Where the toolkit is: torch takes the folder above nvcc's for it, which is wrong for a wrapper in /usr/local/bin."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")  # torch reads both
    if named:
        return named
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent.parent if nvcc else None
    for place in filter(None, (beside, Path("/usr/local/cuda"))):
        if (place / "bin" / "nvcc").is_file() and any(any(place.glob(x)) for x in CUDA_LIBRARIES):
            return str(place)
    return None


def cuda_problem(torch, cuda_home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return "torch is not a CUDA build"
    nvcc = Path(cuda_home) / "bin" / "nvcc" if cuda_home else None
    if nvcc is None or not nvcc.exists():
        return "no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    version = subprocess.run([nvcc, "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is release {release and release[1]}, torch was built with CUDA {torch.version.cuda}"
    return None


def extension() -> dict:
    home = cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = home  # torch reads it when cpp_extension is imported
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        stop("torch is not in the building environment: install it first, then use --no-build-isolation")
    if not has_compiler():
        stop("no C++ compiler was found: install g++ or clang++, or set CXX")
    problem = cuda_problem(torch, cpp_extension.CUDA_HOME)
    macros = [("TORCH_TARGET_VERSION", TORCH_ABI)]
    # Neither changes a result: the one enables `#pragma omp simd`, without OpenMP's library, and with the other
    # GCC may turn the selects in those loops into vector code.
    flags = {"cxx": ["-O3", "-fopenmp-simd", "-fno-trapping-math", "-fvisibility=hidden"]}
    sources = [
        "csrc/bindings.cpp", "csrc/ships_kl_cpu.cpp", "csrc/ships_divergence_cpu.cpp", "csrc/fused_cpu.cpp",
        "csrc/tree_attention_cpu.cpp", "csrc/decode_attention_cpu.cpp", "csrc/end_attention_cpu.cpp",
    ]  # fmt: skip
    if problem:
        print(f"shipsfast: building for the CPU only ({problem})", file=sys.stderr)
        make = cpp_extension.CppExtension
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        macros += [("SHIPSFAST_WITH_CUDA", "1"), ("USE_CUDA", "1")]  # USE_CUDA shows torch's CUDA stable ABI
        sources.append("csrc/ships_kl_cuda.cu")
        flags["nvcc"] = ["-O3", "--threads=2"]
        make = cpp_extension.CUDAExtension
    module = make(
        "shipsfast._C", sources, define_macros=macros, extra_compile_args=flags, py_limited_api=True,
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*.*h"))],
    )  # fmt: skip
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


check_packages()
setup(
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data=PACKAGE_DATA,
    exclude_package_data={"": ["__pycache__/*"]},
    **({} if os.environ.get("SHIPSFAST_NO_EXT") == "1" else extension()),
)
