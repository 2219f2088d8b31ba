"""The fused way through Llama-like layers against the layers' own forward."""

import functools
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import shipsfast
from shipsfast.engine.fused_layer import PACKS, loaded_bytes
from shipsfast.ops.extension import extension_status
from tests.support.fused_models import FUSED, PROMPTS
from tests.support.models import brute_force, build
from tests.support.numerics import assert_close_abs
from tests.support.rounding import kl_bound

pytestmark = pytest.mark.skipif(
    not extension_status()[0], reason=f"needs the extension: {extension_status()[1]}"
)


def scan(model, layers, **options):
    return shipsfast.scan(model, PROMPTS, progress=False, layers=layers, **options)


@pytest.mark.parametrize("ablation", ["undifferentiated", "uniform", "scale", "zero"])
@pytest.mark.parametrize("family", FUSED)
def test_float64_equals_brute_force(family, ablation):
    model = build(family)
    expected = brute_force(model, PROMPTS, ablation, 0.3)
    for options in ({}, dict(chunk_tokens=30, rows_per_block=5)):
        result = scan(model, "fused", ablation=ablation, scale=0.3, **options)
        assert result.record["layers"] == "fused"
        assert (torch.as_tensor(result.kl) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("family", FUSED)
def test_float32_is_as_close_as_its_sums_allow(family):
    exact, model = scan(build(family), "model").kl, build(family).float()
    for layers in ("model", "fused"):
        assert_close_abs(scan(model, layers).kl, exact, kl_bound(model, PROMPTS, exact))


def test_biases_are_added():
    """Attention biases everywhere, which Llama checkpoints may have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.models import _GQA

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_GQA, attention_bias=True)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert abs(scan(model, "fused").kl - scan(model, "model").kl).max() < 1e-12


def test_a_model_once_asked_for_hidden_states_keeps_the_fast_way():
    model = build("llama-gqa").float()
    before = shipsfast.scan(model, PROMPTS, progress=False)
    model(torch.tensor([PROMPTS[0]]), output_hidden_states=True, output_attentions=True)  # leaves hooks
    after = shipsfast.scan(model, PROMPTS, progress=False)
    assert before.record["layers"] == after.record["layers"] == "fused"
    assert "layers_why" not in after.record
    np.testing.assert_array_equal(before.kl, after.kl)


@pytest.mark.parametrize("reason", ["family", "hooks", "linear"])
def test_what_it_cannot_do_goes_through_the_model(reason):
    model = build("gpt2" if reason == "family" else "llama-gqa", dtype=torch.float32)
    if reason == "hooks":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    elif reason == "linear":
        model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    record = scan(model, "auto").record
    assert record["layers"] == "model" and record["layers_why"]
    with pytest.raises(shipsfast.InputError, match=r"layers 'fused' \(--layers\) cannot run"):
        scan(model, "fused")


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive and were made inside, now and at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if self._counts(x)}
        for x in tree_iter(out):
            if not self._counts(x):
                continue
            storage = x.untyped_storage()
            if storage._cdata in given or storage._cdata in self._known:
                continue
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)
        return out

    @staticmethod
    def _counts(x) -> bool:
        return isinstance(x, torch.Tensor) and not x.is_mkldnn  # what MKL packs is opaque

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@pytest.mark.parametrize("per_chunk", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_chunk_stays_within_the_plan(family, per_chunk):
    """Wide MLPs, as in Llama 3.1; the base row passes with the forks and must not make their chunk larger."""
    config = LlamaConfig if family == "llama" else Gemma2Config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    prompts = [[3 + i % 50 for i in range(j, j + 100)] for j in range(3)]
    tokens = 300
    with Live() as live:
        result = shipsfast.scan(
            model, prompts, layers="fused", chunk_tokens=per_chunk * tokens, heads=[(0, None), (1, 2)], progress=False,
            rescored=0,
        )  # fmt: skip
    packed = (
        loaded_bytes(model.model.layers[0], torch.float32, torch.device("cpu"))
        // 2
        * (torch.float32 in PACKS)
    )  # which is not seen here
    predicted = result.record["plan"]["predicted_bytes"] - packed
    assert result.record["plan"]["prompt_groups"] == [3] and result.record["plan"]["rows_per_block"] == 5
    assert 0.5 * predicted < live.peak <= predicted


def test_unknown_way_is_refused():
    with pytest.raises(shipsfast.InputError, match="unknown layers 'quick'"):
        scan(build(), "quick")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", [2, 6, 16, 34, 640])
def test_ops_against_torch(dtype, size):
    gen = torch.Generator().manual_seed(size)
    x = torch.randn(3, 5, size, generator=gen).to(dtype)
    weight = torch.randn(size, generator=gen).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps

    wide = x.double()
    normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    for offset in (0.0, 1.0):
        expected = (offset + weight.double()) * normed
        out = torch.full_like(x, float("nan"))
        torch.ops.shipsfast.rms_norm(x, weight, 1e-6, offset, out)
        assert ((out - expected).abs() <= tolerance * (1 + expected.abs())).all()
        out = x.clone()
        torch.ops.shipsfast.add_rms_norm_(out, x, weight, 1e-6, offset)
        assert ((out - expected - wide).abs() <= tolerance * (1 + expected.abs() + wide.abs())).all()

    gate, up = (
        30 * torch.randn(7, size, generator=gen).to(dtype),
        torch.randn(7, size, generator=gen).to(dtype),
    )
    gate[0, 0], gate[1, 0] = -200, 200
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    for op, act in (("silu_mul", torch.nn.functional.silu), ("gelu_mul", gelu)):
        expected = act(gate.double()) * up.double()
        inner = torch.full_like(gate, float("nan"))
        getattr(torch.ops.shipsfast, op)(torch.cat([gate, up], 1), inner)
        assert ((inner - expected).abs() <= tolerance * (1 + expected.abs())).all(), op

    q = torch.randn(2, 5, 3, size, generator=gen).to(dtype)
    cos, sin = torch.randn(5, size, generator=gen).to(dtype), torch.randn(5, size, generator=gen).to(dtype)
    wider = torch.cat([q.flatten(2), torch.full((2, 5, 7), float("nan"), dtype=dtype)], 2)
    normed = q.double() * (q.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    for norm_weight, head in ((weight[:0], q.double()), (weight, normed)):
        low, high = head.chunk(2, -1)
        expected = head * cos[:, None].double() + torch.cat([-high, low], -1) * sin[:, None].double()
        for x in (q, wider[:, :, : 3 * size].unflatten(2, (3, size))):
            out = torch.full_like(q, float("nan"))
            torch.ops.shipsfast.rope(x, cos, sin, norm_weight, 1e-6, out)
            assert ((out - expected).abs() <= tolerance * (1 + expected.abs() + head.abs())).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ops.shipsfast.rms_norm(x, x[0, :3], 1e-6, 0.0, x),
        lambda x: torch.ops.shipsfast.rms_norm(x.t(), x[:, 0].contiguous(), 1e-6, 0.0, x),
        lambda x: torch.ops.shipsfast.add_rms_norm_(x, x.double(), x[0], 1e-6, 0.0),
        lambda x: torch.ops.shipsfast.rope(x, x, x, x[:0], 0.0, x),
        lambda x: torch.ops.shipsfast.rope(x.view(1, 2, 1, 6), x, x, x[:0], 0.0, x.view(1, 1, 2, 6)),
        lambda x: torch.ops.shipsfast.rope(x.view(1, 2, 1, 6), x, x, x[0, :5], 0.0, x.view(1, 2, 1, 6)),
        lambda x: torch.ops.shipsfast.rope(
            x.view(1, 2, 6, 1).transpose(2, 3), x, x, x[:0], 0.0, x.view(1, 2, 1, 6).transpose(1, 2)
        ),
        lambda x: torch.ops.shipsfast.gelu_mul(x, x[:1]),
        lambda x: torch.ops.shipsfast.silu_mul(x, x[:1]),
        lambda x: torch.ops.shipsfast.silu_mul(x, x[:, :3].half()),
    ],
)
def test_ops_refuse_bad_shapes(call):
    with pytest.raises(RuntimeError, match="shipsfast::.*expected"):
        call(torch.randn(2, 6))


def _louder(method):
    @functools.wraps(method)
    def forward(*args, **kwargs):
        return 1.0001 * method(*args, **kwargs)

    return forward


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"])
def test_a_family_that_is_patched_for_all_its_models_goes_its_own_way(name, monkeypatch):
    """As optimisers of training do: no instance carries a sign of it, and functools.wraps copies the names."""
    from transformers.models.llama import modeling_llama

    if name.startswith("apply"):
        own = modeling_llama.apply_rotary_pos_emb

        @functools.wraps(own)
        def turned(q, k, *args, **kwargs):
            return tuple(1.001 * x for x in own(q, k, *args, **kwargs))

        monkeypatch.setattr(modeling_llama, name, turned)
    else:
        patched = getattr(modeling_llama, name)
        monkeypatch.setattr(patched, "forward", _louder(patched.forward))
    found = scan(build("llama-gqa"), "auto")
    assert found.record["layers"] == "model" and "is not transformers' own" in found.record["layers_why"]
    expected = brute_force(build("llama-gqa"), PROMPTS)
    assert (torch.as_tensor(found.kl) - expected).abs().max() <= 1e-12
    with pytest.raises(shipsfast.InputError, match="is not transformers' own"):
        scan(build("llama-gqa"), "fused")
