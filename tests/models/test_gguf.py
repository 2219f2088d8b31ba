"""GGUF files: every number in them arrives in the model, and the tokens are the model's; what would be lost is refused."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.errors import InputError, UnsupportedModelError
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.models.without_weights import hollow_model
from tests.support.command_line import refused, run
from tests.support.models import _COMMON, _GQA

pytest.importorskip("gguf")
pytest.importorskip("transformers.integrations.gguf")
from tests.support.gguf_files import write_gguf

FIND_SPEC = importlib.util.find_spec
SMALL = _GQA | dict(vocab_size=768, intermediate_size=64, pad_token_id=2, bos_token_id=0, eos_token_id=1)
GEMMA = SMALL | dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=4)
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL, rms_norm_eps=3e-4, rope_parameters=dict(rope_type="default", rope_theta=5e4)
    ),
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, rms_norm_eps=3e-4),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "phi3-window": Phi3Config(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**(GEMMA | dict(num_hidden_layers=7))),
}
IDS = torch.tensor([[0, 300, 17, 512, 44, 9, 700, 31, 5, 61]])


def built(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1 if parameter.dim() == 1 else 0.25)
    return model.eval()


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    """The embedded model as a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "village.gguf")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_arrives(tmp_path, name):
    """Weights, eps, the base of rotary embeddings, windows and softcaps: the logits are those of the model itself."""
    model = built(CONFIGS[name])
    loaded = load_model(str(write_gguf(model, tmp_path / "model.gguf")), device="cpu")
    assert type(loaded) is type(model)
    loaded.set_attn_implementation("eager")
    theirs, ours = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():  # 1 is added to norms of Gemma and taken off again, in float32
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-7 if "gemma" in name else 0)
    with torch.no_grad():
        a, b = model(IDS).logits, loaded(IDS).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())


def test_it_scans_as_the_same_weights_from_safetensors(capsys, tmp_path, village):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do I mend a kettle?\nTell me about the 12 mills.\n")
    found = []
    for number, model in enumerate(([MODEL], [village], [village.parent, "--gguf-file", village.name])):
        out = tmp_path / f"run-{number}"
        status, _, err = run(capsys, "scan", *model, prompts, "--out", out, "-q", "--device", "cpu")
        assert status == 0 and err == "", err  # no bar of transformers' either
        found.append(shipsfast.load(out))
    assert np.array_equal(found[0].kl, found[1].kl) and np.array_equal(found[0].kl, found[2].kl)
    assert (
        found[0].identity["prompts"] == found[1].identity["prompts"]
    )  # the same tokens, of the same chat template
    assert found[1].identity == found[2].identity
    record = json.loads((tmp_path / "run-1" / "run.json").read_text())["model"]
    assert record["name"] == str(village)
    assert record["gguf"] == {
        "file": "village.gguf", "architecture": "llama", "quantisation": "ALL_F32", "tensors": {"F32": 38}, "loaded_as": "float32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        ("F32", "auto", "float32"),
        ("F16", "auto", "float16"),
        ("BF16", "auto", "bfloat16"),
        ("Q8_0", "auto", "float32"),
        ("Q8_0", "bfloat16", "bfloat16"),
        ("Q8_0", "float64", "float64"),
    ],
)
def test_dtype(tmp_path, kind, asked, dtype):
    """auto is the file's for plain numbers, float32 for blocks; the plan says the same."""
    path = str(write_gguf(built(CONFIGS["llama"]), tmp_path / "model.gguf", kind=kind))
    model = load_model(path, dtype=asked, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert hollow_model(path, asked).dtype == model.dtype
    assert getattr(model.config, "quantization_config", None) is None


def test_quantised_weights_are_those_of_the_package(tmp_path):
    """An independent view of one projection: ggml's blocks by the gguf package, its order of rotated numbers by hand."""
    import gguf

    path = write_gguf(built(CONFIGS["llama"]), tmp_path / "model.gguf", kind="Q4_0")
    loaded = load_model(str(path), device="cpu")
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(path)).tensors}
    size = 32 // 4
    for layer in range(3):
        given = torch.from_numpy(tensors[f"blk.{layer}.attn_q.weight"].copy())
        rows = [h * size + i for h in range(4) for i in (*range(0, size, 2), *range(1, size, 2))]
        assert torch.equal(loaded.model.layers[layer].self_attn.q_proj.weight, given[rows])


def test_the_plan_is_that_of_the_folder(capsys, tmp_path, village):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    plans = []
    for model in (MODEL, village):
        status, out, err = run(capsys, "scan", model, prompts, "--plan", "--json", "--max-memory", "1GiB")
        assert status == 0, err
        plans.append(json.loads(out))
    for key in ("dtype", "units", "plan", "memory", "flops"):
        assert plans[0][key] == plans[1][key]
    assert (
        plans[1]["model"]["name"]
        == str(village)
        == load_model(str(village), device="cpu").config._name_or_path
    )


