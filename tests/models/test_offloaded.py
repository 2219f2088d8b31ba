"""Models that accelerate has dispatched: layers on a disk or a CPU, brought in once for all rows."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module

import shipsfast
from shipsfast.models.fingerprint import fingerprint
from shipsfast.models.loading import load_model
from tests.support.checkpoints import device_map, load_offloaded, save
from tests.support.models import FAMILIES, LAYERS, brute_force, build
from tests.support.numerics import assert_close_abs

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40], [12, 13, 14]]


def on_disk(model, folder, everything: bool = False):
    """The model with its layers, or all of it, read from its checkpoint by accelerate."""
    where = device_map(model, "disk")
    if everything:
        where = dict.fromkeys(where, "disk")
    return load_offloaded(save(model, folder), where, dtype=model.dtype)


def off_cpu(model):
    """Every weight kept in a dict, as cpu_offload keeps it in front of a GPU."""
    return cpu_offload(model, torch.device("cpu"))


def scan(model, **how):
    return shipsfast.scan(model, PROMPTS, progress=False, layers="model", **how)


def same_up_to_addresses(found: np.ndarray, expected: np.ndarray) -> None:
    """Accelerate maps weights into memory at other addresses, where MKL rounds some products of float64 otherwise on
    some processors."""
    assert_close_abs(found, expected, 1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk(family, tmp_path):
    model = build(family)
    expected = scan(model, rows_per_block=5)
    offloaded = on_disk(model, tmp_path)
    expected_print = fingerprint(load_model(str(tmp_path)))
    found = scan(offloaded, rows_per_block=5)
    same_up_to_addresses(found.kl, expected.kl)
    assert found.record["weights"] == "offloaded"
    assert fingerprint(offloaded) == expected_print


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2-softcap-window"])
def test_everything_offloaded(family, tmp_path):
    """Embeddings, norm and head too, tied or not."""
    expected, oracle = scan(build(family)), brute_force(build(family), PROMPTS)
    for offloaded in (off_cpu(build(family)), on_disk(build(family), tmp_path, everything=True)):
        found = scan(offloaded)
        same_up_to_addresses(found.kl, expected.kl)
        assert_close_abs(found.kl, oracle, 1e-10)
        assert all(p.is_meta for p in offloaded.parameters())


def test_half_precision_head_offloaded():
    expected, found = scan(build(dtype=torch.bfloat16)), scan(off_cpu(build(dtype=torch.bfloat16)))
    assert found.record["head_precision"] == "float32" and np.array_equal(found.kl, expected.kl)


def test_dispatched_and_in_memory():
    """Hooks that only move data, as on several devices."""
    model = build()
    dispatched = dispatch_model(build(), device_map(model, "cpu"), force_hooks=True)
    expected, found = scan(model), scan(dispatched)
    assert found.record["weights"] == "dispatched" and np.array_equal(found.kl, expected.kl)


def test_mixed(tmp_path):
    """Some layers in memory, one on the disk, one offloaded to the CPU."""
    model = build()
    where = device_map(model, "cpu") | {"model.layers.1": "disk"}
    found = scan(load_offloaded(save(model, tmp_path), where, dtype=model.dtype))
    assert np.array_equal(found.kl, scan(model).kl)


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_ablations_that_run_the_model_first(kind):
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10]]
    how = shipsfast.Ablation(kind, prompts=prompts[::-1] if kind == "resample" else None)
    expected, found = (
        shipsfast.scan(m, prompts, ablation=how, progress=False, layers="model")
        for m in (build(), off_cpu(build()))
    )
    assert np.array_equal(found.kl, expected.kl)


def test_dataset_scan_and_search():
    model, offloaded = build(), off_cpu(build())
    expected, found = (
        shipsfast.scan_dataset(m, PROMPTS, progress=False, layers="model") for m in (model, offloaded)
    )
    assert np.array_equal(found.angle_deg, expected.angle_deg)
    expected, found = (
        shipsfast.sahara(m, PROMPTS, group_size=2, progress=False, layers="model") for m in (model, offloaded)
    )
    assert found.heads == expected.heads


def test_a_layer_is_brought_in_once_for_all_chunks(monkeypatch):
    """Two blocks and two checks: the blocks ask once each, accelerate itself once in each plain pass."""
    offloaded = off_cpu(build())
    hook, asked = offloaded.model.layers[1].self_attn.q_proj._hf_hook, []
    loads = AlignDevicesHook.pre_forward

    def pre_forward(self, module, *args, **kwargs):
        if self is hook and self.offload:
            asked.append(module.weight.is_meta)
            held = {i for i, x in enumerate(offloaded.model.layers) if not x.self_attn.q_proj.weight.is_meta}
            assert len(held) <= 1
        return loads(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    scan(offloaded, chunk_tokens=1, rows_per_block=6, prompts_per_group=4)
    assert asked == [True] * 5  # with the pass that finds the layers
    assert offloaded.model.layers[1].self_attn.q_proj.weight.is_meta


def test_nothing_is_held_after_an_exception(monkeypatch):
    offloaded = off_cpu(build())

    def fail(*_args, **_kwargs):
        raise RuntimeError("broken")

    hooked = [m._hf_hook for m in offloaded.modules() if "_hf_hook" in m.__dict__]
    before = [(hook, hook.offload) for hook in hooked]
    with monkeypatch.context() as patch:
        for name in ("segment_attention", "cpp_attention"):
            patch.setattr(f"shipsfast.ops.tree_attention.{name}", fail)
        with pytest.raises(RuntimeError, match="broken"):
            scan(offloaded)
    assert all(p.is_meta for p in offloaded.parameters())
    assert before == [
        (m._hf_hook, m._hf_hook.offload) for m in offloaded.modules() if "_hf_hook" in m.__dict__
    ]
    assert np.array_equal(scan(offloaded).kl, scan(build()).kl)


def test_a_run_continues_where_the_weights_are_elsewhere(tmp_path):
    done = scan(build(), out=tmp_path / "run")
    found = scan(off_cpu(build()), out=tmp_path / "run")
    assert np.array_equal(found.kl, done.kl) and found.record["weights"] == "memory"  # it was complete


def test_another_model_is_told_by_its_offloaded_weights():
    assert fingerprint(off_cpu(build())) != fingerprint(off_cpu(build(seed=1)))


def test_ablate_and_transformers_generate():
    model, offloaded = build(), off_cpu(build())
    ids = torch.tensor([PROMPTS[0]])
    texts = []
    for each in (model, offloaded):
        with shipsfast.ablate(each, [(1, 2), (2, None)]), torch.no_grad():
            texts.append((each(ids).logits, each.generate(ids, max_new_tokens=4, do_sample=False)))
    assert torch.equal(texts[0][0], texts[1][0]) and torch.equal(texts[0][1], texts[1][1])
    with pytest.raises(shipsfast.UnsupportedModelError, match="are offloaded.*model.generate inside"):
        shipsfast.generate(offloaded, PROMPTS, None, groups=[[]], max_new_tokens=2, progress=False)


def test_refused_by_name():
    meta = build()
    meta.model.layers[1].mlp.to("meta")
    with pytest.raises(shipsfast.UnsupportedModelError, match="no weights for model.layers.1.mlp"):
        scan(meta)
    hooked = build()
    add_hook_to_module(hooked.model.layers[0], CpuOffload(execution_device=torch.device("cpu")))
    with pytest.raises(shipsfast.UnsupportedModelError, match="accelerate's CpuOffload"):
        scan(hooked)


def test_not_a_layer_more_than_two(tmp_path):
    offloaded = on_disk(build(), tmp_path)
    most = []
    pre = AlignDevicesHook.pre_forward

    def pre_forward(self, module, *args, **kwargs):
        out = pre(self, module, *args, **kwargs)
        most.append(sum(any(not p.is_meta for p in x.parameters()) for x in offloaded.model.layers))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
        scan(offloaded, chunk_tokens=10)
    assert max(most) == 2 and LAYERS > 2
