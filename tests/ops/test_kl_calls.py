"""How kl_rows and divergence_rows are called: what they refuse, which backend runs, threads, instruction sets,
scratch and streams."""

import os
import subprocess
import sys

import pytest
import torch

from shipsfast.errors import InputError
from shipsfast.ops import divergences
from shipsfast.ops.divergences import DIVERGENCES, divergence_rows, kl_backend, kl_rows
from tests.support.divergence_cases import (
    BUILT,
    DTYPES,
    KL_ATOL,
    P,
    draw,
    each_backend,
    kl_atol,
    needs_extension,
    oracle,
    run,
)
from tests.support.largest_double import LargestDouble
from tests.support.numerics import assert_close_abs
from tests.support.places import ROOT


@each_backend
def test_a_wrong_call_shows_the_shapes(backend, device):
    base, ablated, row_map = (tensor.to(device) for tensor in draw(7))
    for arguments, pattern in [
        ((base[:, :6], ablated, row_map), r"base \[3, 6\], ablated \[7, 7\]"),
        ((base[0], ablated, row_map), r"base \[7\], ablated \[7, 7\]"),
        ((base[:, :0], ablated[:, :0], row_map), r"V > 0.*base \[3, 0\]"),
        ((base, ablated, row_map[:3]), r"ablated \[7, 7\], row_map \[3\]"),
        ((base, ablated, row_map[:, None]), r"row_map \[7, 1\]"),
        ((base.half(), ablated, row_map), "float16.*float32.*convert"),
        ((base.long(), ablated.long(), row_map), "int64"),
        ((base, ablated, row_map.float()), "int64.*float32"),
        ((base, ablated, row_map.cpu() + 1), r"base \[3, 7\]"),
        ((base, ablated, row_map.cpu() - 1), r"base \[3, 7\]"),
        ((base[:0], ablated, row_map), r"base \[0, 7\]"),
    ]:
        with pytest.raises(InputError, match=pattern):
            kl_rows(*arguments, backend=backend)
        with pytest.raises(InputError, match=pattern):
            divergence_rows(*arguments, names=["js"], backend=backend)
    for names in ([], "kl", ["kl", "tv"], ["reverse-kl"]):
        with pytest.raises(
            InputError, match="divergences .*expected a list of kl, reverse_kl, js, total_var"
        ):
            divergence_rows(base, ablated, row_map, names=names, backend=backend)


@needs_extension
def test_the_op_checks_for_itself():
    base, ablated, row_map = draw(7)
    for arguments, pattern in [
        ((base[:, :6], ablated, row_map), r"base \[3, 6\] and ablated \[7, 7\]"),
        ((base, ablated, row_map[:3]), r"ablated \[7, 7\].*row_map \[3\]"),
        ((base, ablated, row_map.int()), "int64"),
        ((base.half(), ablated, row_map), "one dtype"),
        ((base.long(), ablated.long(), row_map), "bfloat16"),
        ((base.t().contiguous().t(), ablated, row_map), r"base \[3, 7\] with stride 3"),
        ((base, ablated, row_map + 3), r"row_map\[\d\] = \d is not a row of base \[3, 7\]"),
        ((base, ablated, row_map - 3), r"row_map\[\d\] = -\d is not a row of base \[3, 7\]"),
    ]:
        with pytest.raises(RuntimeError, match=pattern):
            torch.ops.shipsfast.kl_rows(*arguments)
        with pytest.raises(RuntimeError, match=pattern):
            torch.ops.shipsfast.divergence_rows(*arguments, 15)
    for which in (0, 16, -1):
        with pytest.raises(RuntimeError, match=f"which in 1 .. 15, got {which}"):
            torch.ops.shipsfast.divergence_rows(base, ablated, row_map, which)


def test_backends_by_name(monkeypatch):
    base, ablated, row_map = draw(7)
    with pytest.raises(InputError, match="unknown backend 'cuda'"):
        kl_rows(base, ablated, row_map, backend="cuda")
    with pytest.raises(InputError, match="unknown backend 'cuda'"):
        divergence_rows(base, ablated, row_map, names=["js"], backend="cuda")
    assert kl_backend("cpu") == ("cpp" if BUILT else "reference")
    assert kl_backend("meta") == "reference"
    auto = kl_rows(base, ablated, row_map)
    assert torch.equal(auto, kl_rows(base, ablated, row_map, backend=kl_backend("cpu")))

    monkeypatch.setattr(divergences, "extension_status", lambda: (False, "not built: run this"))
    assert kl_backend("cpu") == "reference"
    with pytest.raises(InputError, match="'cpp' cannot run: not built: run this; or use backend='reference'"):
        kl_rows(base, ablated, row_map, backend="cpp")
    assert torch.equal(kl_rows(base, ablated, row_map), kl_rows(base, ablated, row_map, backend="reference"))
    with pytest.raises(InputError, match="'cpp' cannot run: not built: run this; or use backend='reference'"):
        divergence_rows(base, ablated, row_map, names=["js"], backend="cpp")
    auto = divergence_rows(base, ablated, row_map, names=["js"])
    assert torch.equal(auto, divergence_rows(base, ablated, row_map, names=["js"], backend="reference"))


