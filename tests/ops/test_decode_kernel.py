"""What is Triton's own in decode attention: launching, refusing, launch parameters. tests/ops/test_decode_attention.py
holds the results to the oracle.

Without a GPU the kernel runs in Triton's interpreter (tests/conftest.py asks for it before triton is imported).
With SHIPSFAST_TEST_GPU=1 and a GPU the same tests run compiled, with the committed launch parameters of that device.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from shipsfast.kernels.attention_blocks import INTERPRETED
from shipsfast.kernels.launch_config import LaunchConfig, load_configs

from shipsfast.kernels import decode_attention as module
from tests.conftest import TEST_GPU
from tests.support.attention_numerics import ALTERNATIVES, DTYPE_NAMES
from tests.support.decode_numerics import (
    DEVICE,
    Case,
    Inputs,
    make_inputs,
    make_replacements,
    triton_attention,
    why_no_triton,
)

pytestmark = [pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))]
if TEST_GPU:
    pytestmark.append(pytest.mark.gpu)
else:
    assert INTERPRETED, "TRITON_INTERPRET=1 must be set before triton is imported: see tests/conftest.py"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Case(N=3, C=21)


@pytest.fixture
def unchecked(monkeypatch):
    """As on a GPU, where looking at flags, slots and lengths would wait for it."""
    monkeypatch.setattr("shipsfast.kernels.attention_checks.require_replacements", lambda *args: None)
    monkeypatch.setattr("shipsfast.kernels.attention_checks._check_range", lambda *args: None)


@pytest.mark.parametrize("name", ALTERNATIVES)
@pytest.mark.parametrize("HKV", [1, 8])
def test_a_flag_without_its_vectors_gives_nan_where_it_cannot_be_refused(name, HKV, unchecked):
    inputs = make_inputs(Case(N=1, H=8, HKV=HKV), torch.ones(1, 8), torch.ones(1, 8), DEVICE)
    flags = torch.arange(8, dtype=torch.int8)[None]
    inputs.options |= make_replacements(inputs, flags) | {name: None}
    out = inputs.run(triton_attention)
    missing = (flags[0] & (1 << ALTERNATIVES.index(name))) != 0
    assert torch.isnan(out[:, missing]).all() and torch.isfinite(out[:, ~missing]).all()


@pytest.mark.parametrize("name", ["slot", "length"])
def test_an_entry_out_of_range_gives_nan_where_it_cannot_be_refused(name, unchecked):
    inputs = make_inputs(Case(N=4, H=4, replace="full"), device=DEVICE)
    good = inputs.run(triton_attention)
    assert torch.isfinite(good).all()
    positions = inputs.args[1].shape[2]
    wrong = {"slot": [-1, 6, 2**31 - 1], "length": [0, -5, positions + 1]}[name]
    for value in wrong:
        bad = Inputs(list(inputs.args), inputs.options)
        i = 3 + (name == "length")
        bad.args[i] = bad.args[i].clone()
        bad.args[i][1] = value
        out = bad.run(triton_attention)
        assert torch.isnan(out[1]).all()
        assert torch.equal(out[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.skipif(TEST_GPU, reason="counts what the interpreter multiplies")
def test_heads_that_need_no_keys_read_none(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    products, dot = [], Builder.create_dot
    monkeypatch.setattr(Builder, "create_dot", lambda *args: products.append(1) or dot(*args))
    inputs = make_inputs(Case(N=1, H=4, HKV=4, C=20), torch.ones(1, 4), torch.ones(1, 4))

    def count(**options) -> int:
        products.clear()
        inputs.run(triton_attention, **options)
        return len(products)

    per_head = 2 * 2  # blocks of keys, products
    assert count() == 4 * per_head
    assert count(window=3) == 4 * 2
    inputs.options |= make_replacements(inputs, torch.tensor([[3, 4, 7, 2]], dtype=torch.int8))
    assert count() == 2 * per_head
    inputs.args[6] = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert count() == per_head


@pytest.mark.parametrize("block_m, block_n", [(1, 16), (4, 16), (16, 64), (64, 32)])
def test_any_tile_size(block_m, block_n):
    config = LaunchConfig(block_m, block_n, num_warps=4, num_stages=1)
    inputs = make_inputs(Case(N=2, H=6, HKV=1, dtype=torch.bfloat16, replace="full"), device=DEVICE)
    inputs.check(module.decode_attention, config=config)


def changed(position: int, function):
    """A change of one positional argument."""
    return lambda inputs: inputs.args.__setitem__(position, function(inputs.args[position]))


def each(*positions: int, function, **values):
    """A change of several positional arguments alike, and of options."""

    def change(inputs):
        for position in positions:
            inputs.args[position] = function(inputs.args[position])
        inputs.options.update(values)

    return change


def option(**values):
    return lambda inputs: inputs.options.update(values)


def replacing(**changes):
    """Replacements of a head's query, keys and output, some of them changed."""

    def change(inputs):
        flags = torch.full((SMALL.N, SMALL.H), 7, dtype=torch.int8)
        good = make_replacements(inputs, flags)
        inputs.options |= good | {name: function(good[name]) for name, function in changes.items()}

    return change


