"""The C++ ops at the edges of what they take: nothing, one, one more than a vector, rows far apart, odd addresses.

`make test-sanitizers` runs these under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from shipsfast.ops import decode_attention, prefix_tree, reference, tree_attention_cpp
from shipsfast.ops.divergences import DIVERGENCES, divergence_rows, kl_rows
from shipsfast.ops.extension import extension_status
from tests.support import decode_numerics
from tests.support.attention_numerics import Case, make_arguments, make_prompts, oracle
from tests.support.numerics import assert_close_abs
from tests.support.sparse_inputs import sparse

built, why = extension_status()
pytestmark = pytest.mark.skipif(not built, reason=f"needs the extension: {why}")

FAR = 2**31 + 5  # elements from one row to the next
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1023]
TYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
each_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES.keys())


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, one byte beside where their type wants them."""
    room = bytearray(x.numel() * x.itemsize + 1)
    out = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)
    room[1:] = x.contiguous().view(torch.uint8).numpy().tobytes()
    assert out.data_ptr() % x.itemsize
    return out


def logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)


def held(base, ablated, rows, copies=None) -> None:
    """Both backends agree on all divergences; `copies` are the same tensors laid out otherwise."""
    expected = divergence_rows(base, ablated, rows, names=DIVERGENCES, backend="reference")
    got = divergence_rows(*(copies or (base, ablated)), rows, names=DIVERGENCES, backend="cpp")
    kl = kl_rows(*(copies or (base, ablated)), rows, backend="cpp")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(kl, expected[0], rtol=1e-10, atol=1e-14, equal_nan=True)


@each_type
def test_vocabularies_that_are_no_multiple_of_a_vector(dtype):
    for vocab in SIZES:
        base, ablated = logits(2, vocab, dtype), logits(5, vocab, dtype, 1)
        held(base, ablated, torch.tensor([1, 0, 1, 1, 0]))


@each_type
def test_no_rows_and_rows_of_one_base(dtype):
    for base, count in ((logits(0, 9, dtype), 0), (logits(1, 9, dtype), 0), (logits(1, 9, dtype), 1)):
        rows = torch.zeros(count, dtype=torch.int64)
        assert kl_rows(base, logits(count, 9, dtype, 1), rows, backend="cpp").shape == (count,)
        assert (
            divergence_rows(base, logits(count, 9, dtype), rows, names=DIVERGENCES, backend="cpp").shape[1]
            == count
        )
    one = logits(1, 17, dtype)
    held(
        one.expand(4, 17), logits(3, 17, dtype, 1), torch.tensor([3, 0, 2])
    )  # rows that are one row, stride 0


