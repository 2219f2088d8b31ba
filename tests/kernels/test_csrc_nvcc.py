"""csrc/ships_kl.cuh and ships_divergence.cuh build for A100 and H100/H200 without spilling, and their arithmetic is
accurate: the KL of whole rows too, done on the host in the kernel's order. The kernels of ships_kl.cuh run themselves
too, on host threads. No GPU needed.

Tolerances of KL: KL_RTOL is relative. It covers, relative to a row's KL, 1.2e-7 of the weights, 2.1e-7 of the terms,
1.2e-7 of the distances under them and 1.8e-7 of the sums of four; what the sums lose on the way to KL, up to eight
times, is left to the errors of many tokens not being all alike. KL_FLOOR is where float64 rounds the parts' log sums.
"""

import re
import shutil
import struct
import subprocess

import pytest
import torch

from shipsfast.ops.divergences import divergence_rows, kl_rows
from tests.support.divergence_cases import INF, KL_ATOL, KL_RTOL, NAN, SPECIAL, draw, each_dtype, oracle
from tests.support.numerics import assert_close_abs
from tests.support.places import ROOT

ARCHITECTURES = ("80", "90")
TYPES = ("bf16", "fp16", "fp32", "fp64")
MANGLED = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "d": "fp64"}
# By name and template flags: for five blocks of 128 threads on a multiprocessor, four in half precision, two of 512.
MAX_REGISTERS = {
    ("kl_parts_kernel", "", "bf16"): 128,
    ("kl_parts_kernel", "", "fp16"): 128,
    ("kl_parts_kernel", "", "fp32"): 96,
    ("kl_parts_kernel", "", "fp64"): 96,
    ("kl_order_kernel", "", None): 64,
    ("kl_rows_kernel", "", None): 64,
}
MAX_REGISTERS |= {
    (kernel, flags, name): 96
    for kernel, flags in [
        ("norm_rows_kernel", ""),
        ("divergence_rows_kernel", "Lb0E"),
        ("divergence_rows_kernel", "Lb1E"),
    ]
    for name in TYPES
}
MAX_SHARED_BYTES = 10 * 1024
ENTRY = re.compile(
    r"Compiling entry function '_ZN9shipsfast\d+(?P<kernel>[a-z_]+)(I(?P<type>13__nv_bfloat16|6__half|f|d)"
    r"(?P<flags>(Lb[01]E)?)E)?E\w*' for 'sm_(?P<arch>\d+)'.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
LOGIT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
KL_FLOOR = 1e-18
KL_PART = 8192  # kKlPart


def nvcc(*arguments):
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc: install the CUDA toolkit and put it on PATH")
    done = subprocess.run([found, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def raw(*tensors):
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    program = tmp_path_factory.mktemp("kl") / "kl_driver"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    told = nvcc(
        "-std=c++17", "-O3", "--threads=2", "-Xptxas=-v", *targets, ROOT / "tests/support/kl_driver.cu", "-o", program
    )  # fmt: skip
    return program, told


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory):
    """base [P, V], ablated [N, V], row_map [N] -> KL of the kernels themselves, run on host threads, [N]. The rows are
    laid out `stride` apart, from element `begin` of memory on that is aligned."""
    folder = tmp_path_factory.mktemp("kl")
    program, file = folder / "kl_on_threads", folder / "rows"
    host = "-Xcompiler=-pthread,-ffp-contract=off"
    source = ROOT / "tests/support/kl_on_threads.cpp"
    nvcc("-x", "c++", "-std=c++20", "-O2", host, source, "-o", program)

    def run(base, ablated, row_map, stride=None, begin=0):
        vocab = base.shape[1]
        stride = stride or vocab
        sizes = struct.pack("<6q", LOGIT_TYPES[base.dtype], vocab, len(base), len(ablated), stride, begin)
        laid_out = [
            torch.full((begin + len(rows) * stride,), NAN, dtype=base.dtype) for rows in (base, ablated)
        ]
        for memory, rows in zip(laid_out, (base, ablated), strict=True):
            memory[begin:].view(len(rows), stride)[:, :vocab] = rows
        file.write_bytes(sizes + raw(row_map, *laid_out))
        done = subprocess.run([program, file], capture_output=True, text=True, check=True, timeout=300)
        return torch.tensor([float(word) for word in done.stdout.split()], dtype=torch.float64)

    return run


@pytest.fixture
def host_kl(build, tmp_path):
    """base [V], ablated [N, V] -> KL as the kernel would have it [N], and the parts of each row left to float64 [N]."""

    def run(base, ablated):
        file = tmp_path / "rows"
        sizes = struct.pack("<3q", LOGIT_TYPES[base.dtype], len(base), len(ablated))
        file.write_bytes(sizes + raw(base, ablated))
        done = subprocess.run([build[0], "rows", file], capture_output=True, text=True, check=True)
        words = done.stdout.split()
        assert len(words) == 2 * len(ablated)
        return torch.tensor([float(word) for word in words[::2]], dtype=torch.float64), torch.tensor(
            [int(word) for word in words[1::2]]
        )

    return run


def cpu_kl(base, ablated, backend="auto"):
    """[N] of the CPU's kernels, in float64: by kl_rows, good to KL_ATOL, and by divergence_rows, good to 1e-12 of it."""
    row_map = torch.zeros(len(ablated), dtype=torch.int64)
    every = divergence_rows(base[None], ablated, row_map, names=["kl", "js"], backend=backend)
    return kl_rows(base[None], ablated, row_map, backend=backend), every[0]


def perturbed(vocab, dtype, changes, *, spread=3.0, seed=0, offsets=(0.0,)):
    """base [V] and ablated [len(changes) * len(offsets), V], whose logits also move together, by offsets."""
    generator = torch.Generator().manual_seed(seed)
    base = spread * torch.randn(vocab, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(changes), vocab, generator=generator, dtype=torch.float64)
    moved = base + torch.tensor(changes, dtype=torch.float64)[:, None] * noise
    moved = torch.cat([moved + offset for offset in offsets])
    return base.to(dtype), moved.to(dtype)


def test_every_kernel_fits_in_registers(build):
    entries = {}
    for match in ENTRY.finditer(build[1]):
        entries[match["kernel"], match["flags"] or "", MANGLED.get(match["type"]), match["arch"]] = match
    assert set(entries) == {(*kernel, arch) for kernel in MAX_REGISTERS for arch in ARCHITECTURES}
    for (*kernel, arch), match in entries.items():
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        told = f"{kernel} sm_{arch}: {match['registers']} registers{match['rest']}"
        assert int(match["registers"]) <= MAX_REGISTERS[tuple(kernel)], told
        assert int(shared[1] if shared else 0) <= MAX_SHARED_BYTES, told
    spilled = [int(count) for count in SPILLS.findall(build[1])]
    assert len(spilled) >= 2 * len(entries) and not any(spilled)


def test_arithmetic(build):
    lines = subprocess.run([build[0]], capture_output=True, text=True, check=True).stdout.split("\n")
    errors = {name: float(value) for name, value in (line.split() for line in lines if line)}
    limits = {  # relative, and all that the header of ships_kl.cuh promises
        "exp_near_the_largest": 1.2e-7,
        "exp_full_range": 1.2e-7,
        "excess_tiny": 2.1e-7,
        "excess_near": 2.1e-7,
        "excess_far": 2.1e-7,
    }
    # The driver adds each row up in one go, where the kernels deal it to 512 threads.
    limits |= {
        f"{name}_{size}_relative": 1e-12
        for name in ("kl", "reverse_kl", "js", "total_variation")
        for size in ("small", "large")
    }
    assert errors.keys() == limits.keys()
    for name, limit in limits.items():
        assert 0.0 <= errors[name] <= limit, f"{name}: {errors[name]} > {limit}"


@each_dtype
@pytest.mark.parametrize(
    "vocab, seeds", [(61, 30), (32000, 4), (128256, 1), (256000, 1)], ids=lambda x: str(x)
)
def test_kl_against_the_cpu(vocab, seeds, dtype, host_kl):
    changes = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0, 4.0, 20.0)
    for seed in range(seeds):
        base, ablated = perturbed(vocab, dtype, changes, seed=seed, spread=(3.0, 0.1)[seed % 2])
        result, _ = host_kl(base, ablated)
        roughly, closely = cpu_kl(base, ablated)
        rtol = KL_RTOL if dtype != torch.float64 else 1e-12
        assert_close_abs(result, closely, rtol * closely + KL_FLOOR)
        assert_close_abs(result, roughly, rtol * roughly + KL_ATOL)


@each_dtype
def test_kl_of_rows_that_move_together(dtype, host_kl):
    """Offsets far above the noise, which float32 differences of the logits would lose."""
    for vocab, spread in [(3, 1e-3), (61, 1e-2), (61, 1.0), (9001, 0.1), (20011, 3.0)]:
        base, ablated = perturbed(
            vocab, dtype, (1e-4, 1e-2, 0.3), spread=spread, offsets=(-700.0, -5.0, 0.37, 60.0)
        )
        result, _ = host_kl(base, ablated)
        _, expected = cpu_kl(base, ablated)
        assert_close_abs(result, expected, KL_RTOL * expected + KL_FLOOR)


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0003])
def test_kl_of_a_few_changed_tokens(share, host_kl):
    for seed, size in enumerate((1e-6, 1e-3, 0.3, 8.0)):
        base, ablated = perturbed(20011, torch.float32, (size,) * 4, seed=seed)
        keep = torch.rand(ablated.shape, generator=torch.Generator().manual_seed(seed)) > share
        ablated = torch.where(keep, base, ablated)
        result, _ = host_kl(base, ablated)
        _, expected = cpu_kl(base, ablated)
        assert expected.max() > 0
        assert_close_abs(result, expected, KL_RTOL * expected + KL_FLOOR)


