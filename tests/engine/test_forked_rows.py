"""Gate and up of rows that fork, by rank, against the layers' own forward."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import shipsfast
from shipsfast.engine import forked_rows, fused_layer
from shipsfast.engine.measurement import ScanExecution
from shipsfast.ops.extension import extension_status
from shipsfast.ops.prefix_tree import pack
from shipsfast.scans.measurements import ShipsMeasurement
from shipsfast.scans.prepare import prepare
from tests.support.fused_models import FUSED
from tests.support.models import _GQA, HEADS, LAYERS, brute_force, build
from tests.support.numerics import assert_close_abs
from tests.support.rounding import kl_bound

pytestmark = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)
NORMS = [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Gemma2RMSNorm]
UNITS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
LONG = [[5, 9, 17, 23, *range(30, 30 + n)] for n in (8, 1, 12)] + [[7, 8, *range(20, 36)]]


def biased() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def model_of(family: str):
    return biased() if family == "biases" else build(family)


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """What was decided at each layer in which rows forked."""
    found = []
    monkeypatch.setattr(
        fused_layer, "pays", lambda *a, **k: found.append(forked_rows.pays(*a, **k)) or found[-1]
    )
    return found


@pytest.fixture
def in_float64(monkeypatch) -> list[bool]:
    """Norms that compute in the dtype they are given: those of transformers round to float32, where the ways part."""

    def forward(self, x):
        gemma = isinstance(self, Gemma2RMSNorm)
        eps = self.eps if gemma else self.variance_epsilon
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * (self.weight + gemma)

    for norm in NORMS:
        monkeypatch.setattr(norm, "forward", forward)
    monkeypatch.setattr(fused_layer, "is_patched", lambda _function: False)
    found = []

    def pays(*args, dtype, **how):
        found.append(forked_rows.pays(*args, dtype=torch.float32, **how))
        return found[-1]

    monkeypatch.setattr(fused_layer, "pays", pays)
    return found


def hidden_states(model, prompts, layers: str, **how) -> torch.Tensor:
    """What enters the output head for each unit: [1 + units, ends, hidden]."""
    prepared = prepare(model, None, ShipsMeasurement(prompts=prompts, **how), ScanExecution(layers=layers))
    assert prepared.record["layers"] == layers
    out = []
    with prepared.growing_batch(pack(prompts), lambda _steps: None) as batch:
        mask = prepared.mask(prepared.units, None, ())
        batch.run(mask, lambda _rows, x, _first: out.append(x.clone()), hidden_states=True)
    return torch.cat(out)


@pytest.mark.parametrize("family", [*FUSED, "biases"])
def test_hidden_states_in_float64(family, in_float64):
    model = model_of(family)
    expected = hidden_states(model, LONG, "model")
    found = hidden_states(model, LONG, "fused")
    assert in_float64 == [True, True, False]  # few ends are read of the last layer
    scale = float(expected.abs().max())
    assert scale > 0.5 and float((expected[1:] - expected[0]).abs().amax((1, 2)).min()) > 1e-3 * scale
    assert float((found - expected).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("options", [{}, dict(chunk_tokens=30, rows_per_block=5), dict(chunk_tokens=1)])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-qknorm", "gemma2-softcap-window", "biases"])
def test_scores_in_float64_equal_brute_force(family, options, in_float64):
    model = model_of(family)
    expected = brute_force(model, LONG, "zero")
    result = shipsfast.scan(model, LONG, ablation="zero", layers="fused", progress=False, **options)
    assert sum(in_float64) >= 2
    assert float((torch.as_tensor(result.kl) - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window"])
def test_key_value_groups_in_float64(family, in_float64):
    """Rank of two heads; on top of a group that is off, as in a search."""
    model = build(family)
    prompts = [[*range(3, 45 + i)] for i in range(2)]
    expected = hidden_states(model, prompts, "model", unit="kv_group")
    found = hidden_states(model, prompts, "fused", unit="kv_group")
    assert in_float64 == [True, True, False]
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    search = dict(group_size=3, progress=False)
    own = shipsfast.sahara(model, prompts, layers="model", **search)
    fast = shipsfast.sahara(model, prompts, layers="fused", **search)
    assert own.heads == fast.heads
    np.testing.assert_allclose(fast.angle_deg, own.angle_deg, rtol=0, atol=1e-9)


@pytest.mark.parametrize("largest", [1.5, 0.0], ids=["by rank", "in full"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "biases"])
def test_rows_of_several_ablations_in_float64(family, largest, in_float64, monkeypatch):
    monkeypatch.setattr(forked_rows, "LARGEST_SCALE", largest)
    model, kinds = model_of(family), ["zero", "undifferentiated", "head_mean_v", "mean", "scale"]
    how = dict(scale=0.3, progress=False, rescored=0)
    for cut in ({}, dict(chunk_tokens=60, rows_per_block=7)):
        found = shipsfast.scan(model, LONG, ablation=kinds, layers="fused", **how, **cut)
        assert sum(in_float64) >= 2
        for kind, one in found.by_ablation.items():
            alone = shipsfast.scan(model, LONG, ablation=kind, layers="model", **how)
            assert abs(one.kl - alone.kl).max() <= 1e-12


@pytest.mark.parametrize("family", [*FUSED, "biases"])
def test_float32_is_as_close_as_its_sums_allow(family, taken):
    model = model_of(family)
    exact, model = shipsfast.scan(model, LONG, layers="model", progress=False).kl, model.float()
    found = shipsfast.scan(model, LONG, layers="fused", progress=False)
    assert sum(taken) >= 2
    assert_close_abs(found.kl, exact, kl_bound(model, LONG, exact))


def test_a_float64_model_of_transformers_keeps_its_norms_order(taken):
    """Its norms round to float32: by rank the scores would be off by 1e-9."""
    model = build("llama-gqa")
    found = shipsfast.scan(model, LONG, layers="fused", progress=False)
    assert taken and not any(taken)
    assert float((torch.as_tensor(found.kl) - brute_force(model, LONG)).abs().max()) <= 1e-12


def test_rows_that_do_not_show_are_bit_equal(taken):
    """A head whose output is not read has changed nothing: its row is the base row, to the bit."""
    model = build("llama-gqa").float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 8:16] = 0
    kl = shipsfast.scan(model, LONG, layers="fused", progress=False).kl
    assert sum(taken) >= 2
    assert (kl[:, :, 1] == 0).all() and (kl[:, :, [0, 2, 3]] > 0).all()


@pytest.mark.parametrize("prompts", [LONG, [LONG[0][:7]]], ids=["by rank", "not by rank"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "biases"])
def test_a_head_that_makes_most_of_the_stream_is_computed_in_full(family, prompts, taken, monkeypatch):
    """Without it, what was rounded of both terms is scaled up: its scores would be off by a hundred times the bound."""
    full, ours = [], forked_rows.ForkedRows._in_full
    monkeypatch.setattr(forked_rows.ForkedRows, "_in_full", lambda *a: full.append(len(a[2])) or ours(*a))
    model = model_of(family)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] *= 300
    model = model.float()
    how = dict(ablation="zero", progress=False)
    exact = shipsfast.scan(copy.deepcopy(model).double(), prompts, layers="model", **how).kl
    for options in (dict(chunk_tokens=pack(prompts).num_tokens), {}):
        full.clear()
        found = shipsfast.scan(model, prompts, layers="fused", **how, **options)
        assert 0 < sum(full) < LAYERS * HEADS
        assert_close_abs(found.kl, exact, kl_bound(model, prompts, exact))
    assert any(taken) == (prompts is LONG)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-softcap-window", "biases"])
def test_the_last_layer_where_many_ends_are_read(family, in_float64):
    model = model_of(family)
    prompts = [[5, 9, 17, 20 + i] for i in range(24)]
    expected = hidden_states(model, prompts, "model")
    found = hidden_states(model, prompts, "fused")
    assert in_float64 == [True, True, True]
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_an_extension_of_an_older_version_is_told(monkeypatch):
    """One that has all but the newest operation."""
    known = {name: getattr(torch.ops.shipsfast, name) for name in ("gelu_mul", "tree_attention", "kl_rows")}
    monkeypatch.setattr(fused_layer.torch, "ops", SimpleNamespace(shipsfast=SimpleNamespace(**known)))
    model = build("llama-gqa").float()
    layers = list(model.model.layers)
    assert "older version" in fused_layer.why_not(layers, torch.float32, torch.device("cpu"), "cpp")


def test_when_it_pays():
    how = dict(second_norm=False, dtype=torch.bfloat16)
    # 128 more rows of M: 130 tokens would be 126 without what their own products cost.
    assert not forked_rows.pays(130, 4096, 128, 32, **how) and forked_rows.pays(133, 4096, 128, 32, **how)
    assert forked_rows.pays(1777, 4096, 128, 32, **how)
    assert not forked_rows.pays(100, 4096, 128, 32, **how)  # M takes more than it saves
    assert not forked_rows.pays(1777, 4096, 128, 1, second_norm=True, dtype=torch.bfloat16)
    assert forked_rows.pays(1777, 3584, 256, 2, second_norm=True, dtype=torch.bfloat16)
    assert not forked_rows.pays(1777, 4096, 128, 32, second_norm=False, dtype=torch.float64)
