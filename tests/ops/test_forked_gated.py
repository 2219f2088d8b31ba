"""Gate and up of rows that fork, and their activation, against float64: the Triton kernel and the C++ operation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from shipsfast.kernels import forked_gated as kernel
from shipsfast.ops.extension import extension_status
from shipsfast.ops.layer_ops import small_ops
from tests.conftest import TEST_GPU
from tests.ops.test_small_ops import ACTIVATIONS, DTYPES, FAR, assert_as_close, assert_same_rounding, draw
from tests.support.decode_numerics import DEVICE, why_no_triton
from tests.support.numerics import assert_close_abs
from tests.support.sparse_inputs import sparse

triton_only = [
    pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton())),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    *([pytest.mark.gpu] if TEST_GPU else []),
]
cpp_only = pytest.mark.skipif(not extension_status()[0] or TEST_GPU, reason="needs the extension, on a CPU")
WAYS = [
    *(pytest.param("triton", dtype, id=f"triton-{name}", marks=triton_only) for name, dtype in DTYPES.items()),
    pytest.param("cpp", torch.float32, id="cpp-fp32", marks=cpp_only),
    pytest.param("cpp", torch.float64, id="cpp-fp64", marks=cpp_only),
    pytest.param("cpp", torch.bfloat16, id="cpp-bf16", marks=cpp_only),
    pytest.param("cpp", torch.float16, id="cpp-fp16", marks=cpp_only),
]  # fmt: skip
# Rows, tokens, rank, columns: less than a tile of each; tiles that end inside; more than one of each; a rank of two heads.
SIZES = [(1, 1, 1, 1), (3, 5, 8, 6), (2, 70, 16, 48), (2, 9, 40, 70), (1, 130, 128, 65), (2, 65, 192, 130)]


def inputs(n: int, tokens: int, rank: int, width: int, dtype: torch.dtype, *, drifts: bool, biased: bool):
    wide = torch.promote_types(dtype, torch.float32)
    change = draw(n, tokens, rank, dtype=dtype)
    products = draw(n, rank, 2 * width, dtype=dtype, scale=rank**-0.5, seed=1)
    base = draw(tokens, 2 * width, dtype=dtype, scale=2.0, seed=2)
    factor = 1 + 0.3 * draw(n, tokens, dtype=torch.float64, seed=7)
    scale = 1 + 0.3 * draw(n, tokens, dtype=torch.float64, seed=3)
    drift = 0.2 * draw(n, tokens, dtype=torch.float64, seed=4) if drifts else None
    other = draw(tokens, 2 * width, dtype=dtype, seed=5) if drifts else None
    bias = draw(2 * width, dtype=dtype, seed=6) if biased else None
    factor, scale, drift = (x if x is None else x.to(wide) for x in (factor, scale, drift))
    return change, products, factor, base, scale, drift, other, bias


def gate_up(change, products, factor, base, scale, drift, other, bias, dtype: torch.dtype) -> torch.Tensor:
    """By its definition, computed in a dtype: [n * T, 2 M]."""
    z = factor.to(dtype)[..., None] * (change.to(dtype) @ products.to(dtype)) + base.to(dtype)
    if drift is not None:
        z = z + drift.to(dtype)[..., None] * other.to(dtype)
    z = z * scale.to(dtype)[..., None]
    return (z if bias is None else z + bias.to(dtype)).flatten(0, 1)


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize(("drifts", "biased"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forked_gated(sizes, drifts, biased, backend, dtype):
    activation = "gelu" if drifts else "silu"
    act = ACTIVATIONS[activation]
    given = inputs(*sizes, dtype, drifts=drifts, biased=biased)
    gate, up = gate_up(*given, torch.float64).chunk(2, 1)
    exact = act(gate) * up
    wide = torch.promote_types(dtype, torch.float32)
    gate, up = gate_up(*given, wide).to(dtype).chunk(2, 1)  # rounded once, as a product would be
    own = act(gate) * up
    if backend == "cpp":
        given = [x if x is None else x.cpu() for x in given]
        own, exact = own.cpu(), exact.cpu()
    out = torch.full_like(own, torch.nan)
    before = [x if x is None else x.clone() for x in given]
    small_ops(backend, dtype, torch.float32).forked_gated(*given, activation, out)
    if dtype == torch.float64:  # in which the truth is computed too
        terms = sizes[2] + 4
        assert_close_abs(out, exact, 2 * torch.finfo(dtype).eps * terms**0.5 * (1 + exact.abs().max()))
    else:
        assert_as_close(out, own, exact, sizes[2] + 4)
    if backend == "triton" and dtype.itemsize == 2 and activation == "silu":
        assert_same_rounding(out, own)
    for x, y in zip(given, before, strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
def test_a_row_without_change_is_the_base_row(backend, dtype):
    """To the bit, so that a head that does nothing scores nothing."""
    change, products, factor, base, *_ = inputs(3, 20, 8, 34, dtype, drifts=False, biased=False)
    given = [torch.zeros_like(change), products, factor, base, torch.ones_like(factor), None, None, None]
    given = [x if x is None or backend == "triton" else x.cpu() for x in given]
    ops = small_ops(backend, dtype, torch.float32)
    out = given[0].new_full((60, 34), torch.nan)
    ops.forked_gated(*given, "silu", out)
    for part in out.split(20):
        assert torch.equal(part, ops.gated(given[3], "silu"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
def test_rows_of_the_result_may_be_far_apart(dtype):
    given = inputs(1, 4, 8, 6, dtype, drifts=False, biased=False)
    out = torch.empty(4, 6, dtype=dtype, device=DEVICE)
    kernel.forked_gated(*given, "silu", out)
    more = torch.full((4, 20), torch.nan, dtype=dtype, device=DEVICE)
    assert torch.equal(kernel.forked_gated(*given, "silu", more[:, 7:13]), out)
    assert more[:, :7].isnan().all() and more[:, 13:].isnan().all()
    if not TEST_GPU:  # address space without memory behind it is for a CPU
        far = sparse(3 * FAR + 64, dtype).as_strided((4, 6), (FAR, 1))
        assert torch.equal(kernel.forked_gated(*given, "silu", far), out)


if TEST_GPU:
    test_rows_of_the_result_may_be_far_apart = pytest.mark.gpu(test_rows_of_the_result_may_be_far_apart)


@pytest.mark.parametrize(
    "changed",
    [
        dict(change=torch.zeros(2, 5)), dict(products=torch.zeros(2, 3, 12)), dict(base=torch.zeros(4, 12)),
        dict(factor=torch.ones(10)), dict(scale=torch.ones(2, 5).double()), dict(drift=torch.ones(2, 5)), dict(other=torch.zeros(5, 12)),
        dict(bias=torch.zeros(6)), dict(activation="relu"), dict(out=torch.zeros(10, 5)),
        dict(base=torch.zeros(12, 5).t()), dict(base=torch.zeros(5, 12).half()), dict(out=torch.zeros(10, 6).half()),
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_bad_arguments_are_refused(changed):
    names = ("change", "products", "factor", "base", "scale", "drift", "other", "bias")
    given = dict(zip(names, inputs(2, 5, 8, 6, torch.float32, drifts=False, biased=False), strict=True))
    given |= dict(activation="silu", out=torch.zeros(10, 6, device=DEVICE))
    kernel.forked_gated(**given)
    changed = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changed.items()}
    with pytest.raises(ValueError, match="forked_gated: expected"):
        kernel.forked_gated(**given | changed)


@cpp_only
@pytest.mark.parametrize("place", range(8))
def test_the_operation_refuses_other_shapes(place):
    wide, rows = torch.zeros(5, 12), torch.ones(5)
    given = [wide.clone(), rows, wide, rows, rows, wide, torch.zeros(12)]
    out = torch.zeros(5, 6)
    torch.ops.shipsfast.forked_gated(*given, False, out)
    if place == 7:
        out = torch.zeros(5, 7)
    else:
        given[place] = torch.zeros(*given[place].shape[:-1], 11)
    with pytest.raises(RuntimeError, match="shipsfast::forked_gated: expected"):
        torch.ops.shipsfast.forked_gated(*given, False, out)


@pytest.mark.skipif(TEST_GPU, reason="there is a GPU")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr("shipsfast.kernels.small_ops.INTERPRETED", False)
    given = inputs(1, 2, 4, 6, torch.float32, drifts=False, biased=False)
    with pytest.raises(RuntimeError, match="needs a CUDA device.*layers='model'"):
        kernel.forked_gated(*given, "silu", torch.zeros(2, 6))