@pytest.mark.parametrize("spread", [1e-4, 0.01, 0.1])
@pytest.mark.parametrize("count", [8, 16])
def test_kl_of_the_likeliest_tokens_that_move(count, spread, host_kl):
    """In a flat row: the center is theirs, all others are far from it and cancel, and float32's digits with them. Such a part is
    computed in float64."""
    base, ablated = perturbed(8192, torch.float32, (1e-4,) * 4, spread=spread)
    likeliest = base.topk(count).indices
    ablated[:, likeliest] = base[likeliest] - torch.tensor([0.1, 0.3, 0.6, 1.2])[:, None]
    result, _ = host_kl(base, ablated)
    _, expected = cpu_kl(base, ablated)
    assert_close_abs(result, expected, KL_RTOL * expected + KL_FLOOR)


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])
def test_small_changes_stay_in_float32(spread, host_kl):
    """Else the speed would be another."""
    base, ablated = perturbed(
        50257, torch.float32, (1e-6, 1e-3, 0.1, 0.3, 1.0), spread=spread, offsets=(0.0, 2.0)
    )
    assert not host_kl(base, ablated)[1].any()


@each_dtype
@pytest.mark.parametrize("vocab", [1, 7, 8192, 32001])
def test_equal_rows_have_no_kl(vocab, dtype, host_kl):
    base, ablated = perturbed(vocab, dtype, (0.0, 0.0))
    masked = base.clone()
    masked[::3] = -INF
    masked[0] = 0.0
    assert not host_kl(base, ablated)[0].any()
    assert not host_kl(masked, masked[None])[0].any()
    whole = torch.arange(vocab).remainder(50).to(dtype)
    shifted, exact_parts = host_kl(whole, whole[None] + 32)
    assert float(shifted) <= 1e-26  # float64 rounds the parts' log sums
    assert dtype == torch.float64 or not exact_parts.any()


