"""The sink mass of heads against its definition: attention written out, one prompt a pass, in float64."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import shipsfast
from shipsfast.models.loading import load_model
from shipsfast.results.sink_mass import SinkMass
from tests.support.checkpoints import device_map, load_offloaded, save
from tests.support.models import HEADS, LAYERS, build
from tests.support.tiny_configs import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = [5, 9, 17, 23]
PROMPTS = [SHARED + [33, 8, 40, 41, 7, 12], SHARED + [7], [11, 3], SHARED, [6]]
PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "linear_attn")


def _attention(seen: list):
    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_kwargs):
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        tokens = logits.shape[-1]
        logits = logits + (logits.new_full((tokens, tokens), -torch.inf).triu(1) if mask is None else mask)
        if s_aux is not None:
            column = s_aux.reshape(1, -1, 1, 1).to(logits.dtype).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, column], -1)
        weights = torch.softmax(logits, -1)
        out = weights[..., :tokens] @ value
        seen.append((module, weights[0], out[0]))
        return out.transpose(1, 2).contiguous(), None

    return attention


@contextlib.contextmanager
def attention_by_definition(model, seen: list):
    AttentionInterface.register("sinks_by_definition", _attention(seen))
    AttentionMaskInterface.register("sinks_by_definition", eager_mask)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config in configs:
        config._attn_implementation_internal = "sinks_by_definition"
    yield
    for config, name in before:
        config._attn_implementation_internal = name


def projected(module, out: torch.Tensor) -> torch.Tensor:
    """Norms [H, T] of W_o o_h for the outputs [H, T, D] of the heads of one attention module."""
    layer = next(getattr(module, name) for name in PROJECTIONS if hasattr(module, name))
    weight = layer.weight if type(layer) is torch.nn.Linear else layer.weight.t()  # [hidden, H D]
    slices = weight.unflatten(1, (len(out), -1))  # [hidden, H, D]
    return torch.einsum("htd,ohd->hto", out, slices).norm(dim=-1)


@torch.no_grad()
def by_definition(model, prompts) -> dict[str, np.ndarray]:
    found: dict[str, list] = {name: [] for name in SinkMass.numbers() if name != "output_spread"}
    outputs = []  # of each prompt [L, H, T - 1, D]
    for ids in prompts:
        if len(ids) < 2:
            continue
        seen: list = []
        with attention_by_definition(model, seen):
            model(input_ids=torch.tensor([ids]), use_cache=False)
        tokens = len(ids)
        first = torch.stack([weights[:, :, 0] for _, weights, _ in seen])  # [L, H, T]
        found["first_token"].append(first[..., 1:].mean(-1))
        found["first_token_at_end"].append(first[..., -1])
        sinks = [weights[:, 1:, tokens:].sum(-1).mean(-1) for _, weights, _ in seen]
        found["learned_sink"].append(torch.stack(sinks))
        norms = torch.stack([out.norm(dim=-1) for *_, out in seen])
        outputs.append(torch.stack([out[:, 1:] for *_, out in seen]))
        found["output_norm"].append(norms[..., 1:].mean(-1))
        wrote = torch.stack([projected(module, out) for module, _, out in seen])
        found["residual_norm"].append(wrote[..., 1:].mean(-1))
    mean = torch.stack([out.mean(2) for out in outputs]).mean(0)[:, :, None]
    squares = [(out - mean).square().sum(-1).mean(-1) for out in outputs]
    spread = {"output_spread": torch.stack(squares).mean(0).sqrt().numpy()}
    return spread | {name: torch.stack(each).mean(0).numpy() for name, each in found.items()}


def check(model, unknown=(), prompts=PROMPTS, **how) -> SinkMass:
    got, expected = shipsfast.sink_mass(model, prompts, **how), by_definition(model, prompts)
    for name in SinkMass.numbers():
        if name in unknown:
            assert np.isnan(getattr(got, name)).all()
        else:
            np.testing.assert_allclose(
                getattr(got, name), expected[name], rtol=1e-12, atol=1e-12, err_msg=name
            )
    return got


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    "family",
    ["llama-gqa", "llama-mqa", "mistral-window", "qwen3-qknorm", "gemma2-softcap-window", "phi3-fused-window", "gpt2", "opt"],
)  # fmt: skip
def test_equals_its_definition(family, backend):
    got = check(build(family), backend=backend)
    assert got.first_token.shape == (LAYERS, HEADS) and got.prompts == 4
    assert (got.learned_sink == 0).all()


def test_a_window_hides_the_first_token():
    model = build("mistral-window")  # of 4 tokens
    got = shipsfast.sink_mass(model, [[5, 9, 17, 23, 33, 8]])
    assert (got.first_token_at_end == 0).all() and (got.first_token > 0).all()


@pytest.mark.parametrize("family", ["gpt_oss", "bamba", "jamba", "lfm2", "mixtral"])
def test_sinks_mixtures_and_hybrids(family):
    got = check(tiny_model(family))
    if family == "gpt_oss":
        assert got.learned_sink.min() > 0.01


def test_a_gate_before_the_projection_leaves_the_residual_norm_unknown():
    check(tiny_model("qwen3_next"), unknown=("residual_norm",))


def test_a_norm_before_the_projection_does_too():
    check(tiny_model("bitnet"), unknown=("residual_norm",))


def test_packs_of_any_size(monkeypatch):
    model = build()
    whole = shipsfast.sink_mass(model, PROMPTS)
    monkeypatch.setattr("shipsfast.engine.replacement_values.MEAN_TOKENS", 1)
    single = shipsfast.sink_mass(model, PROMPTS)
    for name in SinkMass.numbers():
        np.testing.assert_allclose(getattr(single, name), getattr(whole, name), rtol=1e-12)


def test_groups_are_means_of_their_heads():
    model = build("llama-gqa")
    heads, groups = shipsfast.sink_mass(model, PROMPTS), shipsfast.sink_mass(model, PROMPTS, unit="kv_group")
    for name in SinkMass.numbers():
        expected = getattr(heads, name).reshape(LAYERS, 2, 2).mean(-1)
        np.testing.assert_allclose(getattr(groups, name), expected, rtol=1e-14)
    assert groups.unit == "kv_group" and "kv_groups" in repr(groups)


def test_the_model_is_left_alone_and_single_tokens_are_refused():
    model = build()
    before = {name: module.__dict__.keys() for name, module in model.named_modules()}
    shipsfast.sink_mass(model, PROMPTS)
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == before
    with pytest.raises(shipsfast.InputError, match="no prompt has more than one token"):
        shipsfast.sink_mass(model, [[5], [6]])


def test_table_and_json():
    found = shipsfast.sink_mass(build(), PROMPTS)
    frame = found.to_pandas()
    assert list(frame.columns) == ["layer", "head", *SinkMass.numbers()] and len(frame) == LAYERS * HEADS
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    assert row.first_token == found.first_token[2, 1] == found.of(2, 1)["first_token"]
    again = SinkMass.from_json(found.to_json())
    for name in SinkMass.numbers():
        assert np.array_equal(getattr(again, name), getattr(found, name))
    with pytest.raises(shipsfast.InputError, match="sink mass"):
        SinkMass.from_json({"first_token": [[1.0]]})


def test_heads_that_give_the_same_everywhere_do_not_vary():
    found = shipsfast.sink_mass(build(), [[5] * 6, [5] * 3])  # values of the first layer are all alike
    assert found.output_norm[0].min() > 0.1 and found.varies[0].max() < 1e-7
    assert shipsfast.sink_mass(build(), PROMPTS).varies.min() > 0.1
    assert found.at_rest.dtype == bool and not found.at_rest.any()


@pytest.mark.parametrize("how", ["streamed", "offloaded"])
def test_weights_that_come_as_their_layer_runs(how, tmp_path):
    model = build()
    expected, folder = shipsfast.sink_mass(model, PROMPTS), save(model, tmp_path)
    if how == "streamed":
        other = load_model(str(folder), dtype="float64", stream=True)
    else:
        other = load_offloaded(folder, device_map(model, "disk"), dtype=model.dtype)
    found = shipsfast.sink_mass(other, PROMPTS)
    for name in SinkMass.numbers():
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-14)
