"""Tree attention on the CPU: the dense oracle against its formula, the blocked path against the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from shipsfast.ops import prefix_tree, reference, tree_attention_cpp, tree_attention_torch
from shipsfast.ops.extension import extension_status
from shipsfast.replacements import REPLACE_OUT
from tests.support.attention_numerics import (
    ALTERNATIVES,
    Case,
    assert_close_per_head,
    make_arguments,
    make_prompts,
    make_replacements,
    oracle,
)
from tests.support.numerics import assert_close_abs

FULL = Case(B=3, replace="full", tree="nested", dtype=torch.float64)
CASES = [
    FULL,
    Case(B=3, dtype=torch.float64),
    dataclasses.replace(FULL, replace="one", batch="one"),
    dataclasses.replace(FULL, batch="one", HKV=4, tree="duplicates"),
    dataclasses.replace(FULL, B=1, H=9, HKV=3, D=7, softcap=2.0),
    dataclasses.replace(FULL, replace="one", window=7, tree="shared"),
    dataclasses.replace(FULL, H=5, HKV=1, softcap=0.5, window=9, queries="last"),
    dataclasses.replace(FULL, replace="one", queries="last", tree="forest", DV=24),
    dataclasses.replace(FULL, DV=5, batch="one", tree="single"),
    dataclasses.replace(FULL, replace="one", tree="one_token", DV=24),
]


def tree(case: Case, options: dict) -> tuple[prefix_tree.PackedPrompts, dict, dict]:
    """The packed prompts, the arguments that cut them into blocks, and the options that are left."""
    options = dict(options)
    query_index = options.pop("query_index", None)
    cut = {
        "window": options.pop("window"),
        "query_index": None if query_index is None else query_index.numpy(),
    }
    return prefix_tree.pack(make_prompts(case.tree)), cut, options


def segment_attention(case: Case, args, options) -> torch.Tensor:
    """segments.segment_attention with the arguments of reference.tree_attention."""
    packed, cut, options = tree(case, options)
    plan = tree_attention_torch.plan_segments(packed, **cut, device=torch.device("cpu"))
    return tree_attention_torch.segment_attention(*args[:5], plan, **options)


def cpp(case: Case, args, options) -> torch.Tensor:
    """cpp_attention.cpp_attention likewise."""
    packed, cut, options = tree(case, options)
    return tree_attention_cpp.cpp_attention(
        *args[:5], tree_attention_cpp.plan_blocks(packed, **cut), **options
    )


built, why_not_built = extension_status()
NATIVE = pytest.param(
    "cpp", marks=pytest.mark.skipif(not built, reason=f"needs the extension: {why_not_built}")
)
ATTENTION = {
    "reference": lambda case, args, options: reference.tree_attention(*args, **options),
    "segments": segment_attention,
    "cpp": cpp,
}
NAMES = ["reference", "segments", NATIVE]
FAST = ["segments", NATIVE]


def formula(args, options) -> torch.Tensor:
    """The definition, query by query, with the visible keys found by walking up the tree."""
    q, k, v, logit_scale, output_scale, position = (x.numpy() for x in args[:6])
    replace, q_alt, k_alt, out_alt = (
        options[name].numpy() if name in options else None for name in ("replace", *ALTERNATIVES)
    )
    query_index = options.get("query_index", torch.arange(len(position))).tolist()
    rows, heads = logit_scale.shape
    out = np.empty((rows, len(query_index), heads, v.shape[3]))
    for b, i, h in np.ndindex(out.shape[:3]):
        flags = 0 if replace is None else int(replace[b, h])
        kv_head = h * k.shape[1] // heads
        query, keys = q[b % len(q), h, i], k[b % len(k), kv_head]
        if flags & 1:
            query = q_alt[b % len(q_alt), i]
        if flags & 2:
            keys = k_alt[b % len(k_alt)]
        node = query_index[i]
        path = [node]
        while position[node] > 0:  # in depth-first order the parent is the nearest node before, one level up
            node = max(j for j in range(node) if position[j] == position[node] - 1)
            path.append(node)
        path = path[: options["window"]]
        logits = keys[path] @ query * options["scaling"] * logit_scale[b, h]
        if options["softcap"]:
            logits = options["softcap"] * np.tanh(logits / options["softcap"])
        weights = np.exp(logits - logits.max())
        result = weights / weights.sum() @ v[b % len(v), kv_head, path]
        if flags & 4:
            result = out_alt[h % len(out_alt), i % out_alt.shape[1]]
        out[b, i, h] = result * output_scale[b, h] if output_scale[b, h] else 0
    return torch.from_numpy(out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle_is_the_formula(case):
    args, options = make_arguments(case)
    assert_close_abs(reference.tree_attention(*args, **options), formula(args, options), 1e-13)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, *HALVES], ids=["fp64", "fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_matches_the_oracle(name, case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    args, options = make_arguments(case)
    out, exact = ATTENTION[name](case, args, options), oracle(*args, **options)
    assert out.is_contiguous()
    if dtype == torch.float64:
        assert_close_abs(out, exact, 1e-13)
    else:
        assert_close_per_head(out, args, options)


@pytest.mark.parametrize("case", [case for case in CASES if case.replace], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_many_small_blocks(name, case, monkeypatch):
    args, options = make_arguments(case)
    exact = oracle(*args, **options)
    monkeypatch.setattr(tree_attention_torch, "BLOCK", 9)
    monkeypatch.setattr(tree_attention_torch, "GATHER_BYTES", 1)
    monkeypatch.setattr(tree_attention_cpp, "BLOCK", 9)
    assert_close_abs(ATTENTION[name](case, args, options), exact, 1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["none", "one", "all"])
@pytest.mark.parametrize("flag", [1, 2, 3, 4], ids=["q", "k", "q-and-k", "out"])
@pytest.mark.parametrize("batch", ["full", "one"], ids=["", "batch1"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap3"])
def test_other_heads_keep_their_bits(name, which, flag, batch, softcap):
    case = Case(B=3, H=6, HKV=2, tree="nested", batch=batch, softcap=softcap)
    chosen = torch.zeros(case.B, case.H, dtype=torch.bool)
    if which == "one":
        chosen[1, 4] = True
    elif which == "all":
        chosen[:] = True
    args, options = make_arguments(case, torch.ones(case.B, case.H), torch.ones(case.B, case.H))
    given = [x.clone() for x in args]
    without = ATTENTION[name](case, args, options).transpose(1, 2)  # [B, H, TQ, D]
    options |= make_replacements(args, chosen.to(torch.int8) * flag)
    out = ATTENTION[name](case, args, options).transpose(1, 2)
    assert torch.equal(out[~chosen], without[~chosen])
    assert torch.isfinite(out).all()
    assert all(not torch.equal(out[b, h], without[b, h]) for b, h in chosen.nonzero().tolist())
    if flag == REPLACE_OUT:
        assert torch.equal(out[chosen], options["out_alt"].expand(out.shape)[chosen])
    assert all(map(torch.equal, args, given)), "an input was written to"


@pytest.mark.parametrize("name", NAMES)
def test_a_zeroed_head_is_zero_whatever_replaces_it(name):
    case = Case(B=1, H=8, HKV=2)
    args, options = make_arguments(case, torch.ones(1, 8), torch.zeros(1, 8))
    options |= make_replacements(args, torch.arange(8, dtype=torch.int8)[None])
    for alternative in ALTERNATIVES:
        options[alternative][:] = float("nan")
    assert (ATTENTION[name](case, args, options) == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("missing", ALTERNATIVES)
def test_refuses_a_flag_without_its_vectors(name, missing):
    args, options = make_arguments(FULL)
    with pytest.raises(ValueError, match=f"{missing} is None"):
        ATTENTION[name](FULL, args, options | {missing: None})


@pytest.mark.parametrize("name", NAMES)
def test_refuses_an_unknown_flag(name):
    args, options = make_arguments(FULL)
    with pytest.raises(ValueError, match="sums of 1, 2 and 4, got 9"):
        ATTENTION[name](FULL, args, options | {"replace": torch.full((3, 4), 9, dtype=torch.int8)})


@pytest.mark.skipif(not built, reason=f"needs the extension: {why_not_built}")
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("SHIPSFAST_CPU_ISA", isa)
    try:
        for case in CASES:
            for dtype in (torch.float64, torch.float32, *HALVES):
                test_matches_the_oracle("cpp", case, dtype)
    except RuntimeError as error:
        if isa != "default" and "or this machine or build lacks it" in str(error):
            pytest.skip(f"this CPU has no {isa}")
        raise


@pytest.mark.skipif(not built, reason=f"needs the extension: {why_not_built}")
def test_threads_do_not_change_a_bit():
    args, options = make_arguments(FULL)
    whole = cpp(FULL, args, options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpp(FULL, args, options), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not built, reason=f"needs the extension: {why_not_built}")
def test_scores_far_apart_and_many_tiles():
    """Running maxima that jump from tile to tile, and weights too small for the exp of floats, in a long path."""
    case = Case(B=1, H=2, HKV=1, D=16, tree="single")
    args, options = make_arguments(case, torch.tensor([[200.0, -200.0]]), torch.ones(1, 2))
    assert_close_per_head(cpp(case, args, options), args, options)


@pytest.mark.skipif(not built, reason=f"needs the extension: {why_not_built}")
def test_cpp_refuses_what_does_not_fit():
    args, options = make_arguments(FULL)
    with pytest.raises(RuntimeError, match="shapes of q, k, v and out that fit together"):
        cpp(FULL, [args[0], args[1][..., :-1], *args[2:]], options)
    with pytest.raises(RuntimeError, match="float64, float32, bfloat16 or float16"):
        cpp(FULL, [*(x.to(torch.float8_e4m3fn) for x in args[:3]), *args[3:]], options)
