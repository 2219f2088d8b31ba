"""The Triton small operations against float64, and against the modules of transformers whose rounding they follow.

Without a GPU they run in Triton's interpreter, which rounds to bfloat16 by cutting digits off: bfloat16 is for a GPU
(SHIPSFAST_TEST_GPU=1), and float16 shows the order of rounding here.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton")

from shipsfast.kernels import small_ops as kernels
from tests.conftest import TEST_GPU
from tests.support.decode_numerics import DEVICE, why_no_triton
from tests.support.numerics import assert_close_abs
from tests.support.rounding import sum_eps
from tests.support.sparse_inputs import sparse

pytestmark = [
    pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton())),
    pytest.mark.filterwarnings(
        "ignore:overflow encountered in exp"
    ),  # the interpreter's, where the result is 0
]
if TEST_GPU:
    pytestmark.append(pytest.mark.gpu)
else:
    assert kernels.INTERPRETED, (
        "TRITON_INTERPRET=1 must be set before triton is imported: see tests/conftest.py"
    )

DTYPES = {"fp32": torch.float32, "fp16": torch.float16} | ({"bf16": torch.bfloat16} if TEST_GPU else {})
ACTIVATIONS = {"silu": silu, "gelu": functools.partial(gelu, approximate="tanh")}
NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm}
EPS = 1e-6
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Rows and columns: a row that fills no tile, tiles that end inside the rows, one more row than a tile holds.
each_size = pytest.mark.parametrize(
    ("N", "D"), [(1, 2), (5, 6), (67, 34), (33, 64), (3, 640), (2, 2048), (2, 3584)], ids=lambda x: str(x)
)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)


def strided(x: torch.Tensor, more: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows as a slice of wider ones that are NaN elsewhere, after and before: (slice, all)."""
    whole = torch.full(
        (*x.shape[:-1], more + x.shape[-1] + more), float("nan"), dtype=x.dtype, device=x.device
    )
    part = whole[..., more : more + x.shape[-1]]
    part.copy_(x)
    return part, whole


def untouched_beside(whole: torch.Tensor, more: int = 7) -> bool:
    return bool(whole[..., :more].isnan().all() and whole[..., -more:].isnan().all())


def module(family: str, width: int, dtype: torch.dtype) -> torch.nn.Module:
    norm = NORMS[family](width, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = draw(width, dtype=dtype, scale=0.5, seed=1) + (family == "llama")
    return norm.requires_grad_(False)


def exact_norm(x: torch.Tensor, norm: torch.nn.Module, family: str) -> torch.Tensor:
    wide = x.double()
    return (
        wide
        / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        * (norm.weight.double() + (family == "gemma"))
    )


def assert_as_close(got: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, terms: int = 1) -> None:
    """As close to the truth as the model's own module: its largest error, and a floor for where that is luck.

    The floor is a unit for what is stored, and float32's unit times the root of a sum's terms for other orders of it.
    Numbers of one row cancel each other in some ops, so that of sums is of the row's largest. On a GPU float32 has four
    units: its division, exponential and reciprocal root are each within two, not half of one.
    """
    assert got.dtype == own.dtype
    error = (own.double() - exact).abs().max().cpu()
    ulps = 4 if TEST_GPU and got.dtype == torch.float32 else 1
    size = exact.abs().cpu()
    floor = ulps * torch.finfo(got.dtype).eps * size + sum_eps(got.dtype) * terms**0.5 * size.amax(
        -1, keepdim=True
    )
    assert_close_abs(got, exact, error + floor)


def assert_same_rounding(got: torch.Tensor, own: torch.Tensor) -> None:
    """In half precision: the module's bits, but for numbers on the edge of two that another order of sums decides."""
    if got.dtype == torch.float32:
        return
    other = (got != own).float().mean() if got.numel() else 0.0
    assert other <= 0.01, f"{other:.1%} of the numbers are rounded otherwise"


@each_dtype
@pytest.mark.parametrize("family", NORMS)
@each_size
def test_rms_norm(N, D, family, dtype):
    norm = module(family, D, dtype)
    x = draw(N, D, dtype=dtype, scale=3.0)
    own, exact = norm(x), exact_norm(x, norm, family)
    plus_one = family == "gemma"
    got = kernels.rms_norm(x, norm.weight, EPS, plus_one)
    assert got.is_contiguous()
    assert_as_close(got, own, exact, D)
    assert_same_rounding(got, own)
    part, _ = strided(x)
    out, whole = strided(torch.zeros_like(x))
    assert kernels.rms_norm(part, norm.weight, EPS, plus_one, out=out) is out
    assert torch.equal(out, got) and untouched_beside(whole)


@each_dtype
@pytest.mark.parametrize("family", NORMS)
@each_size
def test_add_rms_norm(N, D, family, dtype):
    norm = module(family, D, dtype)
    x, y = draw(N, D, dtype=dtype), draw(N, D, dtype=dtype, scale=3.0, seed=2)
    own, exact = x + norm(y), x.double() + exact_norm(y, norm, family)
    part, whole = strided(x)
    assert kernels.add_rms_norm_(part, y, norm.weight, EPS, family == "gemma") is part
    assert_as_close(part, own, exact, D)
    assert_same_rounding(part, own)
    assert untouched_beside(whole)


@each_dtype
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("B", "T", "H", "D"), [(1, 1, 1, 2), (2, 5, 3, 34), (1, 3, 8, 64), (2, 2, 33, 128), (1, 2, 5, 96), (1, 2, 16, 256)]
)  # fmt: skip
def test_rope(B, T, H, D, normed, dtype):
    """In place, heads in the middle of a wider row, as queries and keys lie in the product of q, k and v."""
    x = draw(B, T, H, D, dtype=dtype, scale=2.0)
    angle = draw(T, D // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norm = module("llama", D, dtype) if normed else None
    own = norm(x) if normed else x
    exact = exact_norm(x, norm, "llama") if normed else x.double()
    own, _ = apply_rotary_pos_emb(own, own, cos[None], sin[None], unsqueeze_dim=2)
    exact, _ = apply_rotary_pos_emb(exact, exact, cos[None].double(), sin[None].double(), unsqueeze_dim=2)
    wide, whole = strided(x.flatten(2))
    got = wide.unflatten(2, (H, D))
    assert kernels.rope_(got, cos, sin, *((norm.weight, EPS) if normed else ())) is got
    assert_as_close(got, own, exact, D if normed else 2)
    assert untouched_beside(whole)
    if normed:
        assert_same_rounding(got, own)
    elif dtype != torch.float32:
        assert torch.equal(got, own), "no sum here whose order could differ"


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (3, 34), (2, 1024), (2, 1025), (1, 2752)])
def test_gated(N, M, activation, dtype):
    gate, up = draw(N, M, dtype=dtype, scale=6.0), draw(N, M, dtype=dtype, seed=3)
    gate[0, 0], gate[-1, -1] = -100.0, 100.0  # where an exponential overflows
    act = ACTIVATIONS[activation]
    own, exact = act(gate) * up, act(gate.double()) * up.double()
    part, _ = strided(torch.cat([gate, up], 1))
    got = kernels.gated(part, activation)
    assert got.shape == (N, M) and got.is_contiguous()
    assert_as_close(got, own, exact)
    # torch's 1 + tanh(u) cancels where u is negative, which the kernel's form does not: nearer the truth, other digits.
    kept = gate > (-1 if activation == "gelu" else -torch.inf)
    assert_same_rounding(got[kept], own[kept])


