"""The Triton tree attention against the float64 oracle, and its exact promises.

Without a GPU the kernel runs in Triton's interpreter (tests/conftest.py asks for it before triton is
imported). With SHIPSFAST_TEST_GPU=1 and a GPU the same tests run compiled, with the committed launch
parameters of that device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from shipsfast.kernels.attention_blocks import INTERPRETED
from shipsfast.kernels.block_table import block_table
from shipsfast.kernels.launch_config import LaunchConfig, launch_config, load_configs
from shipsfast.kernels.tree_kind import KINDS, kind_of_tree

from shipsfast.kernels import tree_attention as module
from shipsfast.ops import prefix_tree, reference
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.tree_attention import TreeContext, tree_attention
from shipsfast.replacements import REPLACE_OUT
from tests.conftest import TEST_GPU
from tests.support.attention_numerics import (
    ALTERNATIVES,
    DTYPE_NAMES,
    Case,
    assert_close_per_head,
    make_arguments,
    make_replacements,
)

if TEST_GPU:
    pytestmark = pytest.mark.gpu
    DEVICE, CONFIG = "cuda", None
else:
    # Small tiles, so that small packs have fully visible, partly visible and skipped blocks.
    DEVICE, CONFIG = "cpu", LaunchConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    assert INTERPRETED, "TRITON_INTERPRET=1 must be set before triton is imported: see tests/conftest.py"
    old_triton = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old_triton and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        reason = "the interpreter of triton 3.6 cannot loop with numpy 2.4: install numpy<2.4"
        pytest.skip(reason, allow_module_level=True)


@dataclass
class Inputs:
    """Arguments of tree_attention, positional and by keyword."""

    args: list[torch.Tensor]  # q, k, v, logit_scale, output_scale, position, subtree_end
    options: dict

    def run(self, logit_scale=None, output_scale=None, **changes) -> torch.Tensor:
        q, k, v, ls, os, *tree = self.args
        ls, os = (own if given is None else given for own, given in ((ls, logit_scale), (os, output_scale)))
        options = {"config": CONFIG, **self.options, **changes}
        return module.tree_attention(q, k, v, ls, os, *tree, **options)

    def check(self, **changes) -> torch.Tensor:
        """Runs the kernel and holds it to the tolerance rule."""
        actual = self.run(**changes)
        assert actual.is_contiguous()
        assert_close_per_head(actual, self.args, self.options)
        return actual


def make_inputs(case: Case, logit_scale=None, output_scale=None) -> Inputs:
    return Inputs(*make_arguments(case, logit_scale, output_scale, DEVICE))


SHAPES = [
    Case(B=1, H=4, HKV=2, D=64),
    Case(B=1, H=5, HKV=1, D=80),  # multi-query, D not a power of two
    Case(B=3, H=2, HKV=2, D=16),
    Case(B=1, H=3, HKV=3, D=128),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REPLACED = Case(B=3, replace="full", tree="nested")
CASES = (
    [dataclasses.replace(s, dtype=dtype) for s in SHAPES for dtype in DTYPES]
    + [Case(tree=tree) for tree in ("nested", "forest", "single", "one_token", "duplicates")]
    + [Case(dtype=dtype, softcap=5.0) for dtype in DTYPES]
    + [Case(dtype=dtype, window=7, tree="nested") for dtype in DTYPES]
    + [
        Case(softcap=0.5, D=24),
        Case(window=1, tree="forest"),
        Case(window=40, tree="single"),
        Case(window=1000),
        Case(B=1, H=16, HKV=2, D=8, tree="forest"),
        Case(queries="last"),
        Case(queries="last", dtype=torch.bfloat16, tree="nested"),
        Case(queries="last", window=20, softcap=10.0, tree="single"),
        Case(batch="one", B=3),
        Case(batch="one", B=3, dtype=torch.bfloat16, softcap=5.0, window=20, D=80),
    ]
    + [dataclasses.replace(REPLACED, dtype=dtype) for dtype in DTYPES]
    + [
        dataclasses.replace(REPLACED, replace="one", softcap=0.5, D=24),
        dataclasses.replace(REPLACED, replace="one", batch="one", H=5, HKV=1, D=80),
        dataclasses.replace(REPLACED, batch="one", window=7, HKV=4, tree="shared"),
        dataclasses.replace(REPLACED, queries="last", dtype=torch.bfloat16),
        dataclasses.replace(REPLACED, replace="one", queries="last", window=20, softcap=10.0, tree="single"),
    ]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case):
    make_inputs(case).check()


SMALL = Case(B=2, H=4, HKV=2, tree="nested")


@pytest.mark.parametrize("which", ["none", "one", "all"])
@pytest.mark.parametrize("logit_factor, output_factor", [(1e-5, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1e-5)])
def test_ablated_heads(which, logit_factor, output_factor):
    chosen = torch.zeros(SMALL.B, SMALL.H, dtype=torch.bool)
    if which == "one":
        chosen[1, 2] = True
    elif which == "all":
        chosen[:] = True
    logit_scale = torch.where(chosen, logit_factor, 1.0)
    output_scale = torch.where(chosen, output_factor, 1.0)
    inputs = make_inputs(SMALL, logit_scale, output_scale)
    out = inputs.check()
    ones = torch.ones(SMALL.B, SMALL.H, device=DEVICE)
    unmasked = inputs.run(ones, ones)
    chosen = chosen.to(DEVICE)
    assert torch.equal(out.transpose(1, 2)[~chosen], unmasked.transpose(1, 2)[~chosen])
    if output_factor == 0:
        assert (out.transpose(1, 2)[chosen] == 0).all()
    elif which != "none":
        assert not torch.equal(out.transpose(1, 2)[chosen], unmasked.transpose(1, 2)[chosen])


@pytest.mark.parametrize("which", ["none", "one", "all"])
@pytest.mark.parametrize("flag", [1, 2, 3, 4], ids=["q", "k", "q-and-k", "out"])
@pytest.mark.parametrize("full", [True, False], ids=["", "broadcast"])
def test_replaced_heads(which, flag, full):
    chosen = torch.zeros(SMALL.B, SMALL.H, dtype=torch.bool)
    if which == "one":
        chosen[1, 2] = True
    elif which == "all":
        chosen[:] = True
    ones = torch.ones(SMALL.B, SMALL.H)
    inputs = make_inputs(SMALL, ones, ones)
    without = inputs.run().transpose(1, 2)  # [B, H, TQ, D]
    inputs.options |= make_replacements(inputs.args, chosen.to(torch.int8) * flag, full)
    out = inputs.check().transpose(1, 2)
    assert torch.equal(out[~chosen], without[~chosen])
    assert all(not torch.equal(out[b, h], without[b, h]) for b, h in chosen.nonzero().tolist())
    if flag == REPLACE_OUT:
        assert torch.equal(out[chosen], inputs.options["out_alt"].expand(out.shape)[chosen])


def test_a_replaced_output_does_not_depend_on_keys_and_values():
    inputs = make_inputs(Case(B=1, H=4, HKV=4), torch.ones(1, 4), torch.ones(1, 4))
    inputs.options |= make_replacements(inputs.args, torch.tensor([[0, 4, 7, 0]], dtype=torch.int8))
    for x in inputs.args[:3]:
        x[:, 1] = float("nan")
    inputs.args[2][:, 2] = float("nan")
    inputs.options["k_alt"][:] = float("nan")
    assert torch.isfinite(inputs.run()).all()


@pytest.mark.skipif(TEST_GPU, reason="counts what the interpreter multiplies")
def test_a_replaced_output_reads_no_keys(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    products, dot = [], Builder.create_dot
    monkeypatch.setattr(Builder, "create_dot", lambda *args: products.append(1) or dot(*args))
    inputs = make_inputs(Case(B=1, H=4), torch.ones(1, 4), torch.ones(1, 4))
    inputs.run()
    per_head, count = divmod(len(products), 4)
    assert per_head > 0 and count == 0
    products.clear()
    inputs.options |= make_replacements(inputs.args, torch.tensor([[3, 4, 7, 5]], dtype=torch.int8))
    inputs.run()
    assert len(products) == per_head


def test_a_zeroed_head_is_zero_whatever_replaces_it():
    inputs = make_inputs(Case(B=1, H=8, HKV=2), torch.ones(1, 8), torch.zeros(1, 8))
    inputs.options |= make_replacements(inputs.args, torch.arange(8, dtype=torch.int8)[None])
    for name in ALTERNATIVES:
        inputs.options[name][:] = float("nan")
    assert (inputs.run() == 0).all()


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_a_flag_without_its_vectors_gives_nan_where_it_cannot_be_refused(name, monkeypatch):
    """On a GPU, where looking at the flags would wait for it."""
    monkeypatch.setattr("shipsfast.kernels.attention_checks.require_replacements", lambda *args: None)
    inputs = make_inputs(Case(B=1, H=8, HKV=2), torch.ones(1, 8), torch.ones(1, 8))
    flags = torch.arange(8, dtype=torch.int8)[None]
    inputs.options |= make_replacements(inputs.args, flags) | {name: None}
    out = inputs.run()
    missing = (flags[0] & (1 << ALTERNATIVES.index(name))) != 0
    assert torch.isnan(out[:, :, missing]).all() and torch.isfinite(out[:, :, ~missing]).all()


def test_uniform_attention_is_the_mean_of_the_visible_values():
    case = Case(B=1, H=2, HKV=1, window=9, softcap=3.0)
    inputs = make_inputs(case, torch.zeros(1, 2), torch.ones(1, 2))
    _, _, v, _, _, position, subtree_end = inputs.args
    seen = reference.visible(position, subtree_end, window=case.window).double()
    mean = (seen / seen.sum(1, keepdim=True)) @ v[0, 0].double()  # [T, D]
    out = inputs.run()
    for h in range(2):
        torch.testing.assert_close(out[0, :, h].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_every_element_is_written(dtype, monkeypatch):
    case = Case(B=2, H=3, HKV=1, D=24, dtype=dtype)
    inputs = make_inputs(case)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert torch.isnan(torch.empty(3)).all()
    assert torch.isfinite(inputs.run()).all()


def test_a_zeroed_head_does_not_even_read_its_values():
    inputs = make_inputs(Case(B=1, H=4, HKV=4), torch.ones(1, 4), torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    inputs.args[2][:, 1] = float("nan")
    out = inputs.run()
    assert (out[:, :, 1] == 0).all() and torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_large_logits_stay_finite(dtype):
    inputs = make_inputs(Case(B=1, H=2, HKV=2, dtype=dtype, tree="forest"), torch.tensor([[300.0, -300.0]]))
    inputs.check()


def test_batch_of_one_is_the_same_as_expanded_rows():
    case = Case(B=3, batch="one")
    inputs = make_inputs(case)
    expanded = Inputs([x.expand(3, *x.shape[1:]) for x in inputs.args[:3]] + inputs.args[3:], inputs.options)
    copied = Inputs([x.contiguous() for x in expanded.args], inputs.options)
    out = inputs.run()
    assert torch.equal(out, expanded.run())
    assert torch.equal(out, copied.run())


def test_rows_do_not_see_each_other():
    inputs = make_inputs(SMALL)
    out = inputs.run()
    alone = Inputs([x[1:] for x in inputs.args[:5]] + inputs.args[5:], inputs.options)
    assert torch.equal(out[1:], alone.run())


@pytest.mark.parametrize("window", [None, 11])
def test_a_table_built_before_gives_the_same_bits(window):
    inputs = make_inputs(dataclasses.replace(SMALL, window=window, queries="last"))
    q = inputs.args[0]
    kind = kind_of_tree(*inputs.args[5:], window)
    config = CONFIG or launch_config("tree_attention", q.dtype, q.shape[-1], q.device, kind)
    table = block_table(
        *inputs.args[5:],
        block_m=config.block_m,
        block_n=config.block_n,
        query_index=inputs.options["query_index"],
        window=window,
        device=DEVICE,
    )
    assert torch.equal(inputs.run(), inputs.run(block_table=table))


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (16, 64), (64, 16), (128, 64)])
def test_any_tile_size(block_m, block_n):
    inputs = make_inputs(Case(B=1, H=2, HKV=1, window=30, dtype=torch.bfloat16, tree="nested"))
    inputs.check(config=LaunchConfig(block_m, block_n, num_warps=4, num_stages=1))


def test_duplicate_and_single_queries():
    inputs = make_inputs(dataclasses.replace(SMALL, tree="single", queries="last"))
    T = inputs.args[1].shape[2]
    q = inputs.args[0].expand(-1, -1, 3, -1)
    index = torch.tensor([T - 1] * 3, dtype=torch.int32, device=DEVICE)
    tripled = Inputs([q, *inputs.args[1:]], {**inputs.options, "query_index": index})
    out = tripled.check()
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])


def test_no_rows_and_no_queries():
    inputs = make_inputs(SMALL)
    none = Inputs([x[:0] for x in inputs.args[:5]] + inputs.args[5:], inputs.options)
    assert none.run().shape == (0, inputs.args[0].shape[2], SMALL.H, SMALL.D)
    index = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    none = Inputs([inputs.args[0][:, :, :0], *inputs.args[1:]], {**inputs.options, "query_index": index})
    assert none.run().shape == (SMALL.B, 0, SMALL.H, SMALL.D)


def changed(position: int, function):
    """A change of one positional argument."""
    return lambda inputs: inputs.args.__setitem__(position, function(inputs.args[position]))


def option(**values):
    return lambda inputs: inputs.options.update(values)


def each_of_qkv(function, **values):
    """A change of q, k and v alike, and of options."""

    def change(inputs):
        inputs.args[:3] = map(function, inputs.args[:3])
        inputs.options.update(values)

    return change


def table_for_other_window(inputs):
    inputs.options["block_table"] = block_table(*inputs.args[5:], block_m=32, block_n=32, window=5)


def replacing(**changes):
    """Replacements of a head's queries, keys and output, some of them changed."""

    def change(inputs):
        flags = torch.full((SMALL.B, SMALL.H), 7, dtype=torch.int8)
        good = make_replacements(inputs.args, flags)
        inputs.options |= good | {name: function(good[name]) for name, function in changes.items()}

    return change


