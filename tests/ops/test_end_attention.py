"""Attention of single tokens at the ends of a prefix tree, in torch and in C++, against the definition in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shipsfast import InputError
from shipsfast.ops import end_attention, end_attention_cpp, tree_attention
from shipsfast.ops.extension import extension_status
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.prefix_tree import pack
from shipsfast.ops.tree_attention import TreeContext, resolve_backend
from shipsfast.replacements import REPLACE_K, REPLACE_OUT, REPLACE_Q
from tests.support.attention_numerics import DTYPE_NAMES, FACTOR, make_prompts
from tests.support.numerics import assert_close_abs
from tests.support.rounding import sum_eps

BUILT, WHY = extension_status()
needs_extension = pytest.mark.skipif(not BUILT, reason=f"needs the extension: {WHY}")
each_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_extension)])


@dataclass(frozen=True)
class Case:
    """reads: last, of each prompt; all, every token, the first of which has nothing above it."""

    B: int = 5
    H: int = 4
    HKV: int = 2
    D: int = 16
    DV: int | None = None
    dtype: torch.dtype = torch.float64
    tree: str = "nested"
    reads: str = "last"
    window: int | None = None
    softcap: float | None = None
    sink: bool = False
    flags: int = 0  # what some heads have replaced
    fixed: str = "ends"  # vectors in place of outputs: one for each of the ends, or one for all
    mean_out: bool = False

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default and f.name != "dtype"
        ]  # fmt: skip
        return "-".join([DTYPE_NAMES[self.dtype], *changed])


@dataclass
class Inputs:
    packed: object
    ends: np.ndarray
    base: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v
    mask: LayerMask
    how: dict

    def run(self, backend: str, mask: LayerMask | None = None, rows=slice(None)) -> torch.Tensor:
        tree = TreeContext(self.packed, backend, torch.device("cpu"), self.ends)
        own = [x[rows] for x in self.own]
        return end_attention.end_attention(tree, self.base, *own, mask or self.mask, **self.how)


def make_inputs(case: Case) -> Inputs:
    """Rows of larger tensors, laid out as projections lay them out: [B, U, heads, D] seen as [B, heads, U, D]."""
    prompts = make_prompts(case.tree)
    packed = pack(prompts, [range(len(ids)) for ids in prompts] if case.reads == "all" else None)
    ends = np.unique(packed.read_index)
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)
    heads = lambda rows, tokens, count, size: random(rows, tokens, count, size + 3)[..., :size].transpose(
        1, 2
    )
    out_size = case.DV or case.D
    q, *own = (
        heads(case.B, len(ends), *x) for x in ((case.H, case.D), (case.HKV, case.D), (case.HKV, out_size))
    )
    base = tuple(heads(1, packed.num_tokens, case.HKV, size) for size in (case.D, out_size))
    of = torch.arange(case.B * case.H).reshape(case.B, case.H)
    logit_scale = torch.tensor([1.0, 1e-5, 0.0, 1.0, -1.0, 2.0, 1.0])[of % 7].double()
    output_scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1e-5, -0.5, 1.0, 1.0])[of % 9].double()
    mask = LayerMask(logit_scale, output_scale)
    if case.flags:
        chosen = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int8)[of % 8] & case.flags
        value = random(case.H, len(ends) if case.fixed == "ends" else 1, out_size)
        mask = replace(
            mask, replace=chosen, bits=case.flags, value=value if case.flags & REPLACE_OUT else None
        )
    if case.mean_out:
        mask = replace(mask, mean_out=of % 5 == 1)
    how = {"scaling": case.D**-0.5, "softcap": case.softcap, "window": case.window}
    how["sink"] = random(case.H) if case.sink else None
    return Inputs(packed, ends, base, (q, *own), mask, how)


def definition(inputs: Inputs) -> torch.Tensor:
    """Row by row, head by head and end by end, from the visible keys alone, in float64: [B, U, H, D of v]."""
    packed, mask, how = inputs.packed, inputs.mask, inputs.how
    q, k, v, base_k, base_v = (x.double().numpy() for x in (*inputs.own, *inputs.base))
    out = np.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    plain = out.copy()
    seen = []
    for end in inputs.ends:
        above = np.flatnonzero(packed.subtree_end[:end] > end)
        near = packed.position[end] - packed.position[above] < (how["window"] or np.inf)
        seen.append(above[near])
    for b, u, h in np.ndindex(out.shape[:3]):
        above, of = seen[u], h * k.shape[1] // q.shape[1]
        flags = 0 if mask.replace is None else int(mask.replace[b, h])
        keys = np.stack([*base_k[0, of, above], k[b, of, u]])
        if flags & REPLACE_K:
            keys = np.stack([*base_k[0][:, above].mean(0), k[b, :, u].mean(0)])
        query = q[b, :, u].mean(0) if flags & REPLACE_Q else q[b, h, u]
        logits = keys @ query * how["scaling"] * float(mask.logit_scale[b, h])
        if how["softcap"]:
            logits = how["softcap"] * np.tanh(logits / how["softcap"])
        if how["sink"] is not None:
            logits = np.append(logits, float(how["sink"][h]))
        weights = np.exp(logits - logits.max())
        weights = (weights / weights.sum())[: len(keys)]
        out[b, u, h] = plain[b, u, h] = weights @ np.stack([*base_v[0, of, above], v[b, of, u]])
        if flags & REPLACE_OUT:
            out[b, u, h] = mask.value[h, u % mask.value.shape[1]].double()
        out[b, u, h] *= float(mask.output_scale[b, h])
    if mask.mean_out is not None:
        out = np.where(mask.mean_out[:, None, :, None], plain.mean(2, keepdims=True), out)
    return torch.from_numpy(out)


EVERY = REPLACE_Q | REPLACE_K | REPLACE_OUT
CASES = [
    Case(),
    Case(B=1),
    Case(B=1, H=1, HKV=1, D=1, tree="single"),
    Case(B=67, tree="forest"),  # more than a task's rows
    Case(reads="all"),
    Case(reads="all", tree="single", B=3),  # all on one path, the first with nothing above it
    Case(reads="all", tree="duplicates", window=1, B=3),
    Case(tree="one_token"),
    Case(tree="one_token", sink=True, softcap=0.5, flags=EVERY),
    Case(tree="duplicates", reads="all", window=7, softcap=5.0),
    Case(tree="single", window=1000),
    Case(H=6, HKV=6, D=33, DV=17, tree="shared"),
    Case(H=5, HKV=1, D=80, DV=65, reads="all"),  # multi-query
    Case(H=9, HKV=3, D=64, B=7, tree="shared", sink=True),
    Case(H=2, HKV=2, D=7, B=2, reads="all", sink=True, window=3),
    *(Case(flags=flags, reads="all") for flags in (REPLACE_Q, REPLACE_K, REPLACE_OUT, EVERY)),
    Case(flags=EVERY, H=5, HKV=1, D=9, DV=10, window=6, sink=True, softcap=2.0),
    Case(flags=EVERY, B=31, H=6, HKV=2, reads="all", tree="forest"),
    Case(flags=REPLACE_OUT, fixed="all", tree="shared"),
    Case(mean_out=True),
    Case(mean_out=True, flags=EVERY, sink=True, reads="all"),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, backend):
    inputs = make_inputs(case)
    expected, got = definition(inputs), inputs.run(backend)
    assert got.is_contiguous()
    assert_close_abs(got, expected, 1e-13)
    off = inputs.mask.output_scale == 0
    if inputs.mask.mean_out is not None:
        off &= ~inputs.mask.mean_out
    zeroed = got.transpose(1, 2)[off]
    assert torch.equal(zeroed, torch.zeros_like(zeroed))


SHORT = (torch.float32, torch.bfloat16, torch.float16)


@each_backend
@pytest.mark.parametrize("case", [replace(case, dtype=dtype) for dtype in SHORT for case in CASES], ids=str)
def test_is_as_near_as_torch(case, backend):
    """And what sums of so many terms are off by, of each head's largest output."""
    inputs = make_inputs(case)
    expected, got = definition(inputs), inputs.run(backend)
    assert got.dtype == case.dtype
    largest = lambda x: x.abs().amax((1, 3), keepdim=True)
    error = largest(inputs.run("torch") - expected)
    terms = case.D + len(inputs.ends) + int(inputs.packed.position.max())
    floor = (torch.finfo(case.dtype).eps + sum_eps(case.dtype) * terms**0.5) * expected.abs().max().clamp(
        min=1
    )
    assert_close_abs(got, expected, FACTOR * error + floor)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "f32", "f64"])
