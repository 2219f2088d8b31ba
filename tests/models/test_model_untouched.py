"""The model is the user's: it leaves every scan as it came, whatever happens in between."""

import functools
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import shipsfast
from shipsfast.models.attention_hook import ATTRIBUTE
from tests.support.model_state import assert_same, state
from tests.support.models import FAMILIES, build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3-qknorm-window", "gpt2", "opt"])
def test_after_a_scan(family, attention):
    model = build(family)
    model.set_attn_implementation(attention)
    model.train()
    model.base_model.eval()  # a mixture of modes
    before = state(model)
    shipsfast.scan(model, PROMPTS, progress=False)
    assert_same(before, state(model))


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("where", ["metric", "layer", "probe"])
def test_after_an_exception(monkeypatch, error, where):
    model = build()
    before = state(model)

    def fail(*_args, **_kwargs):
        raise error

    if where == "metric":
        monkeypatch.setattr("shipsfast.scans.metrics.divergence_rows", fail)
    elif where == "layer":
        for name in ("segment_attention", "cpp_attention"):
            monkeypatch.setattr(f"shipsfast.ops.tree_attention.{name}", fail)
    else:
        monkeypatch.setattr("shipsfast.models.attention_hook.record_call", fail)
    # What breaks while the model is looked at is taken for something the model does, and named.
    expected = (shipsfast.UnsupportedModelError, KeyboardInterrupt) if where == "probe" else type(error)
    with pytest.raises(expected):
        shipsfast.scan(model, PROMPTS, progress=False)
    monkeypatch.undo()
    assert_same(before, state(model))
    assert shipsfast.scan(model, PROMPTS, progress=False).kl.shape == (2, 3, 4)


@pytest.mark.parametrize("offloaded", [False, True], ids=["looking-for-nan", "offloaded"])
def test_ctrl_c_between_a_hook_and_its_handle(monkeypatch, offloaded):
    """The hook is there, and nobody knows its handle yet. Hooks that the metric adds meanwhile stay."""
    model = build(dtype=torch.float32)
    if offloaded:
        cpu_offload(model, torch.device("cpu"))
    else:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(3e38)
    module = "shipsfast.models.weights" if offloaded else "shipsfast.engine.nonfinite"
    register, calls = torch.nn.Module.register_forward_hook, []

    def mine(*_args):
        return None

    def stopped(self, hook, **options):
        handle = register(self, hook, **options)
        if (hook.func if isinstance(hook, functools.partial) else hook).__module__ == module:
            calls.append(hook)
            if len(calls) == 3:
                register(model.lm_head, mine)
                raise KeyboardInterrupt
        return handle

    before = state(model)
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", stopped)
    with pytest.raises(KeyboardInterrupt):
        shipsfast.scan(model, PROMPTS, progress=False)
    monkeypatch.undo()
    assert list(model.lm_head._forward_hooks.values()) == [mine]
    model.lm_head._forward_hooks.clear()
    notes = ("_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    assert not any(getattr(m, name) for m in model.modules() for name in notes)
    after = state(model)
    if offloaded:  # those on the meta device have no values to compare
        before["weights"] = after["weights"] = {}
    assert_same(before, after)


@pytest.mark.parametrize("layers", ["auto", "model"])
def test_a_users_hooks_stay_and_run(layers):
    """They see the growing batch: more rows than any plain forward pass has, the last time when the head runs."""
    model = build()
    rows = []
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: rows.append(out.shape[0]))
    shipsfast.scan(model, PROMPTS, progress=False, layers=layers)
    assert 1 + 2 * 4 in rows and len(model.model.layers[1]._forward_hooks) == 1
    handle.remove()


def test_a_forward_set_on_a_layer_is_kept():
    """Offloading libraries replace `forward` on instances."""
    model = build()
    layer = model.model.layers[0]
    original, calls = layer.forward, []

    def forward(hidden, *args, **kwargs):
        calls.append(hidden.shape[0])
        return original(hidden, *args, **kwargs)

    layer.forward = forward
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert result.record["layers"] == "model"
    assert layer.forward is forward and max(calls) == 1 + 4


def test_ablate_restores_and_nests():
    model = build()
    ids = torch.tensor([PROMPTS[0]])
    before, plain = state(model), model(ids).logits
    with shipsfast.ablate(model, [(0, 1)], ablation="zero"):
        one = model(ids).logits
        with shipsfast.ablate(model, [(1, 2)], ablation="zero"):
            two = model(ids).logits
        assert torch.equal(model(ids).logits, one)
    with shipsfast.ablate(model, [(0, 1), (1, 2)], ablation="zero"):
        both = model(ids).logits
    assert torch.equal(two, both)
    assert not torch.allclose(plain, one) and not torch.allclose(one, two)
    assert_same(before, state(model))
    assert torch.equal(model(ids).logits, plain)


def test_ablate_restores_after_an_exception():
    model = build()
    before = state(model)
    with pytest.raises(RuntimeError, match="broken"), shipsfast.ablate(model, [(0, 1)]):
        raise RuntimeError("broken")
    assert_same(before, state(model))


def test_scan_inside_ablate_is_refused():
    model = build()
    with (
        shipsfast.ablate(model, [(0, 1)]),
        pytest.raises(shipsfast.InputError, match="inside shipsfast.ablate"),
    ):
        shipsfast.scan(model, PROMPTS, progress=False)
    assert not any(ATTRIBUTE in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_ablate_gives_the_scores_of_the_scan(family):
    model = build(family)
    kl = shipsfast.scan(model, PROMPTS, progress=False, heads=[(1, 2)]).kl
    for p, ids in enumerate(PROMPTS):
        tokens = torch.tensor([ids])
        # Not the plain model: transformers' eager attention (Gemma 2's default) rounds its softmax to float32.
        with shipsfast.ablate(model, []):
            base = torch.log_softmax(model(tokens).logits[0, -1], -1)
        with shipsfast.ablate(model, [(1, 2)]):
            other = torch.log_softmax(model(tokens).logits[0, -1], -1)
        assert abs((base.exp() * (base - other)).sum().item() - kl[p, 1, 2]) < 1e-12


def test_ablate_acts_in_generation_with_padding_and_cache():
    """Greedy text under ablation is that of a loop without cache, for left-padded rows too."""
    model = build()
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with shipsfast.ablate(model, [(0, 1), (2, 3)], ablation="uniform"):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        for row, prompt in zip(out, prompts, strict=True):
            tokens = list(prompt)
            for _ in range(6):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            assert row[width:].tolist() == tokens[len(prompt) :]


def test_a_second_thread_is_refused_and_the_model_left_in_order():
    model, out = build("llama-gqa"), []
    inside, go_on = threading.Event(), threading.Event()

    def metric(base, _ablated, prompt_index):
        inside.set()
        assert go_on.wait(60)
        return torch.zeros(len(prompt_index))

    thread = threading.Thread(
        target=lambda: out.append(shipsfast.scan(model, [[5, 6, 7]], metric=metric, progress=False))
    )
    with torch.no_grad():
        before = model(torch.tensor([[5, 6, 7]])).logits
    thread.start()
    assert inside.wait(60)
    with pytest.raises(shipsfast.InputError, match="another thread is at work on this model"):
        shipsfast.scan(model, [[5, 6, 7]], progress=False)
    go_on.set()
    thread.join()
    assert len(out) == 1
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert np.isfinite(shipsfast.scan(model, [[5, 6, 7]], progress=False).kl).all()
