"""FLOP counts, against counts by hand and against torch's own counter on a real pass."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import shipsfast
from shipsfast.engine import flops as flops_module
from shipsfast.engine import fused_layer
from shipsfast.engine.flops import gated_model_flops, gemm_flops_per_s, model_flops, scan_flops
from shipsfast.models.anatomy import inspect_model
from shipsfast.ops.prefix_tree import pack
from tests.support.models import HEADS, LAYERS, build

PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 9], [8, 9, 10, 11]]
UNITS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
FAMILIES = [
    "llama-mha",
    "llama-gqa",
    "mistral-window",
    "qwen3-qknorm",
    "gemma2-softcap-window",
    "gpt2",
    "opt",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_cost_what_a_counted_pass_costs(family):
    model = build(family, torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    costs = model_flops(model, inspect_model(model, [3, 4], 40))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(ids, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    per_token = sum(x.keys_values + x.rest for x in costs.layers) + costs.head
    dense_attention = sum(x.per_key for x in costs.layers) * 16
    # Weights, and attention as eager computes it: every pair. What is over is rotary tables.
    assert sum(counted.values()) == pytest.approx(4 * per_token + dense_attention, rel=0.01)


def test_a_shape_costs_what_its_model_costs():
    model = build("llama-gqa")
    config, costs = model.config, model_flops(model, inspect_model(model, [3, 4], 40))
    shape = gated_model_flops(
        layers=LAYERS, hidden=config.hidden_size, heads=HEADS, kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // HEADS, intermediate=config.intermediate_size, vocabulary=config.vocab_size,
    )  # fmt: skip
    assert (shape.layers, shape.head) == (costs.layers, costs.head)
    assert sorted(shape.products) == sorted(costs.products)


def test_experts_count_as_often_as_a_token_takes_them():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    costs = model_flops(model, inspect_model(model, [3, 4], 40))
    attention, experts, router = 32 * (32 + 16 + 16 + 32), 2 * 3 * 32 * 48, 4 * 32
    assert costs.layers[0].keys_values + costs.layers[0].rest == 2 * (attention + experts + router)


def test_a_scan_by_hand():
    costs = gated_model_flops(
        layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=12, vocabulary=20, windows=[3, None]
    )
    packed = pack([[1, 2, 3, 4], [1, 2, 5]])  # 5 nodes at depths 0 1 2 3 2, ends at depths 3 and 2
    key_value, rest = 2 * 2 * 8 * 4, 2 * (2 * 8 * 8 + 3 * 8 * 12)
    units = [(0, 0), (0, 1), (1, 0)]
    first = 3 * (5 * (key_value + rest) + 4 * 8 * (1 + 2 + 3 + 3 + 3))
    last = 4 * (5 * key_value + 2 * rest + 4 * 8 * (4 + 3))
    assert scan_flops(costs, [packed], units) == first + last + 4 * 2 * 2 * 8 * 20
    assert scan_flops(costs, [packed], units, head=False) == first + last
    assert scan_flops(costs, [packed, packed], units, head=False) == 2 * (first + last)


def test_every_block_has_the_unablated_row_again():
    model = build("llama-gqa")
    costs = model_flops(model, inspect_model(model, [3, 4], 40))
    once = scan_flops(costs, [pack(PROMPTS)], [])
    whole = scan_flops(costs, [pack(PROMPTS)], UNITS)
    assert (
        scan_flops(costs, [pack(PROMPTS)], UNITS, blocks=[UNITS[:5], UNITS[5:10], UNITS[10:]])
        == whole + 2 * once
    )


@pytest.mark.parametrize("family", ["llama-mha", "qwen3-qknorm"])
def test_a_scan_does_as_much_as_its_count(family, monkeypatch):
    """Counted by torch while it runs. What a scan does beyond: the look at the model, and its checks of itself. That of the
    untouched model is left out: to its few tokens these prompts are none too many."""
    monkeypatch.setattr("shipsfast.engine.subject.check_own_forward", lambda *_: None)
    model = build(family, torch.float32)
    costs = model_flops(model, inspect_model(model, [3, 4], 40))
    with FlopCounterMode(display=False) as counter:
        shipsfast.scan(model, PROMPTS, progress=False, layers="model", backend="reference", rescored=0)
    counted = sum(counter.get_flop_counts()["Global"].values())
    expected = scan_flops(costs, [pack(PROMPTS)], UNITS)
    assert expected <= counted <= 1.6 * expected


SMALL = dict(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LONG = [[3, 4, 5, 6, *range(7 + i, 17 + i)] for i in range(4)]


@pytest.mark.parametrize(
    ("config", "prompts", "unit", "by_rank"),
    [
        (LlamaConfig, LONG, "head", 2),  # in all layers but the last, where 4 ends are read
        (LlamaConfig, LONG, "kv_group", 2),
        (LlamaConfig, PROMPTS[:1], "head", 0),  # too few tokens
        (Gemma2Config, LONG, "head", 2),
    ],
)
def test_fused_layers_do_exactly_what_is_counted(config, prompts, unit, by_rank, monkeypatch):
    """Of many heads less of one, so that the look at the model and the checks, which are the same, fall out. Attention is
    one operation, of which the counter knows nothing."""
    torch.manual_seed(0)
    how = {"attn_implementation": "eager"} if config is Gemma2Config else {}
    model = AutoModelForCausalLM.from_config(config(**SMALL), dtype=torch.float32, **how).eval()
    taken = []
    monkeypatch.setattr(
        "shipsfast.scans.ships._spot_check", lambda _work: None
    )  # of more heads where there are more
    pays = fused_layer.pays
    monkeypatch.setattr(fused_layer, "pays", lambda *a, **k: taken.append(pays(*a, **k)) or taken[-1])
    unknown = {  # to torch's counter
        torch.ops.mkl._mkl_linear: lambda x, _packed, weight, *_, **__: 2 * x[0] * weight[0] * weight[1],
        torch.ops.aten.addmm_: lambda _x, a, b, **_: 2 * a[0] * a[1] * b[1],
    }

    def counted(units):
        with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
            record = shipsfast.scan(model, prompts, progress=False, heads=units, unit=unit, rescored=0).record
        assert record["layers"] == "fused"
        return sum(counter.get_flop_counts()["Global"].values())

    each = 2 if unit == "kv_group" else 1
    units = [(layer, index) for layer in range(3) for index in range(4 // each)]
    costs = model_flops(model, inspect_model(model, [3, 4], 40), fused=True, unit_heads=each)
    costs = replace(costs, layers=tuple(replace(layer, per_key=0) for layer in costs.layers))
    packs = [pack(prompts)]
    taken.clear()
    many = counted(units)
    assert sum(taken) == by_rank and len(taken) == 3
    # One of the last layer, which is looked at by the checks in both.
    found, expected = (
        many - counted(units[-1:]),
        scan_flops(costs, packs, units) - scan_flops(costs, packs, units[-1:]),
    )
    assert found == expected


def test_fused_forks_by_hand():
    """Two forks of rank 4 in each of two layers of 5 tokens, of which the last is read at 2 ends: rank 4 does not pay there."""
    costs = gated_model_flops(
        layers=2, hidden=32, heads=8, kv_heads=2, head_dim=4, intermediate=20, vocabulary=30, fused=True
    )
    packed = pack([[1, 2, 3, 4], [1, 2, 5]])
    key_value, rest = 2 * 2 * 32 * 8, 2 * (2 * 32 * 32 + 3 * 32 * 20)
    # The base row, and its attention once more with all heads off; out, gate and up with M, down of each fork.
    first = 5 * (key_value + rest) + 2 * 4 * 32 * (1 + 2 + 3 + 4 + 3)
    first += 2 * 2 * (5 * 32 * 4 + 4 * (32 + 5) * 40 + 5 * 20 * 32)
    last = 3 * (5 * key_value + 2 * rest + 4 * 32 * (4 + 3)) + 4 * 32 * (4 + 3)
    last += 2 * 2 * (2 * 32 * 4 + 2 * 32 * 40 + 2 * 20 * 32)
    units = [(0, 0), (0, 1), (1, 0), (1, 3)]
    assert scan_flops(costs, [packed], units, head=False) == first + last


def test_no_attention_more_where_nothing_forks():
    costs = gated_model_flops(
        layers=2, hidden=32, heads=8, kv_heads=2, head_dim=4, intermediate=20, vocabulary=30, fused=True
    )
    own = replace(costs, layers=tuple(replace(layer, forks=None) for layer in costs.layers))
    packed = pack([[1, 2, 3, 4], [1, 2, 5]])
    assert scan_flops(costs, [packed], []) == scan_flops(own, [packed], [])
    # A fork in the first layer alone: the second is passed by both rows as by any.
    first = scan_flops(costs, [packed], [(0, 0)], head=False) - scan_flops(costs, [packed], [], head=False)
    second = scan_flops(own, [packed], [(0, 0)], head=False) - scan_flops(own, [packed], [], head=False)
    layer = own.layers[0]
    whole = 5 * (layer.keys_values + layer.rest) + layer.per_key * 13
    assert second - whole == first - (costs.layers[0].forks.flops(5, 1) + layer.per_key * 13)


def test_a_rate_is_measured():
    assert gemm_flops_per_s([(64, 96), (96, 64)], 32, dtype=torch.float32, device="cpu", repeats=1) > 1e6


def test_a_sustained_rate_is_that_of_the_second_half(monkeypatch):
    """A device that takes 1 s for a layer while it is cool, and 2 s after three of them."""
    clock = {"now": 0.0, "layers": 0}

    def linear(x, weight):
        clock["layers"] += 1
        clock["now"] += 1.0 if clock["layers"] <= 3 else 2.0

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(flops_module.time, "perf_counter", lambda: clock["now"])
    measure = lambda **how: gemm_flops_per_s([(3, 5)], 7, dtype=torch.float32, device="cpu", **how)
    assert measure(seconds=12.0) == pytest.approx(2 * 7 * 15 / 2.0)
    assert clock["now"] >= 12.0
    clock |= {"now": 0.0, "layers": -100}
    assert measure(repeats=3) == pytest.approx(2 * 7 * 15 / 1.0)
    assert clock["layers"] == -100 + 2 + 4