REFUSALS = {
    "float64": (each_of_qkv(torch.Tensor.double), TypeError, "backend='reference'"),
    "mixed-dtypes": (changed(1, torch.Tensor.bfloat16), TypeError, "one dtype"),
    "bf16-mask-vector": (changed(3, torch.Tensor.bfloat16), TypeError, r"logit_scale must be float32"),
    "mask-vectors-differ": (changed(4, lambda x: x[:, :3]), ValueError, "output_scale"),
    "rows": (changed(0, lambda x: x.repeat(2, 1, 1, 1)), ValueError, r"q must be \[2 or 1"),
    "key-head-size": (changed(1, lambda x: x[..., :8]), ValueError, "one head size, got 16 in q and 8 in k"),
    "value-head-size": (changed(2, lambda x: x[..., :8]), ValueError, "one head size, got 16 in q and 8 in v"),
    "heads": (changed(0, lambda x: x[:, :3]), ValueError, "heads do not fit"),
    "key-heads": (changed(1, lambda x: x[:, :1]), ValueError, "heads do not fit"),
    "last-dim": (changed(0, lambda x: x.mT.contiguous().mT), ValueError, "contiguous"),
    "queries-without-index": (changed(0, lambda x: x[:, :, :9]), ValueError, "pass query_index"),
    "int64-position": (changed(5, torch.Tensor.long), ValueError, "position must be contiguous int32"),
    "softcap": (option(softcap=0.0), ValueError, "softcap must be positive"),
    "window": (option(window=0), ValueError, "window must be at least 1"),
    "table": (table_for_other_window, ValueError, "block_table is for another call"),
    "replace-dtype": (replacing(replace=torch.Tensor.bool), TypeError, "replace must be int8"),
    "replace-shape": (replacing(replace=lambda x: x[:1]), ValueError, r"replace must be \[2, 4\]"),
    "q_alt-dtype": (replacing(q_alt=torch.Tensor.half), TypeError, "q_alt must be torch.float32"),
    "q_alt-tokens": (replacing(q_alt=lambda x: x[:, 1:]), ValueError, r"q_alt must be \[2 or 1, \d+, 16\]"),
    "k_alt-per-head": (replacing(k_alt=lambda x: x.repeat(2, 1, 1)), ValueError, "k_alt must be"),
    "k_alt-last-dim": (replacing(k_alt=lambda x: x.mT.contiguous().mT), ValueError, "contiguous"),
    "out_alt-rows": (replacing(out_alt=lambda x: x[:2]), ValueError, r"out_alt must be \[4 or 1, 1 or"),
    "out_alt-size": (replacing(out_alt=lambda x: x[..., :8]), ValueError, "out_alt must be"),
    "head-too-large": (
        each_of_qkv(lambda x: x.repeat(1, 1, 1, 17), config=None),
        ValueError,
        "no launch parameters.*backend='reference'",
    ),
}  # fmt: skip
if not TEST_GPU:  # where the flags are not looked at
    REFUSALS |= {
        "replace-flag": (replacing(replace=lambda x: x + 1), ValueError, "sums of 1, 2 and 4, got 8"),
        "q_alt-missing": (replacing(q_alt=lambda x: None), ValueError, "q_alt is None"),
        "k_alt-missing": (replacing(k_alt=lambda x: None), ValueError, "k_alt is None"),
        "out_alt-missing": (replacing(out_alt=lambda x: None), ValueError, "out_alt is None"),
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    change, error, message = REFUSALS[name]
    inputs = make_inputs(SMALL)
    change(inputs)
    with pytest.raises(error, match=message):
        inputs.run()


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "default"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_configs_cover_every_kind_dtype_and_head_size(name, dtype):
    kinds = load_configs(name)["tree_attention"]
    assert tuple(kinds) == KINDS
    for dtypes in kinds.values():
        assert list(dtypes[str(dtype).removeprefix("torch.")]) == [64, 128, 256]


@pytest.mark.skipif(TEST_GPU, reason="the GPU tests use the committed parameters everywhere")
def test_committed_parameters_run():
    make_inputs(Case(B=1, H=1, HKV=1, D=128, dtype=torch.bfloat16)).run(config=None)


def packed_as(kind: str) -> prefix_tree.PackedPrompts:
    """A small pack of each kind."""
    template, count = (range(70), 4) if kind == "template" else (range(3), 8)
    packed = prefix_tree.pack([[*template, *range(100 * p, 100 * p + 6)] for p in range(1, count)])
    assert kind_of_tree(packed.position, packed.subtree_end) == kind
    return packed


@pytest.mark.parametrize("trimmed", [False, True], ids=["", "lastqueries"])
@pytest.mark.parametrize("window", [None, 20], ids=["", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_trees_by_the_way_of_a_scan(kind, dtype, window, trimmed):
    """TreeContext chooses launch parameters by the kind; the promises are the same in both."""
    packed = packed_as(kind)
    B, H, HKV, D, T = 2, 2, 1, 16, packed.num_tokens
    tree = TreeContext(packed, "triton", torch.device(DEVICE), np.sort(packed.last_index))
    index = torch.as_tensor(tree.trimmed.astype(np.int32), device=DEVICE) if trimmed else None
    torch.manual_seed(0)
    draw = lambda heads: torch.randn(B, T, heads, D, device=DEVICE).to(dtype).transpose(1, 2)
    q, k, v = draw(H), draw(HKV), draw(HKV)
    q = q[:, :, tree.trimmed] if trimmed else q
    plan = tree.plan(window, trimmed, q)
    assert tree.kind(None) == kind
    assert plan["config"] == launch_config("tree_attention", dtype, D, DEVICE, tree.kind(window))
    ones = torch.ones(B, H, device=DEVICE)
    logit_scale = ones.clone()
    logit_scale[1, 0] = 1e-5
    run = lambda factors: tree_attention(
        tree, q, k, v, LayerMask(factors, ones), plan, scaling=D**-0.5, window=window
    )
    out, unmasked = run(logit_scale), run(ones)
    args = (q, k, v, logit_scale, ones, tree.position, tree.subtree_end)
    assert_close_per_head(out, args, {"scaling": D**-0.5, "window": window, "query_index": index})
    touched = (logit_scale != 1)[:, None, :, None].expand(out.shape)
    assert torch.equal(out[~touched], unmasked[~touched])
    assert not torch.equal(out[touched], unmasked[touched])


def test_a_call_by_itself_chooses_as_a_scan_does():
    for kind in KINDS:
        packed = packed_as(kind)
        tree = TreeContext(packed, "triton", torch.device(DEVICE))
        q = torch.randn(1, 1, packed.num_tokens, 16, device=DEVICE)
        ones = torch.ones(1, 1, device=DEVICE)
        alone = module.tree_attention(q, q, q, ones, ones, tree.position, tree.subtree_end, scaling=0.25)
        plan = tree.plan(None, False, q)
        assert torch.equal(alone, tree_attention(tree, q, q, q, LayerMask(ones, ones), plan, scaling=0.25))


@pytest.mark.parametrize("tree", ["forest", "single"])
def test_the_loop_without_a_mask_may_be_left_out(tree):
    """As for trees of leaves. Blocks that are fully visible are then masked like the others: the bits are the same."""
    assert not launch_config("tree_attention", torch.float32, 64, "cpu", "leaves").unmasked_loop
    assert launch_config("tree_attention", torch.float32, 64, "cpu", "template").unmasked_loop
    inputs = make_inputs(Case(B=1, tree=tree))
    config = LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    table = block_table(*inputs.args[5:], block_m=16, block_n=16, device=DEVICE)
    assert bool((table.full_end > table.row_ptr[:-1]).any()) == (tree == "single")
    without = inputs.run(config=dataclasses.replace(config, unmasked_loop=False), block_table=table)
    assert torch.equal(without, inputs.run(config=config, block_table=table))


def test_an_unknown_kind_is_told():
    with pytest.raises(ValueError, match="unknown kind 'bush': expected one of leaves, template"):
        launch_config("tree_attention", torch.float32, 64, "cpu", "bush")


@pytest.mark.gpu
@pytest.mark.skipif(not TEST_GPU, reason="needs a GPU: set SHIPSFAST_TEST_GPU=1")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_long_packs_on_the_gpu(dtype, D):
    """2,000 tokens and many rows: both stages of the loop, several key blocks in flight, many programs."""
    rng = np.random.default_rng(0)
    template = rng.integers(0, 9999, 500).tolist()
    packed = prefix_tree.pack([template + rng.integers(0, 9999, 60).tolist() for _ in range(25)])
    B, H, HKV, T = 9, 8, 4, packed.num_tokens
    draw = lambda heads: torch.randn(B, T, heads, D, device=DEVICE, dtype=dtype).transpose(1, 2)
    logit_scale, output_scale = torch.ones(2, B, H, device=DEVICE)
    logit_scale[torch.arange(4), torch.arange(4)] = 1e-5
    output_scale[torch.arange(4) + 4, torch.arange(4)] = 0
    tree = [torch.from_numpy(x).to(DEVICE) for x in (packed.position, packed.subtree_end)]
    inputs = Inputs([draw(H), draw(HKV), draw(HKV), logit_scale, output_scale, *tree], {"scaling": D**-0.5})
    assert torch.equal(inputs.check(), inputs.run())
