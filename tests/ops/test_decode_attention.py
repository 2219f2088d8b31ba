"""Decode attention: the oracle against the definition, every backend against the oracle, and their exact promises.

Without a GPU the Triton kernel runs in Triton's interpreter (tests/conftest.py asks for it before triton is
imported). With SHIPSFAST_TEST_GPU=1 and a GPU the same tests run compiled, with the committed launch
parameters of that device. What is Triton's own is in test_decode_kernel.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shipsfast.ops import reference
from shipsfast.ops.decode_attention import cpp_attention, torch_attention
from shipsfast.ops.extension import extension_status
from shipsfast.replacements import REPLACE_OUT
from tests.conftest import TEST_GPU
from tests.support.attention_numerics import ALTERNATIVES
from tests.support.decode_numerics import (
    DEVICE,
    Case,
    Inputs,
    formula,
    make_inputs,
    make_replacements,
    triton_attention,
    why_no_triton,
)
from tests.support.numerics import assert_close_abs

if TEST_GPU:
    pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Backend:
    """function: as reference.decode_attention; values_of_other_size: v's head size need not be q's;
    unavailable: why it cannot run here."""

    name: str
    function: Callable[..., torch.Tensor]
    dtypes: tuple[torch.dtype, ...]
    values_of_other_size: bool = True
    unavailable: str | None = None


def why_no_cpp() -> str | None:
    if DEVICE != "cpu":
        return "the C++ attention runs on a CPU"
    built, reason = extension_status()
    return None if built else reason


HALVES = (torch.bfloat16, torch.float16)
BACKENDS = [
    Backend("reference", reference.decode_attention, (torch.float64, torch.float32, *HALVES)),
    Backend("torch", torch_attention, (torch.float64, torch.float32, *HALVES)),
    Backend("cpp", cpp_attention, (torch.float64, torch.float32, *HALVES), unavailable=why_no_cpp()),
    Backend("triton", triton_attention, (torch.float32, *HALVES), False, why_no_triton()),
]


def backend_params(backends: list[Backend], cases: list[Case] | None = None) -> list:
    """(backend) or, with cases, (backend, case) for what the backend takes."""
    rows = []
    for backend in backends:
        marks = pytest.mark.skipif(backend.unavailable is not None, reason=str(backend.unavailable))
        if cases is None:
            rows.append(pytest.param(backend, id=backend.name, marks=marks))
            continue
        rows += [
            pytest.param(backend, case, id=f"{backend.name}-{case}", marks=marks)
            for case in cases
            if case.dtype in backend.dtypes and (backend.values_of_other_size or case.DV is None)
        ]
    return rows


every_backend = pytest.mark.parametrize("backend", backend_params(BACKENDS))
which_heads = pytest.mark.parametrize("which", ["none", "one", "all"])


def every_backend_and(*cases: Case):
    return pytest.mark.parametrize("backend, case", backend_params(BACKENDS, cases))


REPLACED = Case(N=7, H=6, HKV=3, replace="full")
SHAPES = [
    Case(H=8, HKV=2, D=64),
    Case(N=7, H=5, HKV=1, D=80),  # multi-query, D not a power of two
    Case(H=3, HKV=3, D=128),
    Case(N=7, H=2, HKV=1, D=256),
    Case(N=7, H=4, HKV=1, C=21, D=256),
    Case(N=7, H=8, HKV=1, C=19, D=96),
    Case(N=1, H=1, HKV=1, C=1),
    Case(N=8, H=18, HKV=1, D=24),  # more heads than a tile
    Case(N=9, H=14, HKV=2, C=64),
]
FEATURES = [
    Case(softcap=5.0),
    Case(softcap=0.5, D=24, H=3, HKV=3),
    Case(window=1),
    Case(window=7, H=6),
    Case(window=16, HKV=4),
    Case(window=36),
    Case(window=1000),
    Case(window=20, softcap=10.0, H=8, D=80),
    REPLACED,
    dataclasses.replace(REPLACED, N=9, HKV=1),
    dataclasses.replace(REPLACED, HKV=6, replace="one", softcap=0.5, D=24),
    dataclasses.replace(REPLACED, H=18, HKV=1, N=9, window=9),
    dataclasses.replace(REPLACED, N=1, HKV=2, replace="one"),
    Case(DV=24),
    Case(DV=5, D=7, H=6, HKV=3, replace="full", softcap=2.0, window=9),
]
CASES = [
    dataclasses.replace(case, dtype=dtype)
    for cases, dtypes in (
        (SHAPES, (torch.float64, torch.float32, *HALVES)),
        (FEATURES, (torch.float64, torch.float32, torch.bfloat16)),
    )
    for case in cases
    for dtype in dtypes
]
SMALL = Case(N=4, H=6, HKV=2, C=21)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float64], ids=str)
def test_the_oracle_is_the_formula(case):
    inputs = make_inputs(case)
    assert_close_abs(inputs.run(reference.decode_attention), formula(inputs), 1e-13)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float64], ids=str)
def test_the_oracle_is_tree_attention_of_a_chains_last_token(case):
    inputs = make_inputs(case)
    q, k, v, slots, lengths, *scales = inputs.args
    out = inputs.run(reference.decode_attention)
    for n, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        seen = slice(max(0, length - case.window) if case.window else 0, length)
        position = torch.arange(seen.stop - seen.start)
        options = dict(inputs.options, query_index=position[-1:])
        if case.replace:
            one = lambda x, n=n: x[n % len(x)]
            options["replace"] = options["replace"][n][None]
            options["q_alt"] = one(options["q_alt"])[None, None]
            options["k_alt"] = options["k_alt"][slot, None, seen]
            options["out_alt"] = options["out_alt"][:, None]
        chain = reference.tree_attention(
            q[n][None, :, None], k[slot, None, :, seen], v[slot, None, :, seen],
            *(x[n][None] for x in scales), position, torch.full_like(position, len(position)), **options,
        )  # fmt: skip
        assert_close_abs(out[n], chain[0, 0], 1e-13)


@pytest.mark.parametrize("backend, case", backend_params(BACKENDS[1:], CASES))
def test_matches_the_oracle(backend, case):
    make_inputs(case, device=DEVICE).check(backend.function)


@pytest.mark.parametrize("backend", backend_params(BACKENDS[1:]))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_matches_the_oracle(backend, data):
    kv_heads, C = data.draw(st.integers(1, 2), "HKV"), data.draw(st.integers(1, 40), "C")
    case = Case(
        N=data.draw(st.integers(1, 4), "N"),
        H=kv_heads * data.draw(st.integers(1, 6), "groups"),
        HKV=kv_heads,
        C=C,
        D=data.draw(st.integers(1, 40), "D"),
        window=data.draw(st.none() | st.integers(1, C + 1), "window"),
        softcap=data.draw(st.none() | st.just(2.0), "softcap"),
        replace=data.draw(st.sampled_from(["", "full", "one"]), "replace"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    make_inputs(case, device=DEVICE).check(backend.function)


def chosen_heads(which: str, case: Case = SMALL) -> torch.Tensor:
    chosen = torch.zeros(case.N, case.H, dtype=torch.bool)
    if which == "one":
        chosen[1, 2] = True
    elif which == "all":
        chosen[:] = True
    return chosen


def unmasked_inputs(case: Case = SMALL) -> Inputs:
    return make_inputs(case, *torch.ones(2, case.N, case.H), DEVICE)


@every_backend
@which_heads
@pytest.mark.parametrize("logit_factor, output_factor", [(1e-5, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-5)])
def test_ablated_heads(backend, which, logit_factor, output_factor):
    chosen = chosen_heads(which).to(DEVICE)
    inputs = unmasked_inputs()
    unmasked = inputs.run(backend.function)
    inputs.args[5:] = torch.where(chosen, logit_factor, 1.0), torch.where(chosen, output_factor, 1.0)
    out = inputs.check(backend.function)
    assert torch.equal(out[~chosen], unmasked[~chosen])
    if output_factor == 0:
        assert (out[chosen] == 0).all()
    elif which != "none":
        attends = inputs.args[4] > 1  # an entry of one key gives its value, whatever the logits are
        changed = (out != unmasked).any(-1)
        assert torch.equal(changed, chosen & (attends[:, None] | (output_factor != 1)))


@every_backend
@which_heads
@pytest.mark.parametrize("flag", [1, 2, 3, 4], ids=["q", "k", "q-and-k", "out"])
@pytest.mark.parametrize("groups", [1, 3], ids=lambda groups: f"G{groups}")
@pytest.mark.parametrize("full", [True, False], ids=["", "broadcast"])
def test_replaced_heads(backend, which, flag, groups, full):
    case = dataclasses.replace(SMALL, HKV=SMALL.H // groups)
    chosen = chosen_heads(which)
    inputs = unmasked_inputs(case)
    without = inputs.run(backend.function)
    inputs.options |= make_replacements(inputs, chosen.to(torch.int8) * flag, full)
    out = inputs.check(backend.function)
    chosen = chosen.to(DEVICE)
    assert torch.equal(out[~chosen], without[~chosen])
    attends = inputs.args[4] > 1
    changed = (out != without).any(-1)
    assert torch.equal(changed, chosen & (attends[:, None] | (flag == REPLACE_OUT)))
    if flag == REPLACE_OUT:
        assert torch.equal(out[chosen], inputs.options["out_alt"].expand(out.shape)[chosen])


@every_backend
@pytest.mark.parametrize("HKV", [1, 3, 6])
def test_untouched_heads_keep_their_bits_beside_ablated_and_replaced_ones(backend, HKV):
    case = dataclasses.replace(REPLACED, HKV=HKV, softcap=4.0)
    inputs = unmasked_inputs(case)
    without = inputs.run(backend.function)
    touched = make_inputs(case, device=DEVICE)
    untouched = (touched.options["replace"] == 0) & (touched.args[5] == 1) & (touched.args[6] == 1)
    assert untouched.any()
    assert torch.equal(touched.run(backend.function)[untouched], without[untouched])


@every_backend
def test_what_is_not_seen_changes_nothing(backend):
    case = dataclasses.replace(REPLACED, window=9)
    inputs = make_inputs(case, device=DEVICE)
    with_nan = inputs.run(backend.function)
    for x in (*inputs.args[1:3], inputs.options["k_alt"]):
        assert torch.isnan(x).any()
        x.nan_to_num_(3e4)
    assert torch.equal(with_nan, inputs.run(backend.function))


@every_backend
@pytest.mark.parametrize("HKV", [1, 3, 6])
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_heads_that_are_off_or_replaced_do_not_depend_on_what_they_do_not_use(backend, HKV):
    """NaN in their own queries, keys and values, beside heads of their group that go on."""
    flags = torch.tensor([[0, 4, 7, 3, 0, 1]], dtype=torch.int8)
    output_scale = torch.tensor([[0.0, 1.0, -2.0, 1.0, 1.0, 0.0]])
    inputs = make_inputs(Case(N=1, H=6, HKV=HKV), torch.ones(1, 6), output_scale, DEVICE)
    inputs.options |= make_replacements(inputs, flags)
    clean = inputs.run(backend.function)
    q, k, v = inputs.args[:3]
    q[:, [0, 1, 2, 3, 5]] = float("nan")
    if HKV == 6:  # every head's own
        k[:, [0, 1, 2, 3, 5]] = float("nan")
        v[:, [0, 1, 2, 5]] = float("nan")
    out = inputs.run(backend.function)
    assert torch.isfinite(out).all() and (out[output_scale == 0] == 0).all()
    assert torch.equal(out, clean)


@every_backend
def test_a_zeroed_head_is_zero_whatever_replaces_it(backend):
    inputs = make_inputs(Case(N=1, H=8, HKV=2), torch.ones(1, 8), torch.zeros(1, 8), DEVICE)
    inputs.options |= make_replacements(inputs, torch.arange(8, dtype=torch.int8)[None])
    for name in ALTERNATIVES:
        inputs.options[name][:] = float("nan")
    assert (inputs.run(backend.function) == 0).all()


@every_backend
@pytest.mark.parametrize("case", [Case(window=9, softcap=3.0), Case(H=3, HKV=1), Case(H=2)], ids=str)
def test_uniform_attention_is_the_mean_of_the_visible_values(backend, case):
    inputs = make_inputs(case, torch.zeros(case.N, case.H), torch.ones(case.N, case.H), DEVICE)
    out = inputs.run(backend.function)
    v, slots, lengths = inputs.args[2:5]
    for n, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        seen = v[slot, :, max(0, length - case.window) if case.window else 0 : length].double()
        mean = seen.mean(1).repeat_interleave(case.H // case.HKV, 0)
        assert_close_abs(out[n], mean, 1e-6)


@every_backend_and(*(dataclasses.replace(SMALL, window=1, dtype=dtype) for dtype in (torch.float32, *HALVES)))
def test_one_key_gives_its_value(backend, case):
    """A window of 1, and a length of 1."""
    inputs = unmasked_inputs(case)
    v, slot, length = inputs.args[2:5]
    value = v[slot.long(), :, length.long() - 1].repeat_interleave(3, 1)
    assert torch.equal(inputs.run(backend.function), value)
    inputs.options["window"] = None
    assert torch.equal(inputs.run(backend.function)[-1], value[-1])


@every_backend
def test_a_window_that_holds_everything_is_none(backend):
    inputs = make_inputs(SMALL, device=DEVICE)
    for window in (SMALL.C, 10 * SMALL.C):
        assert torch.equal(inputs.run(backend.function, window=window), inputs.run(backend.function))


@every_backend_and(
    *(Case(N=3, H=9, HKV=3, D=24, dtype=dtype, replace="full") for dtype in (torch.float32, *HALVES))
)
def test_every_element_is_written(backend, case, monkeypatch):
    inputs = make_inputs(case, device=DEVICE)
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    poisoned = lambda x: x.fill_(float("nan")) if x.is_floating_point() else x
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    assert torch.isnan(torch.empty(3)).all() and torch.isnan(torch.ones(1).new_empty(3)).all()
    assert torch.isfinite(inputs.run(backend.function)).all()


@every_backend
def test_large_logits_stay_finite(backend):
    inputs = make_inputs(Case(N=1, H=2, HKV=2), torch.tensor([[300.0, -300.0]]), device=DEVICE)
    inputs.check(backend.function)


@every_backend
def test_copies_give_the_bits_of_views(backend):
    inputs = make_inputs(REPLACED, device=DEVICE)
    assert not any(x.is_contiguous() for x in inputs.args[:3])
    copied = Inputs(
        [x.contiguous() for x in inputs.args],
        {name: x.contiguous() if torch.is_tensor(x) else x for name, x in inputs.options.items()},
    )
    found, expected = copied.run(backend.function), inputs.run(backend.function)
    if backend.name == "torch":  # MKL rounds some products otherwise at other strides, on some processors
        assert_close_abs(found, expected, 1e-6)
    else:
        assert torch.equal(found, expected)


@every_backend
def test_entries_of_one_slot_agree_and_do_not_see_each_other(backend):
    inputs = unmasked_inputs()
    out = inputs.run(backend.function)
    pick = torch.tensor([2, 0, 2, 1, 0, 0, 3], device=DEVICE)
    q, k, v, *rest = inputs.args
    again = Inputs([q[pick], k, v, *(x[pick] for x in rest)], inputs.options)
    assert torch.equal(again.run(backend.function), out[pick])


@every_backend
def test_a_shorter_length_does_not_see_the_newer_keys_of_its_slot(backend):
    """Entries of one slot at every length, each against a cache that ends there."""
    inputs = unmasked_inputs(Case(N=1, H=3, HKV=1))
    q, k, v, slot, _, *_ = inputs.args
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 36):
        inputs.args[4] = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        out = inputs.run(backend.function)
        ended = [x[slot.long(), :, :length] for x in (k, v)]
        alone = Inputs([q, *ended, torch.zeros_like(slot), *inputs.args[4:]], inputs.options)
        assert_close_abs(out, alone.exact(), 2e-6)


@every_backend
def test_no_entries(backend):
    inputs = make_inputs(SMALL, device=DEVICE)
    q, k, v, *rest = inputs.args
    none = Inputs([q[:0], k, v, *(x[:0] for x in rest)], inputs.options)
    assert none.run(backend.function).shape == (0, SMALL.H, SMALL.D)


@every_backend
@pytest.mark.parametrize("name", ALTERNATIVES)
@pytest.mark.skipif(TEST_GPU, reason="the flags are not looked at on a GPU")
def test_a_flag_without_its_vectors_is_refused(backend, name):
    inputs = make_inputs(REPLACED, device=DEVICE)
    with pytest.raises(ValueError, match=f"{name} is None"):
        inputs.run(backend.function, **{name: None})
