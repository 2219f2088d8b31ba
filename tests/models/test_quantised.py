"""Quantised models: the scan runs through their modules as they are, against one plain pass for each score."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.models.fingerprint import fingerprint
from shipsfast.models.int8_products import _overflows
from tests.support import family_oracle
from tests.support.checkpoints import save
from tests.support.models import _GQA, build
from tests.support.numerics import assert_close_abs

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 40]]
NEW = 5


def full(dtype: torch.dtype):
    """As wide as the blocks that 4-bit formats share a scale in."""
    torch.manual_seed(0)
    config = LlamaConfig(**(_GQA | dict(hidden_size=64, intermediate_size=128)))
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def by_bitsandbytes(folder, dtype: torch.dtype, **how):
    pytest.importorskip("bitsandbytes")
    if how.get("load_in_8bit") and _overflows("bitsandbytes"):
        pytest.skip("int8 products overflow on this processor: such models are refused")
    save(full(torch.float32), folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**how), device_map="cpu", dtype=dtype
    )


def by_hqq(_folder, dtype: torch.dtype, nbits: int):
    hqq = pytest.importorskip("hqq.models.hf.base")
    from hqq.core.quantize import BaseQuantizeConfig

    model = full(dtype)
    hqq.AutoHQQHFModel.quantize_model(
        model, BaseQuantizeConfig(nbits=nbits, group_size=64), compute_dtype=dtype, device="cpu"
    )
    return model


def by_quanto(folder, dtype: torch.dtype):
    pytest.importorskip("optimum.quanto")
    save(full(torch.float32), folder)
    config = transformers.QuantoConfig(weights="int8")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=dtype
    )


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
MADE = {
    "bitsandbytes nf4": (by_bitsandbytes, NF4),
    "bitsandbytes nf4, twice": (by_bitsandbytes, NF4 | dict(bnb_4bit_use_double_quant=True)),
    "bitsandbytes fp4": (by_bitsandbytes, NF4 | dict(bnb_4bit_quant_type="fp4")),
    "bitsandbytes int8, rows alone": (by_bitsandbytes, dict(load_in_8bit=True, llm_int8_threshold=0.0)),
    "hqq 4 bit": (by_hqq, dict(nbits=4)),
    "hqq 8 bit": (by_hqq, dict(nbits=8)),
    "quanto int8": (by_quanto, {}),
}


@pytest.mark.parametrize("name", MADE)
def test_other_libraries_against_brute_force_on_the_same_model(name, tmp_path):
    make, how = MADE[name]
    model = make(tmp_path, torch.float32, **how)
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    expected = family_oracle.ships(model, PROMPTS)
    unquantised = family_oracle.ships(full(torch.float32), PROMPTS)
    assert (expected - unquantised).abs().max() > 1e-4, "quantisation does not show"
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert result.record["packing_noise"] < 1e-9 and result.error.reason == "its layers are quantised"
    assert result.record["layers_why"].startswith("self_attn.q_proj is")
    # On processors with bfloat16 products bitsandbytes' 4-bit layers use those, whatever the model's dtype.
    weight = getattr(model.model.layers[0].self_attn.q_proj, "weight", None)
    state = getattr(weight, "quant_state", None)
    # Its int8 layers round what goes in, to float16 and then to int8: inputs that differ by 6e-7 were seen to move a score by
    # 0.0095, and on some processors one value is next to a border.
    steps = getattr(state, "packing_format_for_cpu", False) or "int8" in name
    assert_close_abs(result.kl, expected, 0.02 if steps else 2e-5)
    texts = shipsfast.generate(
        model, PROMPTS, groups=[[(0, 1)]], max_new_tokens=NEW, eos_token_id=[], progress=False
    )
    assert texts == [[family_oracle.greedy(model, ids, [(0, 1)], NEW) for ids in PROMPTS]]


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "bitsandbytes int8, rows alone"])
def test_the_model_says_the_same_afterwards(name, tmp_path):
    """A state dict of bitsandbytes' 4-bit layers repacks their weights, with other scales on some processors."""
    make, how = MADE[name]
    model, ids = make(tmp_path, torch.float32, **how), torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        before = model(ids).logits
    first = shipsfast.scan(model, PROMPTS, progress=False)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    again = shipsfast.scan(model, PROMPTS, progress=False)
    assert np.array_equal(again.kl, first.kl) and again.identity == first.identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_bitsandbytes_quantises_together(dtype, tmp_path):
    """LLM.int8 keeps in 16 bits the columns that are large in any token of a product: what a model says of a prompt
    depends on what runs beside it, by more than rounding. The noise floor has it."""
    model = by_bitsandbytes(tmp_path, dtype, load_in_8bit=True, llm_int8_threshold=2.0)
    alone, beside = torch.tensor(PROMPTS[:1]), torch.tensor([PROMPTS[0], [9, 10, 11, 12]])
    with torch.no_grad():
        assert (model(alone).logits - model(beside).logits[:1]).abs().max() > 1e-3
    result = shipsfast.scan(model, PROMPTS, progress=False)
    expected = family_oracle.ships(model, PROMPTS).numpy()
    assert result.noise_floor > 1e-6
    assert (np.abs(result.kl - expected) <= 0.02 + 0.1 * expected).all()
    angles = shipsfast.scan_dataset(model, PROMPTS, progress=False)
    assert np.isfinite(angles.angle_deg).all() and angles.noise_floor > 0


