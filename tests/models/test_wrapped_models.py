"""Models that are wrapped, quantised, in another precision or of another build: the scan, `ablate` and `generate`."""

from __future__ import annotations

import pytest
import torch

import shipsfast
from tests.support import family_oracle
from tests.support.model_state import assert_same, state
from tests.support.models import build
from tests.support.numerics import assert_close_abs
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 17, 23, 33, 8, 40], [5, 9, 17, 7], [5, 9, 17, 23, 33, 11, 50, 51, 52]]
GROUPS = [[], [(0, 1)], [(0, 0), (0, 3)]]
NEW = 6


def lora(model):
    """With adapters that matter, and another one that is loaded and not active."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.add_adapter("idle", config)
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.to(model.dtype).eval()


def test_lora_is_scanned_in_force_and_left_as_it_was():
    plain = family_oracle.ships(build(), PROMPTS)
    wrapped = lora(build())
    before, expected = state(wrapped), family_oracle.ships(wrapped.get_base_model(), PROMPTS)
    assert (expected - plain).abs().max() > 1e-3, "the adapter does not show"
    result = shipsfast.scan(wrapped, PROMPTS, progress=False)
    assert_close_abs(result.kl, expected, 1e-12)
    assert result.record["layers"] == "model" and result.record["model"]["class"] == "LlamaForCausalLM"
    assert_same(before, state(wrapped))
    assert wrapped.active_adapters == ["default"]


def test_lora_in_ablate_and_generate():
    wrapped = lora(build())
    base, heads = wrapped.get_base_model(), [(0, 1), (2, 3)]
    expected = family_oracle.next_log_probs(base, PROMPTS[0], heads)
    with shipsfast.ablate(wrapped, heads):
        got = torch.log_softmax(wrapped(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1], -1)
    assert_close_abs(got.detach(), expected, 1e-12)
    texts = shipsfast.generate(
        wrapped, PROMPTS, groups=[[], heads], max_new_tokens=NEW, eos_token_id=[], progress=False
    )
    assert texts == [
        [family_oracle.greedy(base, ids, group, NEW) for ids in PROMPTS] for group in ([], heads)
    ]


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(shipsfast.UnsupportedModelError, match="learned tokens before the prompt"):
        shipsfast.scan(peft.get_peft_model(build(dtype=torch.float32), config), PROMPTS, progress=False)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("family", ["gpt_oss", "lfm2", "mixtral"])
def test_precisions(family, dtype):
    """Experts on the grouped products that float64 has not; half precision ranks as float64 does, within its noise."""
    model = tiny_model(family, dtype)
    if family != "lfm2":
        model.set_experts_implementation("grouped_mm")
    got = torch.as_tensor(shipsfast.scan(model, PROMPTS, progress=False).kl)
    exact = family_oracle.ships(tiny_model(family, dtype).double(), PROMPTS)
    assert torch.isfinite(got).all()
    allowed = 1e-4 if dtype == torch.float32 else 0.15
    assert ((got - exact).abs() <= allowed * (1 + exact)).all()


# Sinks; convolutions and attention; state space layers beside attention; Llama 4, whose layers look at places.
ADMITTED = [
    "gpt_oss",
    "lfm2",
    "falcon_h1",
    "qwen3_next",
    "jamba",
    "llama4_text",
    "mimo_v2_flash",
    "deepseek_v3",
]


@pytest.mark.parametrize("family", ADMITTED)
def test_generate(family):
    model = tiny_model(family)
    texts = shipsfast.generate(
        model, PROMPTS, groups=GROUPS, max_new_tokens=NEW, eos_token_id=[], progress=False
    )
    assert texts == [[family_oracle.greedy(model, ids, group, NEW) for ids in PROMPTS] for group in GROUPS]


@pytest.mark.parametrize("family", ADMITTED)
def test_ablate(family):
    model, heads = tiny_model(family), [(0, 1), (0, 2)]
    expected = family_oracle.next_log_probs(model, PROMPTS[2], heads)
    plain = family_oracle.next_log_probs(model, PROMPTS[2])
    with shipsfast.ablate(model, heads), torch.no_grad():
        got = torch.log_softmax(model(input_ids=torch.tensor([PROMPTS[2]])).logits[0, -1], -1)
    assert_close_abs(got, expected, 1e-6 if family in ("llama4_text", "mimo_v2_flash") else 1e-11)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_hybrids_keep_prompts_apart(family):
    model = tiny_model(family)
    result = shipsfast.scan(model, PROMPTS, progress=False)
    assert result.record["plan"]["prompt_groups"] == [1, 1, 1] and "side by side" in result.record["packs"]
    with pytest.raises(shipsfast.InputError, match="engine 'continuous' cannot run"):
        shipsfast.generate(model, PROMPTS, engine="continuous", max_new_tokens=NEW, progress=False)
    if family == "lfm2":
        assert result.record["model"]["layer_names"] == ["model.layers.1"]


def test_mean_ablation_of_a_hybrid_takes_means_of_whole_sequences():
    """The mean of a head's output over prompts, against passes of one prompt each."""
    from shipsfast.engine.replacement_values import mean_outputs
    from shipsfast.models.anatomy import inspect_model

    model = tiny_model("lfm2")
    anatomy = inspect_model(model, PROMPTS[0], 9)
    together = mean_outputs(model, anatomy, PROMPTS, "reference")
    apart = [mean_outputs(model, anatomy, [ids], "reference")[0] * len(ids) for ids in PROMPTS]
    assert_close_abs(together[0], sum(apart) / sum(map(len, PROMPTS)), 1e-13)


