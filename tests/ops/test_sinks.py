"""Attention sinks: one more logit per head that joins the softmax's denominator, and that no ablation scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.ops import decode_attention as decode
from shipsfast.ops import reference
from shipsfast.ops.extension import extension_status
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.prefix_tree import pack
from shipsfast.ops.tree_attention_cpp import cpp_attention, plan_blocks
from shipsfast.ops.tree_attention_torch import plan_segments, segment_attention
from tests.support.family_oracle import ships
from tests.support.numerics import assert_close_abs
from tests.support.tiny_configs import tiny_model

HEADS, KV_HEADS, SIZE = 4, 2, 8
PROMPTS = [[5, 9, 17, 23, 33, 8, 40], [5, 9, 17, 7], [5, 9, 17, 23, 33, 11, 50, 51, 52]]
SINKS = [0.0, 1.5, -30.0, float("-inf")]
needs_extension = pytest.mark.skipif(not extension_status()[0], reason="the native extension is not built")


def _inputs(dtype=torch.float64, seed=0):
    packed = pack(PROMPTS)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    rows, tokens = 3, packed.num_tokens
    q, k, v = (
        draw(rows, HEADS, tokens, SIZE),
        draw(rows, KV_HEADS, tokens, SIZE),
        draw(rows, KV_HEADS, tokens, SIZE),
    )
    logit_scale, output_scale = torch.ones(rows, HEADS, dtype=dtype), torch.ones(rows, HEADS, dtype=dtype)
    logit_scale[1, 1], logit_scale[2, 0], output_scale[2, 3] = 1e-5, 0.0, 0.0
    return packed, [q, k, v, logit_scale, output_scale], torch.tensor(SINKS, dtype=dtype)


def _by_definition(
    packed, q, k, v, logit_scale, output_scale, sink, softcap=None, window=None
) -> torch.Tensor:
    """Number by number, in Python floats of float64."""
    rows, tokens = len(q), packed.num_tokens
    out = np.zeros((rows, tokens, HEADS, SIZE))
    for b in range(rows):
        for h in range(HEADS):
            for i in range(tokens):
                depth = packed.position[i]
                lowest = -1 if window is None else depth - window
                seen = [j for j in range(i + 1) if i < packed.subtree_end[j] and packed.position[j] > lowest]
                logits = np.array(
                    [float(q[b, h, i] @ k[b, h // 2, j]) * 0.5 * float(logit_scale[b, h]) for j in seen]
                )
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits)
                total = weights.sum() + np.exp(float(sink[h]))
                for j, weight in zip(seen, weights, strict=True):
                    out[b, i, h] += weight / total * v[b, h // 2, j].numpy() * float(output_scale[b, h])
    return torch.from_numpy(out)


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0, "window": 3}], ids=["plain", "softcap-window"])
@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpp", marks=needs_extension)])
def test_tree_attention(backend, how):
    packed, args, sink = _inputs()
    expected = _by_definition(packed, *args, sink, **how)
    if backend == "reference":
        tree = torch.as_tensor(packed.position), torch.as_tensor(packed.subtree_end)
        got = reference.tree_attention(*args, *tree, scaling=0.5, sink=sink, **how)
    else:
        window, cap = how.get("window"), how.get("softcap")
        if backend == "cpp":
            plan, function = plan_blocks(packed, window=window, query_index=None), cpp_attention
        else:
            plan = plan_segments(packed, window=window, query_index=None, device=torch.device("cpu"))
            function = segment_attention
        got = function(*args, plan, scaling=0.5, softcap=cap, sink=sink)
    assert_close_abs(got, expected, 1e-13)
    assert torch.equal(got[2, :, 3], torch.zeros_like(got[2, :, 3]))


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0, "window": 3}], ids=["plain", "softcap-window"])
def test_triton_tree_attention(how):
    pytest.importorskip("triton")
    from shipsfast.kernels.launch_config import LaunchConfig
    from shipsfast.kernels.tree_attention import tree_attention

    packed, args, sink = _inputs(torch.float32)
    tree = torch.as_tensor(packed.position), torch.as_tensor(packed.subtree_end)
    config = LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    got = tree_attention(*args, *tree, scaling=0.5, sink=sink, config=config, **how)
    expected = reference.tree_attention(
        *(x.double() for x in args), *tree, scaling=0.5, sink=sink.double(), **how
    )
    assert_close_abs(got, expected, 2e-6)


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0, "window": 3}], ids=["plain", "softcap-window"])
@pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("cpp", marks=needs_extension), "triton"]
)
def test_decode_attention_is_tree_attention_of_the_last_token(backend, how):
    if backend == "triton":
        pytest.importorskip("triton")
    dtype = torch.float32 if backend == "triton" else torch.float64
    tokens = 9
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = draw(2, HEADS, SIZE), draw(2, KV_HEADS, tokens, SIZE), draw(2, KV_HEADS, tokens, SIZE)
    sink = torch.tensor(SINKS, dtype=dtype)
    mask = LayerMask(
        torch.tensor([[1, 1e-5, 1, 1], [1, 1, 0, 1]], dtype=dtype), torch.ones(2, HEADS, dtype=dtype)
    )
    slot = torch.arange(2, dtype=torch.int32)
    length = torch.full((2,), tokens, dtype=torch.int32)
    got = decode.decode_attention(backend, q, k, v, None, slot, length, mask, scaling=0.5, sink=sink, **how)
    tree = torch.arange(tokens), torch.full((tokens,), tokens)
    wide = [x.double() for x in (q[:, :, None], k, v, mask.logit_scale, mask.output_scale)]
    expected = reference.tree_attention(
        *wide, *tree, scaling=0.5, sink=sink.double(), query_index=torch.tensor([tokens - 1]), **how
    )
    assert_close_abs(got, expected[:, 0], 2e-6 if backend == "triton" else 1e-13)


def test_wrong_sinks_are_refused():
    pytest.importorskip("triton")
    from shipsfast.kernels.tree_attention import tree_attention

    packed, args, sink = _inputs(torch.float32)
    tree = torch.as_tensor(packed.position), torch.as_tensor(packed.subtree_end)
    for wrong, error in ((sink.double(), TypeError), (sink[:3], ValueError)):
        with pytest.raises(error, match="sink must be"):
            tree_attention(*args, *tree, scaling=0.5, sink=wrong)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_scan(backend):
    model = tiny_model("gpt_oss")
    result = shipsfast.scan(model, PROMPTS, progress=False, backend=backend)
    assert_close_abs(result.kl, ships(model, PROMPTS), 1e-12)