def test_llama_3_rotary_scaling_is_not_lost(tmp_path):
    """llama.cpp writes it as a tensor, which transformers drops."""
    config = LlamaConfig(
        **(_COMMON | dict(vocab_size=768, hidden_size=256)),
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )  # fmt: skip
    model = built(config)
    factors = []
    for i in range(32):
        wave = 2 * math.pi * 5e5 ** (2 * i / 64)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        factors.append(1.0 if wave < 8192 / 4 else 8.0 if wave > 8192 else 1 / ((1 - smooth) / 8.0 + smooth))
    path = write_gguf(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    loaded = load_model(str(path), device="cpu")
    torch.testing.assert_close(
        loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
    factors[-1] = 3.0
    path = write_gguf(model, tmp_path / "other.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight.*not Llama 3's"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("entries", "extra", "said"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {},
            "rope.scaling.type is linear",
        ),
        ({"llama.rope.dimension_count": 4}, {}, r"attn_[qk].weight is \(\d+, 32\).*has"),
        ({"llama.attention.key_length": 16}, {}, "attention.key_length is 16.*has 8"),
        ({"llama.expert_count": 4}, {}, "does not read llama.expert_count"),
        ({}, {"blk.0.attn_q.bias": [0.5] * 32}, "no place for blk.0.attn_q.bias"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"general.name": "mistral"}, {}, "takes it for a model of mistral, by its general.name"),
    ],
    ids=["rope", "rotary", "head", "experts", "bias", "split", "name"],
)
def test_what_transformers_would_lose_is_refused(tmp_path, entries, extra, said):
    path = write_gguf(built(CONFIGS["llama"]), tmp_path / "model.gguf", entries=entries, extra=extra)
    for load in (load_model, hollow_model):
        with pytest.raises(UnsupportedModelError, match=said):
            load(str(path))


def test_gemma_with_another_query_scale_is_refused(tmp_path):
    model = built(Gemma2Config(**(GEMMA | dict(head_dim=128))))
    with pytest.raises(UnsupportedModelError, match="scales its queries by a number that is not in the file"):
        load_model(str(write_gguf(model, tmp_path / "model.gguf")))


def test_missing_weights_are_refused(tmp_path):
    model = built(CONFIGS["llama"])
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(InputError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        load_model(str(write_gguf(model, tmp_path / "model.gguf")))


@pytest.mark.parametrize("rule", ["smollm", "llama-bpe", "qwen2"])
def test_words_are_cut_as_the_file_says(tmp_path, rule):
    """Digits one by one, in threes, or each alone: not GPT-2's rule, which transformers takes for unknown names."""
    path = write_gguf(
        built(CONFIGS["llama"]),
        tmp_path / "m.gguf",
        entries={"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": None},
    )
    tokenizer = load_tokenizer(str(path))
    text = "it's 12345  mills"
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    expected = {
        "smollm": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġmills"],
        "llama-bpe": ["it", "'s", "Ġ", "123", "45", "Ġ", "Ġmills"],
        "qwen2": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġmills"],
    }[rule]
    assert pieces == expected
    begins = tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    assert begins == (rule == "llama-bpe")  # llama.cpp's default for it


@pytest.mark.parametrize("entries", [{"tokenizer.ggml.pre": "brand-new"}, {"tokenizer.ggml.pre": None}])
def test_an_unknown_rule_of_words_is_refused(capsys, tmp_path, entries):
    path = write_gguf(built(CONFIGS["llama"]), tmp_path / "model.gguf", entries=entries)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    assert "cuts words by the rule" in refused(capsys, "scan", path, prompts)


def test_tokens_are_the_models(village):
    ours, theirs = load_tokenizer(str(village)), AutoTokenizer.from_pretrained(MODEL)
    for text in ("How do I mend 12 kettles?\n\n  Soon.", "<|user|>hi<|end|>", "naïve café 日本", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_damaged_files_are_told_in_one_line(capsys, tmp_path, village):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    data = village.read_bytes()
    for name, damaged in (
        ("cut", data[: len(data) // 2]),
        ("header", data[:2000]),
        ("empty", b""),
        ("other", b"PK\3\4" + data[4:]),
        ("counts", data[:8] + b"\xff" * 16 + data[24:]),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        line = refused(capsys, "scan", path, prompts)
        assert "cut off" in line and str(path) in line
        assert "cut off" in refused(capsys, "scan", path, prompts, "--plan")


def test_other_architectures_streams_and_missing_packages_are_refused(capsys, tmp_path, village, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    data = village.read_bytes().replace(b"llama", b"mambo")
    (tmp_path / "mambo.gguf").write_bytes(data)
    assert "architecture mambo, which is not loaded" in refused(
        capsys, "scan", tmp_path / "mambo.gguf", prompts
    )
    assert "cannot be streamed" in refused(capsys, "scan", village, prompts, "--stream")
    assert "no GGUF file at" in refused(capsys, "scan", tmp_path / "none.gguf", prompts)
    assert "leave --gguf-file away" in refused(capsys, "scan", village, prompts, "--gguf-file", "x.gguf")
    assert "it holds village.gguf: name one with --gguf-file" in refused(
        capsys, "scan", village.parent, prompts
    )
    assert "has no file ../x.gguf" in refused(
        capsys, "scan", village.parent, prompts, "--gguf-file", "../x.gguf"
    )
    for name, said in (
        ("accelerate", "needs accelerate: pip install accelerate"),
        ("gguf", "needs gguf: pip install gguf"),
        ("transformers.integrations.gguf", "pip install 'transformers>=5.18'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda x, *a, n=name: None if x == n else FIND_SPEC(x, *a)
            )
            assert said in refused(capsys, "scan", village, prompts)