@pytest.mark.parametrize("spread", [100.0, 1e4])
def test_kl_of_wide_logits(spread, host_kl):
    base, ablated = perturbed(8200, torch.float32, (1e-3 * spread, spread), spread=spread)
    result, exact_parts = host_kl(base, ablated)
    assert (exact_parts[1:] == 2).all()
    assert_close_abs(result, oracle(base[None], ablated, torch.tensor([0, 0])), KL_ATOL * 10 * spread)


@each_dtype
@pytest.mark.parametrize("copies", [1, 500, 5000])
@pytest.mark.parametrize("case", SPECIAL)
def test_infinities_and_nan(case, copies, dtype, host_kl):
    """With copies of ordinary logits behind it, the case has company in its part, or parts without it."""
    base, ablated, expected = SPECIAL[case]
    plain = torch.linspace(-8, -1, 4 * (copies - 1))
    masked = torch.full_like(plain, -INF)
    x_b = torch.cat([torch.tensor(base), masked if case == "base-all-masked" else plain]).to(dtype)
    x_a = torch.cat([torch.tensor(ablated), masked if case == "ablated-all-masked" else plain.flip(0)]).to(
        dtype
    )
    for order in (torch.arange(len(x_b)), torch.arange(len(x_b)).flip(0)):
        result, _ = host_kl(x_b[order], x_a[order][None])
        if expected is None:
            finite = oracle(x_b[None], x_a[None].clamp(min=-1e4), torch.tensor([0]))
            assert_close_abs(result, finite, KL_RTOL * finite + KL_ATOL)
        else:
            assert torch.equal(result.isnan(), torch.tensor([expected is NAN]))
            assert expected is NAN or result[0] == expected


