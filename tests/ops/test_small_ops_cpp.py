"""The C++ small operations with half precision beside float32: against float64, rounded once."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from shipsfast.ops.extension import extension_status
from shipsfast.ops.layer_ops import CppOps
from tests.support.numerics import assert_close_abs
from tests.support.rounding import sum_eps

pytestmark = pytest.mark.skipif(not extension_status()[0], reason="needs the extension")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
each_size = pytest.mark.parametrize(("N", "D"), [(1, 2), (5, 6), (67, 34), (3, 640), (2, 3584)], ids=str)


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


class Norm(torch.nn.Module):
    """Weights in half precision, as a model has them. plus_one: as Gemma's."""

    def __init__(self, size: int, dtype: torch.dtype, *, plus_one: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(draw(size, seed=1, dtype=dtype), requires_grad=False)
        setattr(self, "eps" if plus_one else "variance_epsilon", 1e-6)
        self.plus_one = plus_one

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight.double() + self.plus_one)


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Half a unit of what is stored, and float32's of the sums before, of a row's largest number."""
    size = exact.abs()
    unit = 0.5 * torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else torch.finfo(got.dtype).eps
    floor = 2 * torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps  # subnormal numbers
    sums = sum_eps(got.dtype) * (4 + terms**0.5) * size.amax(-1, keepdim=True)
    assert_close_abs(got, exact, 1.001 * unit * size + sums + floor)


@each_half
@each_size
@pytest.mark.parametrize("plus_one", [False, True], ids=["llama", "gemma"])
def test_norms(N, D, dtype, plus_one):
    norm, x = Norm(D, dtype, plus_one=plus_one), draw(N, D, scale=3.0)
    got = CppOps(dtype, torch.float32).rms_norm(x, norm)
    assert got.dtype == dtype
    assert_rounded_once(got, norm.exact(x), D)
    y, before = draw(N, D, seed=2, dtype=dtype), x.clone()
    CppOps(dtype, torch.float32).add_rms_norm_(x, y, norm)
    assert x.dtype == torch.float32
    assert_rounded_once(x, before.double() + norm.exact(y), D)


@each_half
def test_addition(dtype):
    x, y = draw(33, 70), draw(33, 70, seed=3, dtype=dtype)
    exact = x.double() + y.double()
    torch.ops.shipsfast.add_(x, y)
    assert_close_abs(x, exact, torch.finfo(torch.float32).eps * exact.abs())


@each_half
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["to-half", "to-float32"])
def test_rotary_embedding(dtype, normed, wide):
    heads, size = 3, 10
    rows = draw(2, 7, heads * size + 4, dtype=dtype, scale=2.0)
    x = rows[..., 4:].unflatten(2, (heads, size))  # a slice of wider rows
    cos, sin = (draw(7, size, seed=seed, dtype=dtype) for seed in (4, 5))
    norm = Norm(size, dtype, plus_one=False) if normed else None
    attention = torch.float32 if wide else dtype
    got = CppOps(dtype, attention).rope(x, cos, sin, norm)
    assert got.dtype == attention
    start = norm.exact(x) if normed else x.double()
    exact, _ = apply_rotary_pos_emb(start, start, cos.double()[None], sin.double()[None], unsqueeze_dim=2)
    assert_rounded_once(got, exact, 4 * size)


@each_half
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@each_size
def test_activations(N, D, activation, dtype):
    gate_up = draw(N, 2 * D, scale=3.0, dtype=dtype)
    gate, up = gate_up.double().chunk(2, 1)
    act = torch.nn.functional.silu(gate)
    if activation == "gelu":
        act = torch.nn.functional.gelu(gate, approximate="tanh")
    got = CppOps(dtype, torch.float32).gated(gate_up, activation)
    assert got.dtype == dtype
    assert_rounded_once(got, act * up, 16)


@each_half
def test_every_number_is_rounded_as_torch_does(dtype):
    """Every half, halfway between two, a hair beside it, and what overflows or is subnormal."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = halves[halves.isfinite()].unique()  # in order
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, way)) for way in (torch.inf, -torch.inf)]
    largest = [
        torch.finfo(torch.float32).max,
        torch.inf,
        torch.nan,
        65504.0,
        65519.99,
        65520.0,
        65536.0,
        1e-45,
    ]
    weight = torch.cat([halves, middle, *beside, torch.tensor(largest), -torch.tensor(largest)])
    out = torch.empty(1, len(weight), dtype=dtype)
    # Ones are their own norm, and come out as the weight.
    torch.ops.shipsfast.rms_norm(torch.ones(1, len(weight)), weight, 0.0, 0.0, out)
    expected = weight.to(dtype)[None]
    assert torch.equal(out.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(out[known], expected[known])


@each_half
def test_every_number_is_read_as_torch_does(dtype):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.zeros(len(halves))
    torch.ops.shipsfast.add_(x, halves)
    assert torch.equal(x.isnan(), halves.isnan())
    known = ~halves.isnan()
    assert torch.equal(x[known], halves.float()[known])


def test_what_does_not_fit_is_refused():
    x, half, op = torch.zeros(2, 4), torch.zeros(2, 4).bfloat16(), torch.ops.shipsfast
    weight = torch.ones(4)
    for call in (
        lambda: op.add_(half, half), lambda: op.add_(x.double(), half), lambda: op.add_(x, half[:1]),
        lambda: op.rms_norm(x, weight.bfloat16(), 1e-6, 0.0, x.clone()), lambda: op.rms_norm(half, weight, 1e-6, 0.0, x),
        lambda: op.rms_norm(x.double(), weight.double(), 1e-6, 0.0, half), lambda: op.silu_mul(half, x[:, :2].contiguous()),
        lambda: op.add_rms_norm_(half, half, weight, 1e-6, 0.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            call()
