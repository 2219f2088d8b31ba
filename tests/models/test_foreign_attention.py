"""A model whose attention is somebody else's function is refused by name, by every call, and the printed remedy works."""

import functools
import re

import pytest
import torch
from accelerate import cpu_offload
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import shipsfast
from tests.support import family_oracle
from tests.support.models import build
from tests.support.numerics import assert_close_abs

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 9]]
HEADS = [(0, 1), (2, 3)]
QUIET = dict(progress=False)


def ablated(model, heads=HEADS):
    with shipsfast.ablate(model, heads), torch.no_grad():
        return torch.log_softmax(model(torch.tensor(PROMPTS[:1])).logits[0, -1], -1)


CALLS = {
    "scan": lambda m: shipsfast.scan(m, PROMPTS, **QUIET),
    "scan_dataset": lambda m: shipsfast.scan_dataset(m, PROMPTS, **QUIET),
    "sahara": lambda m: shipsfast.sahara(m, PROMPTS, group_size=1, **QUIET),
    "generate": lambda m: shipsfast.generate(m, PROMPTS, groups=[[]], max_new_tokens=2, **QUIET),
    "ablate": ablated,
    "ablate nothing": lambda m: ablated(m, []),
}


def halved(forward):
    """Keeps the name of what it wraps."""

    @functools.wraps(forward)
    def call(*args, **kwargs):
        out, weights = forward(*args, **kwargs)
        return out * 0.5, weights

    return call


def registered(patch):
    patch.setitem(AttentionInterface._global_mapping, "theirs", halved(sdpa_attention_forward))
    patch.setitem(AttentionMaskInterface._global_mapping, "theirs", sdpa_mask)
    return "theirs"


def patched_eager(patch):
    own = modeling_llama.eager_attention_forward
    patch.setattr(modeling_llama, "eager_attention_forward", halved(own))
    return "eager"


def overwritten_sdpa(patch):
    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", halved(sdpa_attention_forward))
    return "sdpa"


def another_mask(patch):
    patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *_a, **_k: None)
    return "sdpa"


@pytest.mark.parametrize("how", [registered, patched_eager, overwritten_sdpa, another_mask])
def test_refused_by_name_and_the_remedy_works(monkeypatch, how):
    model, name = build(), how(monkeypatch)
    model.set_attn_implementation(name)
    for call, run in CALLS.items():
        with pytest.raises(
            shipsfast.UnsupportedModelError, match=f"is {name!r}, for which .* is in force"
        ) as told:
            run(model)
        assert "LlamaForCausalLM" in str(told.value), call
    exec(re.search(r"call (model\.set_attn_implementation\('\w+'\))", str(told.value)).group(1))  # noqa: S102
    assert_close_abs(ablated(model), family_oracle.next_log_probs(model, PROMPTS[0], HEADS), 1e-12)
    CALLS["scan"](model), CALLS["generate"](model)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "paged|eager", "flash_attention_2"])
def test_transformers_own_go_on(name):
    """Also what does not run here by itself: it is not what would be lost."""
    model = build()
    expected = family_oracle.next_log_probs(model, PROMPTS[0], HEADS)
    model.config._attn_implementation_internal = name
    assert_close_abs(ablated(model), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["ablate", "ablate nothing", "generate", "scan_dataset"])
def test_what_no_name_tells_is_seen_in_the_answers(monkeypatch, call, dtype):
    """A function inside of transformers' own attention is replaced."""
    import transformers.integrations.sdpa_attention as inside

    model = build(dtype=dtype)
    own = inside.repeat_kv
    monkeypatch.setattr(inside, "repeat_kv", lambda x, n: own(x, n) * 0.5)
    monkeypatch.setattr(inside, "use_gqa_in_sdpa", lambda *_a, **_k: False)
    with pytest.raises(
        shipsfast.UnsupportedModelError, match="gives other answers with shipsfast's attention in place"
    ):
        CALLS[call](model)


@pytest.mark.parametrize("call", ["scan", "scan_dataset", "sahara"])
def test_where_weights_are_elsewhere_the_passes_of_the_scan_itself_tell(monkeypatch, call):
    import transformers.integrations.sdpa_attention as inside

    model = cpu_offload(build(), execution_device=torch.device("cpu"))
    CALLS[call](model)
    own = inside.repeat_kv
    monkeypatch.setattr(inside, "repeat_kv", lambda x, n: own(x, n) * 0.5)
    monkeypatch.setattr(inside, "use_gqa_in_sdpa", lambda *_a, **_k: False)
    with pytest.raises(shipsfast.UnsupportedModelError, match="of the model's own forward|are packed"):
        CALLS[call](model)


def test_the_check_is_never_stale(monkeypatch):
    model = build()
    expected = ablated(model)
    with monkeypatch.context() as patch:
        model.set_attn_implementation(registered(patch))
        with pytest.raises(shipsfast.UnsupportedModelError, match="'theirs'"):
            ablated(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ablated(model), expected)


@pytest.mark.parametrize("hook", ["output", "class"])
def test_what_runs_in_every_pass_is_a_part_of_the_model(monkeypatch, hook):
    """A hook on attention's output, a patched forward that calls transformers' attention: the oracle has them too."""
    model = build()
    attention = model.model.layers[0].self_attn
    if hook == "output":
        attention.register_forward_hook(lambda _m, _a, out: (out[0] * 0.5, *out[1:]))
    else:
        monkeypatch.setattr(type(attention), "forward", halved(type(attention).forward))
    expected = family_oracle.ships(model, PROMPTS)
    assert_close_abs(shipsfast.scan(model, PROMPTS, **QUIET).kl, expected, 1e-12)
    assert_close_abs(ablated(model), family_oracle.next_log_probs(model, PROMPTS[0], HEADS), 1e-12)


def test_nested_ablations_are_looked_at_once():
    model = build()
    with shipsfast.ablate(model, HEADS[:1]):
        got = ablated(model, HEADS[1:])
    assert_close_abs(got, family_oracle.next_log_probs(model, PROMPTS[0], HEADS), 1e-12)


def test_a_streamed_model_is_looked_at_too(tmp_path):
    """Without the passes that would read all its weights again."""
    from shipsfast.models.loading import load_model
    from tests.support.checkpoints import save

    AttentionInterface.register(
        "test_sharper",
        lambda module, query, *rest, **how: sdpa_attention_forward(module, 1.5 * query, *rest, **how),
    )
    model = load_model(str(save(build("llama-gqa", torch.float32), tmp_path)), device="cpu", stream=True)
    model.set_attn_implementation("test_sharper")
    with pytest.raises(
        shipsfast.UnsupportedModelError, match="'test_sharper', for which .* call model.set_attn"
    ):
        shipsfast.scan(model, PROMPTS, progress=False)