@pytest.mark.parametrize("flags", [0, EVERY])
def test_rows_are_the_same_bits_in_any_company(dtype, flags):
    """A row alone, or among others, whose heads are off or not; so a scan goes on with the same bits in other chunks."""
    inputs = make_inputs(
        Case(B=41, H=6, HKV=2, D=17, DV=9, flags=flags, dtype=dtype, tree="shared", reads="all")
    )
    whole = inputs.run("cpp")
    for rows in (slice(0, 1), slice(3, 20), slice(40, 41)):
        mask = replace(
            inputs.mask, logit_scale=inputs.mask.logit_scale[rows], output_scale=inputs.mask.output_scale[rows],
            replace=None if inputs.mask.replace is None else inputs.mask.replace[rows],
        )  # fmt: skip
        assert torch.equal(inputs.run("cpp", mask, rows), whole[rows])
    shown = inputs.mask.output_scale != 0
    mask = replace(inputs.mask, output_scale=inputs.mask.output_scale * (torch.arange(41)[:, None] % 2))
    kept = inputs.run("cpp", mask).transpose(1, 2)
    assert torch.equal(kept[1::2][shown[1::2]], whole.transpose(1, 2)[1::2][shown[1::2]])
    assert (kept[::2] == 0).all()


@needs_extension
@pytest.mark.parametrize("window", [None, 1, 4])
def test_ends_of_a_path_cut_into_blocks(window, monkeypatch):
    for block in (1, 4, 64):
        monkeypatch.setattr(end_attention_cpp, "BLOCK", block)
        inputs = make_inputs(Case(B=2, flags=EVERY, reads="all", tree="duplicates", window=window))
        assert_close_abs(inputs.run("cpp"), definition(inputs), 1e-13, str(block))