def compiled_layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled layers": compiled_layers,
    "DataParallel": torch.nn.DataParallel,
    "both": lambda m: torch.compile(torch.nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper):
    model = build()
    expected, heads = family_oracle.ships(model, PROMPTS), [(0, 1), (2, 3)]
    texts = shipsfast.generate(model, PROMPTS, groups=[heads], max_new_tokens=3, progress=False)
    log_probs = family_oracle.next_log_probs(model, PROMPTS[0], heads)
    wrapped = WRAPPERS[wrapper](model)
    assert_close_abs(shipsfast.scan(wrapped, PROMPTS, progress=False).kl, expected, 1e-12)
    assert shipsfast.generate(wrapped, PROMPTS, groups=[heads], max_new_tokens=3, progress=False) == texts
    with shipsfast.ablate(wrapped, heads), torch.no_grad():
        got = torch.log_softmax(wrapped(torch.tensor(PROMPTS[:1])).logits[0, -1], -1)
    assert_close_abs(got, log_probs, 1e-12)


def test_a_wrapper_that_copies_the_model_is_refused_by_ablate():
    wrapped = torch.nn.DataParallel(build())
    wrapped.device_ids = [0, 1]
    with pytest.raises(shipsfast.InputError, match="use its .module"), shipsfast.ablate(wrapped, [(0, 1)]):
        pass
    with shipsfast.ablate(wrapped.module, [(0, 1)]):
        pass


class Engine(torch.nn.Module):
    """Somebody's wrapper."""

    def __init__(self, model):
        super().__init__()
        self.module = model


def test_other_wrappers_are_told_what_to_pass():
    wrapped = Engine(build())
    for call in (
        lambda: shipsfast.scan(wrapped, PROMPTS, progress=False),
        lambda: shipsfast.ablate(wrapped, []).__enter__(),
        lambda: shipsfast.generate(wrapped, PROMPTS, max_new_tokens=2, progress=False),
    ):
        with pytest.raises(shipsfast.InputError, match="got Engine, which has one inside: pass its .module"):
            call()


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, as FSDP wants it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["FSDP", "fully_shard", "DistributedDataParallel"])
def test_weights_spread_over_processes(one_process, kind):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = build()
    if kind == "DistributedDataParallel":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        expected = family_oracle.ships(model, PROMPTS)
        assert_close_abs(shipsfast.scan(wrapped, PROMPTS, progress=False).kl, expected, 1e-12)
        return
    if kind == "FSDP":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for call in (
        lambda: shipsfast.scan(model, PROMPTS, progress=False),
        lambda: shipsfast.ablate(model, []).__enter__(),
    ):
        with pytest.raises(shipsfast.UnsupportedModelError, match="are spread over processes"):
            call()


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_is_refused_by_scans_and_goes_on_in_ablate():
    model = build(dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    for call in (
        lambda: shipsfast.scan(quantised, PROMPTS, progress=False),
        lambda: shipsfast.generate(quantised, PROMPTS, max_new_tokens=2, progress=False),
    ):
        with pytest.raises(
            shipsfast.UnsupportedModelError, match="q_proj of LlamaForCausalLM is dynamically"
        ):
            call()
    heads = [(0, 1), (2, 3)]
    expected = family_oracle.next_log_probs(quantised, PROMPTS[0], heads)
    with shipsfast.ablate(quantised, heads), torch.no_grad():
        got = torch.log_softmax(quantised(torch.tensor(PROMPTS[:1])).logits[0, -1].double(), -1)
    # What rounding moves over the edge of a step of 8 bits would show at 1e-3.
    assert_close_abs(got, expected, 1e-2)
    assert (expected - family_oracle.next_log_probs(quantised, PROMPTS[0])).abs().max() > 0.05