@each_type
def test_rows_at_odd_places(dtype):
    """Rows of a wider tensor, from its second element on; columns with a stride; single bytes off."""
    base, ablated = logits(3, 37, dtype), logits(4, 37, dtype, 1)
    rows = torch.tensor([2, 0, 1, 2])

    def inside(x):
        wide = torch.full((len(x), 50), float("nan"), dtype=dtype)
        wide[:, 1:38] = x
        return wide[:, 1:38]

    held(base, ablated, rows, (inside(base), inside(ablated)))
    held(base, ablated, rows, tuple(x.repeat_interleave(2, 1)[:, ::2] for x in (base, ablated)))
    held(base, ablated, rows, (misaligned(base), misaligned(ablated)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_rows_above_2_to_the_31_elements(dtype):
    vocab = 333
    base, ablated = logits(2, vocab, dtype), logits(2, vocab, dtype, 1)
    far = []
    for x in (base, ablated):
        room = sparse(FAR + vocab, dtype).as_strided((2, vocab), (FAR, 1))
        room.copy_(x)
        far.append(room)
    held(base, ablated, torch.tensor([1, 0]), far)


@each_type
def test_numbers_that_are_none(dtype):
    inf, nan = float("inf"), float("nan")
    for vocab in (1, 5, 16, 33):
        rows = logits(8, vocab, dtype)
        for r, value in enumerate((nan, inf, -inf), 1):
            rows[r, -1] = value
        rows[4], rows[5], rows[6] = nan, -inf, inf
        pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
        base, ablated = rows, rows[pairs[:, 1]]
        expected = divergence_rows(base, ablated, pairs[:, 0], names=DIVERGENCES, backend="reference")
        got = divergence_rows(base, ablated, pairs[:, 0], names=DIVERGENCES, backend="cpp")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14, equal_nan=True)


def tree_call(case: Case, q=None, k=None, v=None):
    args, options = make_arguments(case)
    given = [own if other is None else other for own, other in zip(args[:3], (q, k, v), strict=True)]
    packed = prefix_tree.pack(make_prompts(case.tree))
    query_index = options.pop("query_index", None)
    index = None if query_index is None else query_index.numpy()
    plan = tree_attention_cpp.plan_blocks(packed, window=options.pop("window"), query_index=index)
    return tree_attention_cpp.cpp_attention(*given, *args[3:5], plan, **options)


SMALL = Case(B=2, H=3, HKV=1, D=5, tree="nested", dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_tree_attention_of_any_head_size(dtype):
    for size in (1, 2, 3, 7, 9, 17, 33, 65, 129):
        case = dataclasses.replace(SMALL, D=size, DV=size + 1, dtype=dtype)
        args, options = make_arguments(case)
        assert_close_abs(tree_call(case), oracle(*args, **options), 2e-5 if dtype == torch.float32 else 1e-12)


def test_tree_attention_of_no_rows():
    case = dataclasses.replace(SMALL, B=0)
    assert tree_call(case).shape[0] == 0


def test_tree_attention_with_rows_far_apart():
    args, _ = make_arguments(SMALL)
    expected = tree_call(SMALL)
    far = []
    for x in args[:3]:
        _, heads, tokens, size = x.shape
        room = sparse(FAR + heads * tokens * size, torch.float64).as_strided(
            x.shape, (FAR, size, heads * size, 1)
        )
        far.append(room.copy_(x))
    assert torch.equal(tree_call(SMALL, *far), expected)


def test_tree_attention_keeps_what_is_not_a_number_where_it_is():
    """A row with NaN in its keys, and one with infinity, leave the third as it is."""
    case = dataclasses.replace(SMALL, B=3, dtype=torch.float32, replace="")
    args, _ = make_arguments(case)
    expected = tree_call(case)
    k, v = args[1].clone(), args[2].clone()
    k[0, 0, 0, 0], v[1, 0, 0, 0] = float("nan"), float("inf")
    got = tree_call(case, k=k, v=v)
    off = make_arguments(case)[0][4] == 0
    assert torch.equal(got[2], expected[2])
    assert got[0][:, ~off[0]].isnan().any() and (got[0][:, off[0]] == 0).all()
    assert not torch.isfinite(got[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_decode_attention_of_any_size(dtype):
    for size in (1, 3, 8, 17, 63, 65, 129):
        case = decode_numerics.Case(D=size, DV=size + 1, C=5, dtype=dtype)
        decode_numerics.make_inputs(case).check(decode_attention.cpp_attention)
    none = decode_numerics.make_inputs(decode_numerics.Case(N=0, dtype=dtype))
    assert none.run(decode_attention.cpp_attention).shape[0] == 0


def test_decode_attention_with_slots_far_apart():
    inputs = decode_numerics.make_inputs(decode_numerics.Case(N=2, dtype=torch.float64))
    expected = inputs.run(decode_attention.cpp_attention)
    for i in (1, 2):
        x = inputs.args[i]
        slots, heads, places, size = x.shape
        room = sparse((slots - 1) * FAR + heads * places * size, torch.float64)
        inputs.args[i] = room.as_strided(x.shape, (FAR, places * size, size, 1)).copy_(x)
    assert torch.equal(inputs.run(decode_attention.cpp_attention), expected)


def test_cache_write_beyond_2_to_the_31_elements():
    places, size = 2**24 + 3, 64
    cache = sparse(3 * places * size, torch.bfloat16).view(3, 1, places, size)
    fresh = torch.arange(2 * size, dtype=torch.float32).bfloat16().view(2, 1, size)
    index = [torch.tensor(x) for x in ([1, 0], [2, 1], [places - 1, 7])]
    torch.ops.shipsfast.cache_write(fresh, *index, cache)
    assert torch.equal(cache[2, 0, places - 1], fresh[1, 0]) and torch.equal(cache[1, 0, 7], fresh[0, 0])
    torch.ops.shipsfast.cache_write(fresh, *(x[:0] for x in index), cache)
    with pytest.raises(RuntimeError, match="places of the cache"):
        torch.ops.shipsfast.cache_write(fresh, index[0], index[1], torch.tensor([places, 0]), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_element_wise_ops_of_any_size(dtype):
    exact = 1e-6 if dtype == torch.float32 else 1e-14
    for rows in (0, 1, 3):
        for size in (1, 2, 7, 16, 17, 33):
            x = logits(rows, size, dtype)
            out = torch.empty_like(x)
            weight = logits(1, size, dtype, 1)[0]
            torch.ops.shipsfast.rms_norm(x, weight, 1e-6, 0.0, out)
            wide = x.double()
            expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            assert_close_abs(out, expected, 20 * exact)
            added = x.clone()
            torch.ops.shipsfast.add_rms_norm_(added, x, weight, 1e-6, 0.0)
            assert_close_abs(added, wide + expected, 20 * exact * (1 + wide.abs()))
            both = logits(rows, 2 * size, dtype)
            torch.ops.shipsfast.silu_mul(both, out)
            gate, up = both.double().chunk(2, 1)
            assert_close_abs(out, torch.nn.functional.silu(gate) * up, 20 * exact)
            torch.ops.shipsfast.gelu_mul(both, out)
            gelu = torch.nn.functional.gelu(gate, approximate="tanh")
            assert_close_abs(out, gelu * up, 20 * exact)


def test_rotary_embedding_of_rows_far_apart():
    x = logits(6, 3 * 4, torch.float32).view(2, 3, 1, 4 * 3)[..., :4]
    cos, sin = logits(3, 4, torch.float32, 1), logits(3, 4, torch.float32, 2)
    expected, out = torch.empty(2, 3, 1, 4), torch.empty(2, 3, 1, 4)
    torch.ops.shipsfast.rope(x.contiguous(), cos, sin, x[0, 0, 0, :0], 0.0, expected)
    far = sparse(FAR + 12, torch.float32).as_strided((2, 3, 1, 4), (FAR, 4, 4, 1)).copy_(x)
    torch.ops.shipsfast.rope(far, cos, sin, x[0, 0, 0, :0], 0.0, out)
    assert torch.equal(out, expected)
    low, high = x.chunk(2, 3)
    turned = x * cos[None, :, None] + torch.cat([-high, low], 3) * sin[None, :, None]
    assert_close_abs(out, turned, 1e-5)


@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
def test_gates_that_are_no_number(op):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 200.0, -200.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    out = torch.empty(1, 5)
    getattr(torch.ops.shipsfast, op)(x, out)
    assert out[0, 0].isnan() and out[0, 1] == np.inf and out[0, 3] == 200
    assert out[0, 4].abs() < 1e-30 and (out[0, 2].isnan() or out[0, 2] <= 0)


def test_ops_refuse_addresses_that_their_type_does_not_allow():
    """Single bytes off: torch's own wrappers make a copy, the ops themselves refuse."""
    x, out = misaligned(logits(2, 8, torch.float32)), torch.empty(2, 8)
    with pytest.raises(RuntimeError, match="aligned"):
        torch.ops.shipsfast.rms_norm(x, torch.ones(8), 1e-6, 0.0, out)
    with pytest.raises(RuntimeError, match="aligned"):
        torch.ops.shipsfast.kl_rows(x, x, torch.zeros(2, dtype=torch.int64))


def test_reference_agrees_on_the_smallest_tree():
    case = dataclasses.replace(SMALL, tree="one_token", D=3)
    args, options = make_arguments(case)
    assert_close_abs(tree_call(case), reference.tree_attention(*args, **options), 1e-13)
