"""csrc/ships_kl.cuh and ships_divergence.cuh build for A100 and H100/H200 without spilling, and their arithmetic is
accurate. No GPU needed."""

import re
import shutil
import subprocess

import pytest

from tests.support.places import ROOT

ARCHITECTURES = ("80", "90")
TYPES = ("bf16", "fp16", "fp32", "fp64")
MANGLED = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "d": "fp64"}
# By name and template flags. 128 x 512 threads is all of an SM.
MAX_REGISTERS = {
    ("kl_base_kernel", ""): 64,
    ("kl_rows_kernel", ""): 128,
    ("norm_rows_kernel", ""): 96,
    ("divergence_rows_kernel", "Lb0E"): 96,
    ("divergence_rows_kernel", "Lb1E"): 96,
}
MAX_SHARED_BYTES = 1024
ENTRY = re.compile(
    r"Compiling entry function '_ZN9shipsfast\d+(?P<kernel>[a-z_]+)I(?P<type>13__nv_bfloat16|6__half|f|d)"
    r"(?P<flags>(Lb[01]E)?)EEv\w*' for 'sm_(?P<arch>\d+)'.*?(?P<spilled>\d+) bytes spill stores, (?P<reloaded>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers.*?(?P<shared>\d+) bytes smem",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc: install the CUDA toolkit and put it on PATH")
    program = tmp_path_factory.mktemp("kl") / "kl_driver"
    command = [nvcc, "-std=c++17", "-O3", "--threads=2", "-Xptxas=-v"]
    command += [ROOT / "tests/support/kl_driver.cu", "-o", program]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program, done.stdout + done.stderr


def test_every_kernel_fits_in_registers(build):
    entries = {}
    for match in ENTRY.finditer(build[1]):
        entries[match["kernel"], match["flags"], MANGLED[match["type"]], match["arch"]] = match
    expected = {(*kernel, name, arch) for kernel in MAX_REGISTERS for name in TYPES for arch in ARCHITECTURES}
    assert set(entries) == expected
    for (kernel, flags, name, arch), match in entries.items():
        figures = {key: int(match[key]) for key in ("spilled", "reloaded", "registers", "shared")}
        told = f"{kernel} {flags} {name} sm_{arch}: {figures}"
        assert figures["spilled"] == figures["reloaded"] == 0, told
        assert figures["registers"] <= MAX_REGISTERS[kernel, flags], told
        assert figures["shared"] <= MAX_SHARED_BYTES, told


def test_arithmetic_in_pairs_of_floats(build):
    lines = subprocess.run([build[0]], capture_output=True, text=True, check=True).stdout.split("\n")
    errors = {name: float(value) for name, value in (line.split() for line in lines if line)}
    # 48 bits are 3.6e-15; exp(x) loses |x| times that, which matters little where exp(x) is small beside 1.
    limits = {
        "exp_near_zero": 2e-13,
        "exp_full_range": 1e-10,
        "kl_same": 0.0,
        "kl_tiny_change": 1e-14,
        "kl_small_change": 1e-14,
        "kl_large_change": 1e-13,
        "kl_flat": 1e-13,
        "kl_float64": 1e-13,
    }
    # Relative. The driver adds each row up in one go, where the kernels deal it to 512 threads.
    limits |= {
        f"{name}_{size}_relative": 1e-12
        for name in ("kl", "reverse_kl", "js", "total_variation")
        for size in ("small", "large")
    }
    assert errors.keys() == limits.keys()
    for name, limit in limits.items():
        assert 0.0 <= errors[name] <= limit, f"{name}: {errors[name]} > {limit}"