@needs_extension
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("SHIPSFAST_CPU_ISA", isa)
    try:
        for case in (
            Case(flags=EVERY, H=5, HKV=1, D=33, DV=17, reads="all", sink=True),
            Case(D=64, window=7),
        ):
            test_is_the_definition(case, "cpp")
            for dtype in SHORT:
                test_is_as_near_as_torch(replace(case, dtype=dtype), "cpp")
    except RuntimeError as error:
        if isa != "default" and "or this machine or build lacks it" in str(error):
            pytest.skip(f"this CPU has no {isa}")
        raise


@needs_extension
def test_numbers_of_threads_change_nothing():
    inputs, before = make_inputs(Case(B=41, H=6, HKV=2, flags=EVERY, reads="all")), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(inputs.run("cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@each_backend
@pytest.mark.parametrize("flags", [0, EVERY])
def test_all_heads_off(flags, backend):
    """Whatever they had: zero times infinity too."""
    inputs = make_inputs(Case(flags=flags))
    inputs.own[2][...] = float("inf")
    mask = replace(inputs.mask, output_scale=torch.zeros_like(inputs.mask.output_scale))
    out = inputs.run(backend, mask)
    assert torch.equal(out, torch.zeros_like(out))


@each_backend
def test_what_is_not_a_number_stays_in_its_row(backend):
    inputs = make_inputs(Case(B=4, sink=True))
    expected = inputs.run(backend)
    inputs.own[0][0, 0, 0], inputs.own[1][1, 0, 0], inputs.own[2][2, 0, 0] = (
        float(x) for x in ("nan", "inf", "-inf")
    )
    got = inputs.run(backend)
    assert (
        got[0, 0, 0].isnan().all() and not torch.isfinite(got[1]).all() and not torch.isfinite(got[2]).all()
    )
    assert torch.equal(got[3], expected[3]) and torch.equal(got[:3, 1:], expected[:3, 1:])


@each_backend
@pytest.mark.parametrize("flags", [0, EVERY])
def test_one_token_for_all_rows(flags, backend):
    """As in the first layer, where rows differ by what is off in them alone."""
    inputs = make_inputs(Case(flags=flags, reads="all"))
    inputs.own = tuple(x[:1].expand(5, -1, -1, -1) for x in inputs.own)
    assert torch.equal(inputs.run(backend, rows=slice(0, 1)), inputs.run(backend))
    assert_close_abs(inputs.run(backend, rows=slice(0, 1)), definition(inputs), 1e-13)


@needs_extension
def test_dimensions_that_are_apart():
    """Heads whose numbers are no neighbours are copied, and no rows are no work."""
    inputs = make_inputs(Case(flags=EVERY))
    expected = inputs.run("cpp")
    empty = LayerMask(*(x[:0] for x in (inputs.mask.logit_scale, inputs.mask.output_scale)))
    assert inputs.run("cpp", empty, slice(0)).shape == (0, *expected.shape[1:])
    apart = lambda x: x.repeat_interleave(2, -1)[..., ::2]
    inputs.own, inputs.base = tuple(map(apart, inputs.own)), tuple(map(apart, inputs.base))
    assert torch.equal(inputs.run("cpp"), expected)


def op_arguments(case: Case) -> list:
    """What `cpp_ends` gives to the operation."""
    inputs, seen = make_inputs(case), []
    tree = TreeContext(inputs.packed, "cpp", torch.device("cpu"), inputs.ends)
    fake = SimpleNamespace(shipsfast=SimpleNamespace(end_attention=lambda *args: seen.extend(args)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "ops", fake)
        how = {name: inputs.how[name] for name in ("scaling", "softcap", "sink")}
        end_attention_cpp.cpp_ends(tree.end_plan(case.window), inputs.base, *inputs.own, inputs.mask, **how)
    return seen


@needs_extension
@pytest.mark.parametrize(
    "case", [Case(dtype=torch.float32), Case(flags=EVERY, window=7, sink=True, softcap=3.0)], ids=str
)
def test_opcheck(case):
    torch.library.opcheck(torch.ops.shipsfast.end_attention.default, op_arguments(case))


@needs_extension
def test_the_operation_refuses_what_does_not_fit():
    op, args = torch.ops.shipsfast.end_attention, op_arguments(Case(flags=EVERY))
    q, k, v, base_k, base_v, *_ = args
    blocks, ends, keys = args[12:15]

    def changed(table, at, value):
        table = table.clone()
        table[at] = value
        return table

    wrong = [
        (0, q.float(), "one dtype"), (0, q.to(torch.int32), "float64, float32, bfloat16 or float16"), (0, q.bfloat16(), "one dtype"), (0, q[0], "q, k and v"),
        (1, k[:1], "fit together"), (2, v[..., 1:], "fit together"), (3, base_k[:, :, 1:], "fit together"),
        (4, torch.cat([base_v, base_v]), "fit together"), (5, args[5].float(), "float64 scales"),
        (7, args[7][:1], "int8 flags"), (8, args[8][:1], "q_alt"), (9, args[9].float(), "replacement vectors"),
        (10, args[10][1:], "base_k_alt"), (10, args[10].float(), "replacement vectors"), (11, args[11][:2], "out_alt"),
        (12, changed(blocks, (0, 1), len(ends) + 1), "tables"), (12, changed(blocks, (0, 3), len(keys) + 1), "tables"),
        (12, blocks[1:], "tables"), (13, changed(ends, (0, 0), -1), "tables"), (13, changed(ends, (1, 0), ends[0, 0]), "tables"),
        (13, changed(ends, (0, 2), len(keys) + 1), "tables"), (14, changed(keys, 0, base_k.shape[2]), "tables"),
        (14, keys.long(), "tables"), (15, torch.zeros(3, dtype=torch.float64), "sinks"),
        (18, args[18].transpose(1, 2), "out"),
    ]  # fmt: skip
    for place, other, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*args[:place], other, *args[place + 1 :])
    op(*args)


@needs_extension
def test_flags_without_their_vectors_are_refused():
    inputs = make_inputs(Case(flags=REPLACE_OUT))
    with pytest.raises(ValueError, match="out_alt is None"):
        inputs.run("cpp", replace(inputs.mask, value=None))


def test_an_extension_of_an_older_version_is_told(monkeypatch):
    older = SimpleNamespace(shipsfast=SimpleNamespace(decode_attention=None, tree_attention=None))
    monkeypatch.setattr(tree_attention, "extension_status", lambda: (True, "a file"))
    monkeypatch.setattr(
        tree_attention,
        "torch",
        SimpleNamespace(
            ops=older, **{x: getattr(torch, x) for x in ("bfloat16", "float16", "float32", "float64")}
        ),
    )
    with pytest.raises(InputError, match="older version: build it again"):
        resolve_backend("cpp", torch.device("cpu"), torch.float32)
