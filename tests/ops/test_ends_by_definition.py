"""Attention of single tokens at the ends of a tree, by its definition: one query at a time, over the tokens on its path."""

import random

import pytest
import torch

from shipsfast.ops import end_attention as ends
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.prefix_tree import pack
from shipsfast.ops.tree_attention import TreeContext
from shipsfast.replacements import REPLACE_K

ROWS, HEADS, KV_HEADS, SIZE, VALUE_SIZE = 3, 4, 2, 6, 5
SOFTCAP, SCALING = 2.0, 0.7


def trees(seed: int):
    """Prompts of few tokens, that branch and end anywhere, and positions that are read of each."""
    draw = random.Random(seed)
    prompts = [[draw.choice([3, 4]) for _ in range(draw.randint(1, 14))] for _ in range(draw.randint(1, 9))]
    reads = [draw.sample(range(len(ids)), draw.randint(1, len(ids))) for ids in prompts]
    return pack(prompts, reads)


def by_definition(packed, nodes, base, q, k, v, scale, replaced, window, sink) -> torch.Tensor:
    out = torch.empty(ROWS, len(nodes), HEADS, VALUE_SIZE, dtype=q.dtype)
    for u, node in enumerate(nodes.tolist()):
        above = [j for j in range(node) if packed.subtree_end[j] > node]
        assert len(above) == packed.position[node]
        if window is not None:
            above = above[max(0, len(above) - window + 1) :]
        for row in range(ROWS):
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                keys = torch.cat([base[0][0, :, above], k[row, :, u : u + 1]], 1)
                keys = keys.mean(0) if replaced[row, head] else keys[kv]
                logits = SOFTCAP * torch.tanh(SCALING * scale[row, head] * (keys @ q[row, head, u]) / SOFTCAP)
                weights = torch.cat([logits, sink[head : head + 1]]).softmax(0)[:-1]
                out[row, u, head] = weights @ torch.cat([base[1][0, kv, above], v[row, kv, u : u + 1]])
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("limits", [None, (1, 1), (3000, 1), (1, 3000), (2000, 1500), (700, 700)], ids=str)
def test_every_way_to_cut_it(monkeypatch, limits, window):
    """A path, an end and a row at a time, or some of each."""
    if limits:
        monkeypatch.setattr(ends, "LOGIT_BYTES", limits[0])
        monkeypatch.setattr(ends, "GATHER_BYTES", limits[1])
    for seed in range(6):
        packed = trees(seed)
        nodes = torch.as_tensor(packed.read_index).unique()
        torch.manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
        base = draw(1, KV_HEADS, packed.num_tokens, SIZE), draw(1, KV_HEADS, packed.num_tokens, VALUE_SIZE)
        q, k, v = (
            draw(ROWS, heads, len(nodes), size)
            for heads, size in ((HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, VALUE_SIZE))
        )
        scale, sink, replaced = torch.rand(ROWS, HEADS).double(), draw(HEADS), torch.rand(ROWS, HEADS) < 0.3
        mask = LayerMask(scale, torch.ones_like(scale)).replacing(REPLACE_K, replaced)
        tree = TreeContext(packed, "torch", torch.device("cpu"), nodes.numpy())
        got = ends.end_attention(
            tree, base, q, k, v, mask, scaling=SCALING, softcap=SOFTCAP, window=window, sink=sink
        )
        wanted = by_definition(packed, nodes, base, q, k, v, scale, replaced, window, sink)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_what_it_holds_is_bounded(monkeypatch):
    """Of many paths and long ones, no product is larger than its limit, or than one end's."""
    packed = pack([[1] * 40 + [each] * 5 for each in range(2, 40)])
    nodes, made = torch.as_tensor(packed.read_index), []
    real = ends._attend

    def counted(q, k, v, base_k, *rest, **how):
        made.append((q.shape[:4].numel() * base_k.shape[2] * 8, base_k.numel() * 2 * 8))
        return real(q, k, v, base_k, *rest, **how)

    monkeypatch.setattr(ends, "_attend", counted)
    monkeypatch.setattr(ends, "LOGIT_BYTES", 20_000)
    monkeypatch.setattr(ends, "GATHER_BYTES", 50_000)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    base = [draw(1, KV_HEADS, packed.num_tokens, SIZE) for _ in range(2)]
    q, k, v = (draw(ROWS, heads, len(nodes), SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = LayerMask.untouched(ROWS, HEADS, torch.float64, "cpu")
    tree = TreeContext(packed, "torch", torch.device("cpu"), nodes.numpy())
    ends.end_attention(tree, base, q, k, v, mask, scaling=1.0)
    assert max(logits for logits, _ in made) <= 20_000 and max(keys for _, keys in made) <= 50_000
    assert len(made) < 38 * ROWS, "more than one at a time where the limits let"