@pytest.mark.parametrize("num_base", [1, 5, 300])
@pytest.mark.parametrize("num_ablated", [1, 7, 128, 1000])
def test_rows_are_taken_by_base_row(num_base, num_ablated, build):
    generator = torch.Generator().manual_seed(num_ablated)
    maps = {
        "ablations x prompts": torch.arange(num_base).repeat(num_ablated)[:num_ablated],
        "prompts x ablations": torch.arange(num_ablated) * num_base // num_ablated,
        "any": torch.randint(num_base, (num_ablated,), generator=generator),
        "out of range": torch.randint(-2, num_base + 2, (num_ablated,), generator=generator),
        "far out of range": torch.full((num_ablated,), 2**62),
    }
    for name, row_map in maps.items():
        command = [build[0], "order", str(num_base), *map(str, row_map.tolist())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        in_range = (row_map >= 0) & (row_map < num_base)
        expected = torch.where(in_range, row_map, num_base).sort(stable=True).indices
        assert [int(row) for row in done.stdout.split()] == expected.tolist(), name


@each_dtype
@pytest.mark.parametrize("vocab", [61, 8190, 9001])
def test_the_kernels_on_threads(vocab, dtype, on_threads, host_kl):
    """Groups of 4, 2 and 1 rows, rows out of range, bad rows; in any layout, and alone, to the same bits."""
    base, ablated, row_map = draw(vocab, dtype, num_ablated=13)
    row_map = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, -1, 0, 2, 3, 0])
    ablated[3, vocab // 2] = NAN
    ablated[5, -1] = -INF
    ablated[7, vocab // 3] += 100  # for float64
    result = on_threads(base, ablated, row_map)
    in_range = (row_map >= 0) & (row_map < len(base))
    bad = ~in_range
    bad[3] = True
    assert result[bad].isnan().all() and result[5] == INF
    for i in (~bad).nonzero().flatten().tolist():
        expected, exact_parts = host_kl(base[row_map[i]], ablated[i : i + 1])
        if exact_parts[0] or vocab > KL_PART:  # the driver adds these up in one go
            assert result[i] == expected[0] or abs(result[i] - expected[0]) <= 1e-13 * expected[0]
        else:
            assert result[i] == expected[0]
    aligned = on_threads(base, ablated, row_map, stride=-(-vocab // 8) * 8)
    moved = on_threads(base, ablated, row_map, stride=vocab + 2, begin=3)
    assert torch.equal(aligned[~bad], result[~bad]) and torch.equal(moved[~bad], result[~bad])
    for i in (0, 2, 7, 10):
        alone = on_threads(base[row_map[i] : row_map[i] + 1], ablated[i : i + 1], torch.tensor([0]))
        assert alone[0] == result[i]