FAR = 2**30  # numbers from one row to the next: the third row's place does not fit 32 bits


@pytest.mark.skipif(TEST_GPU, reason="address space without memory behind it is for a CPU")
def test_rows_beyond_32_bits():
    x, y = draw(4, 6, dtype=torch.float32), draw(4, 6, dtype=torch.float32, seed=1)
    far = lambda near: sparse(3 * FAR + 64, torch.float32).as_strided(near.shape, (FAR, 1)).copy_(near)
    weight, angle = draw(6, dtype=torch.float32), draw(4, 3, dtype=torch.float32).repeat(1, 2)
    assert torch.equal(kernels.rms_norm(far(x), weight, EPS, out=far(y)), kernels.rms_norm(x, weight, EPS))
    added = kernels.add_rms_norm_(x.clone(), y, weight, EPS)
    assert torch.equal(kernels.add_rms_norm_(far(x), far(y), weight, EPS), added)
    assert torch.equal(kernels.gated(far(x), "silu"), kernels.gated(x, "silu"))
    turned = kernels.rope_(x.clone().view(1, 4, 1, 6), angle.cos(), angle.sin())
    assert torch.equal(kernels.rope_(far(x)[None, :, None], angle.cos(), angle.sin()), turned)
    turned = kernels.rope_(x.clone().view(4, 1, 1, 6), angle[:1].cos(), angle[:1].sin())
    assert torch.equal(kernels.rope_(far(x)[:, None, None], angle[:1].cos(), angle[:1].sin()), turned)


def test_nothing_is_done_for_no_rows():
    weight = draw(6, dtype=torch.float32)
    x = torch.empty(0, 6, device=DEVICE)
    assert kernels.rms_norm(x, weight, EPS).shape == (0, 6)
    assert kernels.add_rms_norm_(x, x.clone(), weight, EPS) is x
    assert kernels.gated(x, "silu").shape == (0, 3)
    four, none = torch.empty(0, 2, 3, 6, device=DEVICE), torch.empty(2, 6, device=DEVICE)
    assert kernels.rope_(four, none, none) is four


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernels.rms_norm(x, x[0, :3], EPS),
        lambda x: kernels.rms_norm(x.t(), x[:, 0].contiguous(), EPS),
        lambda x: kernels.rms_norm(x, x[0], EPS, out=x[:1]),
        lambda x: kernels.rms_norm(x.double(), x[0], EPS),
        lambda x: kernels.add_rms_norm_(x.half(), x.bfloat16(), x[0], EPS),
        lambda x: kernels.rms_norm(x.half(), x[0], EPS, out=x.bfloat16()),
        lambda x: kernels.rope_(x, x, x),
        lambda x: kernels.rope_(x.view(2, 1, 1, 6), x, x),
        lambda x: kernels.rope_(x.view(2, 1, 2, 3), x[:1], x[:1]),
        lambda x: kernels.rope_(x.view(1, 2, 1, 6), x, x, x[0, :3]),
        lambda x: kernels.gated(x, "relu"),
        lambda x: kernels.gated(x[:, :5], "silu"),
        lambda x: kernels.gated(x.double(), "silu"),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call(torch.randn(2, 6, device=DEVICE))


@pytest.mark.skipif(TEST_GPU, reason="there is a GPU")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs a CUDA device.*layers='model'"):
        kernels.gated(torch.randn(2, 6), "silu")