WITHOUT_VNNI = """
import sys, torch, shipsfast
from pathlib import Path
from tests.models.test_quantised import PROMPTS, full
from tests.support.checkpoints import save
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
save(full(torch.float32), Path(sys.argv[1]))
how = dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu", dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **how)
ones = torch.full((32, 32), 127, dtype=torch.int8)
right = bool((torch.ops.bitsandbytes.int8_linear_matmul(ones, ones) == 32 * 127 * 127).all())
for call in (lambda: shipsfast.scan(model, PROMPTS, progress=False), lambda: shipsfast.ablate(model, []).__enter__()):
    try:
        call()
        assert right, "wrong products, and no word of it"
    except shipsfast.UnsupportedModelError as error:
        assert not right and "model.layers.0.self_attn.q_proj (Linear8bitLt) multiplies int8 by int8" in str(error), error
"""


def test_int8_products_that_overflow_are_refused(tmp_path):
    """As on processors without VNNI, where oneDNN adds pairs of products in 16 bits."""
    pytest.importorskip("bitsandbytes")
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI, str(tmp_path)],
        env=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torchao_int8_against_brute_force_on_the_same_model(dtype):
    """The quantised layers run as they are: the same products of the same int8 weights."""
    quantization = pytest.importorskip("torchao.quantization")
    model = build(dtype=dtype)
    full = family_oracle.ships(model, PROMPTS)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    assert type(weight) is not torch.Tensor
    expected = family_oracle.ships(model, PROMPTS)
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert "weight" in result.record["layers_why"] or dtype == torch.bfloat16
    # Rounding of the dtype; in bfloat16 the oracle, which softmaxes in it, rounds as much as the scan.
    assert_close_abs(result.kl, expected, 2e-5 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        assert (expected - full).abs().max() > 1e-4, "quantisation does not show"
    one = shipsfast.generate(model, PROMPTS[:1], max_new_tokens=2, eos_token_id=[], progress=False)
    assert len(one[0][0]) == 2


class PackedLinear(torch.nn.Module):
    """As GPTQ and AWQ layers are built: no nn.Linear, no parameter, packed integers and scales in buffers."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales).t()


@pytest.mark.parametrize("kind", ["undifferentiated", "mean"])
def test_layers_whose_weights_are_packed_in_buffers(kind):
    model = build()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, PackedLinear(module))
    result = shipsfast.scan(model, PROMPTS, ablation=kind, progress=False)
    assert result.record["spot_check_max_abs"] < 1e-12
    if kind == "undifferentiated":
        assert_close_abs(result.kl, family_oracle.ships(model, PROMPTS), 1e-12)
    texts = shipsfast.generate(
        model, PROMPTS, groups=[[(0, 1)]], max_new_tokens=NEW, eos_token_id=[], progress=False
    )
    assert texts == [[family_oracle.greedy(model, ids, [(0, 1)], NEW) for ids in PROMPTS]]


def test_the_fingerprint_sees_into_quantised_weights():
    quantization = pytest.importorskip("torchao.quantization")
    prints = []
    for seed in (0, 0, 1):
        model = build(dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += seed
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]