@needs_extension
def test_an_extension_from_before_an_op():
    assert divergences._extension_problem(torch.device("cpu"), "divergence_rows") is None
    reason = divergences._extension_problem(torch.device("cpu"), "later_rows")
    assert reason.startswith("the extension is from before later_rows: run `pip install")


def test_import_without_the_extension():
    code = (
        "import sys; sys.modules['shipsfast._C'] = None\n"
        "from shipsfast.ops.extension import extension_status; from shipsfast.ops.divergences import kl_backend\n"
        "loaded, reason = extension_status()\n"
        "assert not loaded and 'is not built: run `pip install --no-build-isolation' in reason, reason\n"
        "assert kl_backend('cpu') == 'reference'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@needs_extension
def test_opcheck():
    for dtype in DTYPES.values():
        torch.library.opcheck(torch.ops.shipsfast.kl_rows.default, draw(7, dtype))
        for which in (1, 6, 15):
            torch.library.opcheck(torch.ops.shipsfast.divergence_rows.default, (*draw(7, dtype), which))


@needs_extension
def test_the_number_of_threads_changes_nothing():
    base, ablated, row_map = draw(9001, num_ablated=50)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            kl_nats = kl_rows(base, ablated, row_map, backend="cpp")
            every = divergence_rows(base, ablated, row_map, names=DIVERGENCES, backend="cpp")
            results.append(torch.cat([kl_nats[None], every]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_extension
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """In a fresh process, because the choice is made once."""
    code = (
        "import torch\n"
        "import tests.support.divergence_cases as t\n"
        "import tests.support.numerics as n\n"
        "for dtype in t.DTYPES.values():\n"
        "    for vocab in (1, 7, 1023, 4099):\n"
        "        base, ablated, row_map = t.draw(vocab, dtype)\n"
        "        result = t.kl_rows(base, ablated, row_map, backend='cpp')\n"
        "        n.assert_close_abs(result, t.oracle(base, ablated, row_map), t.KL_ATOL)\n"
        "        same = t.kl_rows(base, base[row_map], row_map, backend='cpp')\n"
        "        assert torch.equal(same, torch.zeros(t.N, dtype=torch.float64))\n"
        "        for names in (t.DIVERGENCES, t.DIVERGENCES[1:2], t.DIVERGENCES[2:3]):\n"
        "            result = t.run_divergences(base, ablated, row_map, 'cpp', 'cpu', names)\n"
        "            expected = t.run_divergences(base, ablated, row_map, 'reference', 'cpu', names)\n"
        "            n.assert_close_abs(result, expected, 1e-13 * expected)\n"
        "            assert not t.run_divergences(base, base[row_map], row_map, 'cpp', 'cpu', names).any()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False, cwd=ROOT, env={**os.environ, "SHIPSFAST_CPU_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    if isa != "default" and f"SHIPSFAST_CPU_ISA={isa} is unknown, or this machine" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr


def test_the_torch_path_stays_within_its_scratch(monkeypatch):
    monkeypatch.setattr(divergences, "SCRATCH_BYTES", 2**20)
    base, ablated, row_map = draw(1000, num_ablated=200)
    with LargestDouble() as largest:
        result = kl_rows(base, ablated, row_map, backend="reference")
    assert 0 < largest.elements * 8 * divergences._LIVE_ARRAYS <= 2**20
    assert_close_abs(result, oracle(base, ablated, row_map), KL_ATOL)
    with LargestDouble() as largest:
        every = divergence_rows(base, ablated, row_map, names=DIVERGENCES, backend="reference")
    assert 0 < largest.elements * 8 * divergences._LIVE_DIVERGENCE_ARRAYS <= 2**20
    assert_close_abs(every[0], result, KL_ATOL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_extension)])
def test_a_row_map_out_of_range_on_the_gpu_gives_nan(backend):
    base, ablated, row_map = (tensor.cuda() for tensor in draw(7))
    every = {"names": DIVERGENCES, "backend": backend}
    expected = torch.cat(
        [
            kl_rows(base, ablated, row_map, backend=backend)[None],
            divergence_rows(base, ablated, row_map, **every),
        ]
    )
    row_map[1], row_map[4] = P, -1
    result = torch.cat(
        [
            kl_rows(base, ablated, row_map, backend=backend)[None],
            divergence_rows(base, ablated, row_map, **every),
        ]
    )
    bad = torch.tensor([1, 4])
    keep = torch.tensor([0, 2, 3, 5, 6])
    assert result[:, bad].isnan().all() and torch.equal(result[:, keep], expected[:, keep])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_extension
def test_the_current_stream_is_used():
    base, ablated, row_map = draw(32000, num_ablated=200)
    expected = run(base, ablated, row_map, "cpp", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(ablated, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(ablated)
        result = kl_rows(base.cuda(), late, row_map.cuda(), backend="cpp")
        every = divergence_rows(base.cuda(), late, row_map.cuda(), names=DIVERGENCES, backend="cpp")
    stream.synchronize()
    assert torch.equal(result.cpu(), expected)
    assert_close_abs(every[0], expected, kl_atol(expected, base, "cpp", "cuda"))
