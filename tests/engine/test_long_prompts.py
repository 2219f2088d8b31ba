"""Long prompts: memory grows with the tokens, not with their square."""

import gc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import shipsfast
from shipsfast.models.anatomy import inspect_model
from shipsfast.ops.extension import extension_status
from shipsfast.ops.prefix_tree import pack
from shipsfast.ops.tree_attention import TreeContext
from shipsfast.ops.tree_attention_cpp import plan_blocks
from shipsfast.ops.tree_attention_torch import plan_segments

SIZES = (1024, 2048, 4096)
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=1 << 18,
)  # fmt: skip


def build(window: int | None = None):
    torch.manual_seed(0)
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).eval()


def prompt(tokens: int) -> list[int]:
    return np.random.default_rng(tokens).integers(1, 64, tokens).tolist()


class Largest(TorchDispatchMode):
    """The most bytes that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def backends() -> list[str]:
    return ["torch", *(["cpp"] if extension_status()[0] else [])]


@pytest.mark.parametrize("backend", backends())
def test_a_scan_makes_nothing_of_size_t_by_t(backend):
    """From inspection to the last check; the largest tensor doubles with the tokens."""
    most = []
    for tokens in SIZES:
        with Largest() as largest:
            result = shipsfast.scan(build(), [prompt(tokens)], backend=backend, progress=False)
        assert np.isfinite(result.kl).all() and result.record["attention_backend"] == backend
        most.append(largest.bytes)
    assert most[1] <= 2.1 * most[0] and most[2] <= 2.1 * most[1], most
    assert most[2] < SIZES[2] ** 2, most


@pytest.mark.parametrize("window", [None, 300])
def test_plans_of_attention_grow_with_the_tokens(window):
    """What is kept for the attention of one prompt, in numbers; arrays that share memory count once."""
    blocks, groups = [], []
    for tokens in SIZES:
        packed = pack([prompt(tokens)])
        plan = plan_blocks(packed, window=window, query_index=None)
        blocks.append(sum(x.numel() for x in (plan.blocks, plan.queries, plan.keys)))
        kept = {}
        for group in plan_segments(packed, window=window, query_index=None, device=torch.device("cpu")):
            for x in (group.query_index, group.key_index, group.depth_q, group.depth_k):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        groups.append(sum(kept.values()))
    for sizes in (blocks, groups):
        assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0]), sizes


def test_the_last_check_of_a_long_prompt_is_exact():
    """Plain passes make no mask from LONG tokens on: they agree with those that have one."""
    from shipsfast.models import attention_hook

    model, ids = build(), [prompt(attention_hook.LONG)]
    with shipsfast.ablate(model, [(0, 1)]), torch.no_grad():
        without = model(torch.tensor(ids), use_cache=False).logits
    before, attention_hook.LONG = attention_hook.LONG, 1 << 30
    try:
        with shipsfast.ablate(model, [(0, 1)]), torch.no_grad():
            masked = model(torch.tensor(ids), use_cache=False).logits
    finally:
        attention_hook.LONG = before
    assert (without - masked).abs().max() < 1e-4
    assert torch.isfinite(without).all()


def test_padding_and_windows_keep_their_masks(monkeypatch):
    """The mask is left out only where nothing but causality hides anything."""
    from shipsfast.models import attention_hook

    seen = []
    dense = attention_hook._dense

    def watch(call, module, query, key, value, visible, *asked, **how):
        seen.append(visible is None)
        return dense(call, module, query, key, value, visible, *asked, **how)

    monkeypatch.setattr(attention_hook, "_dense", watch)
    monkeypatch.setattr(
        "shipsfast.engine.ablate.check_own_forward", lambda *_: None
    )  # its calls are not those here
    monkeypatch.setattr(attention_hook, "LONG", 8)
    ids = torch.tensor([prompt(16), prompt(16)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for model, how, expected in (
        (build(), {}, True),
        (build(), {"attention_mask": torch.ones_like(ids)}, True),
        (build(), {"attention_mask": mask}, False),
        (build(window=4), {}, False),
        (build(window=64), {}, False),
    ):
        seen.clear()
        with shipsfast.ablate(model, [(0, 1)]), torch.no_grad():
            model(ids, use_cache=False, **how)
        assert seen == [expected, expected]
    seen.clear()
    with shipsfast.ablate(build(), [(0, 1)]), torch.no_grad():
        build_ids = build()
        with shipsfast.ablate(build_ids, [(0, 1)]):
            build_ids.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert seen == [True, True] + [False] * 4


def test_128k_tokens_plan_and_one_row_has_a_table():
    """The tables of 131,072 tokens are made, small, and in seconds; every query sees all before it."""
    tokens = 1 << 17
    packed = pack([prompt(tokens)])
    plan = plan_blocks(packed, window=None, query_index=None)
    assert sum(x.numel() for x in (plan.blocks, plan.queries, plan.keys)) < 5 * tokens
    seen = plan.queries[:, 2].long() - plan.queries[:, 1]
    assert torch.equal(seen, torch.arange(1, tokens + 1))
    anatomy = inspect_model(build(window=4096), prompt(8), tokens)
    assert [layer.window for layer in anatomy.layers] == [4096, 4096]
    assert TreeContext(packed, "cpp", torch.device("cpu")).position.numel() == tokens
    gc.collect()