def first_is(value: int):
    return lambda x: torch.cat([x.new_tensor([value]), x[1:]])


not_contiguous = lambda x: x.mT.contiguous().mT
REFUSALS = {
    "float64": (each(0, 1, 2, function=torch.Tensor.double), TypeError, "backend='reference'"),
    "mixed-dtypes": (changed(1, torch.Tensor.bfloat16), TypeError, "q, k_cache and v_cache must have one dtype"),
    "bf16-mask-vector": (changed(5, torch.Tensor.bfloat16), TypeError, "logit_scale must be float32"),
    "mask-vectors-differ": (changed(6, lambda x: x[:, :3]), ValueError, r"both be \[N, H\], got output_scale"),
    "entries": (changed(0, lambda x: x[:2]), ValueError, r"q must be \[3, 4, D\], got \(2, 4, 16\)"),
    "heads": (changed(0, lambda x: x[:, :3]), ValueError, r"q must be \[3, 4, D\]"),
    "queries-with-tokens": (changed(0, lambda x: x[:, :, None]), ValueError, r"q must be \[3, 4, D\]"),
    "cache-without-slots": (changed(1, lambda x: x[0]), ValueError, r"k_cache must be \[slots"),
    "key-head-size": (changed(1, lambda x: x[..., :8]), ValueError, "one head size, got 16 in q and 8 in k_cache"),
    "value-head-size": (
        changed(2, lambda x: x[..., :8]),
        ValueError,
        "one head size, got 16 in q and 8 in v_cache: use backend='reference'",
    ),
    "caches-differ": (changed(2, lambda x: x[:, :, 1:]), ValueError, "caches must have one shape"),
    "slots-differ": (changed(2, lambda x: x[1:]), ValueError, "caches must have one shape"),
    "key-heads": (each(1, 2, function=lambda x: x.repeat(1, 2, 1, 1)[:, :3]), ValueError, "divides that of the"),
    "no-key-heads": (each(1, 2, function=lambda x: x[:, :0]), ValueError, "divides that of the"),
    "last-dim": (changed(0, not_contiguous), ValueError, "dimension of q must be contiguous"),
    "last-dim-of-cache": (changed(1, not_contiguous), ValueError, "dimension of k_cache must be contiguous"),
    "int64-slot": (changed(3, torch.Tensor.long), ValueError, r"slot must be contiguous int32 \[3\]"),
    "length-shape": (changed(4, lambda x: x[:2]), ValueError, r"length must be contiguous int32 \[3\]"),
    "softcap": (option(softcap=0.0), ValueError, "softcap must be positive"),
    "window": (option(window=0), ValueError, "window must be at least 1"),
    "replace-dtype": (replacing(replace=torch.Tensor.bool), TypeError, "replace must be int8"),
    "replace-shape": (replacing(replace=lambda x: x[:1]), ValueError, r"replace must be \[3, 4\]"),
    "q_alt-dtype": (replacing(q_alt=torch.Tensor.half), TypeError, "q_alt must be torch.float32"),
    "q_alt-entries": (replacing(q_alt=lambda x: x[:2]), ValueError, r"q_alt must be \[3 or 1, 16\]"),
    "k_alt-per-head": (replacing(k_alt=lambda x: x[:, None]), ValueError, r"k_alt must be \[5, 21, 16\]"),
    "k_alt-slots": (replacing(k_alt=lambda x: x[:3]), ValueError, r"k_alt must be \[5, 21, 16\]"),
    "k_alt-last-dim": (replacing(k_alt=not_contiguous), ValueError, "dimension of k_alt must be contiguous"),
    "out_alt-heads": (replacing(out_alt=lambda x: x[:2]), ValueError, r"out_alt must be \[4 or 1, 16\]"),
    "out_alt-size": (replacing(out_alt=lambda x: x[..., :8]), ValueError, "out_alt must be"),
    "head-too-large": (
        each(0, 1, 2, function=lambda x: x.repeat(*[1] * (x.dim() - 1), 17), config=None),
        ValueError,
        "no launch parameters.*backend='reference'",
    ),
}  # fmt: skip
if not TEST_GPU:  # where flags, slots and lengths are not looked at
    REFUSALS |= {
        "replace-flag": (replacing(replace=lambda x: x + 1), ValueError, "sums of 1, 2 and 4, got 8"),
        "k_alt-missing": (replacing(k_alt=lambda x: None), ValueError, "k_alt is None"),
        "slot-negative": (changed(3, first_is(-1)), ValueError, "slot must be between 0 and 4, got -1"),
        "slot-past-the-last": (changed(3, first_is(5)), ValueError, "slot must be between 0 and 4, got 5"),
        "length-0": (changed(4, first_is(0)), ValueError, "length must be between 1 and 21, got 0"),
        "length-past-the-cache": (changed(4, first_is(22)), ValueError, "between 1 and 21, got 22"),
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    change, error, message = REFUSALS[name]
    inputs = make_inputs(SMALL, device=DEVICE)
    change(inputs)
    with pytest.raises(error, match=message):
        inputs.run(module.decode_attention, **{"config": LaunchConfig(16, 16, 4, 1), **inputs.options})


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "default"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_configs_cover_every_dtype_and_head_size(name, dtype):
    sizes = load_configs(name)["decode_attention"]["any"][str(dtype).removeprefix("torch.")]
    assert list(sizes) == [64, 128, 256]


@pytest.mark.skipif(TEST_GPU, reason="the GPU tests use the committed parameters everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_committed_parameters_run(dtype):
    make_inputs(Case(N=2, H=3, HKV=1, D=128, dtype=dtype)).check(module.decode_attention)


needs_gpu = pytest.mark.skipif(not TEST_GPU, reason="needs a GPU: set SHIPSFAST_TEST_GPU=1")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_long_caches_on_the_gpu(dtype, groups, D):
    """Many entries of many key blocks: several in flight, every tile size, some heads ablated."""
    inputs = make_inputs(
        Case(N=40, H=2 * groups, HKV=2, C=1500, D=D, dtype=dtype, replace="full"), device=DEVICE
    )
    out = inputs.check(module.decode_attention)
    assert torch.equal(out, inputs.run(module.decode_attention))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_replacements_change_no_bits_on_the_gpu(dtype, groups):
    case = Case(N=20, H=4 * groups, HKV=4, C=700, D=128, dtype=dtype)
    inputs = make_inputs(case, *torch.ones(2, case.N, case.H), DEVICE)
    without = inputs.run(module.decode_attention)
    flags = (torch.arange(case.N * case.H, dtype=torch.int8) % 8).reshape(case.N, case.H)
    inputs.options |= make_replacements(inputs, flags)
    kept = (flags == 0).to(DEVICE)
    assert torch.equal(inputs.run(module.decode_attention)[kept], without[kept])


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_32_bits_on_the_gpu():
    """The third slot, then the third position, 2**31 elements from the first: 6 GiB of bfloat16."""
    case = dataclasses.replace(SMALL, N=1, H=2, HKV=1, C=3, dtype=torch.bfloat16)
    inputs = make_inputs(case, *torch.ones(2, 1, 2), DEVICE)
    far = torch.empty(3 * 2**30, dtype=torch.bfloat16, device=DEVICE)
    inputs.args[3:5] = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (2, 3))
    inputs.args[1:3] = near = [torch.randn_like(x) for x in inputs.args[1:3]]
    expected = inputs.run(module.decode_attention)
    for strides in ((2**30, 2**20, 64), (64, 2**20, 2**30)):  # of slot, head, position
        for i, x in enumerate(near):
            view = far[i * 4096 :].as_strided(x.shape, (*strides, 1))
            view.copy_(x)
            inputs.args[1 + i] = view
        assert torch.equal(inputs.run(module.decode_attention), expected)
