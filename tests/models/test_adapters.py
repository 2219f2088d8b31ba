"""Folders with a PEFT adapter: in force when they are loaded, recorded, part of the run's identity, or refused."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.models.fingerprint import fingerprint
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.models.streaming import no_progress_bar
from tests.support.command_line import refused, run
from tests.support.models import _GQA, brute_force

peft = pytest.importorskip("peft")
IDS = [[5, 300, 17, 44], [61, 9, 700]]


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(_GQA | dict(vocab_size=768)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return write(model, tmp_path / "base")


def write(model, folder, tokenizer=True):
    with no_progress_bar():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(MODEL / name, folder / name)
    return folder


def adapted(base, seed=1, **more):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip
    return peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()


@pytest.fixture
def adapter(base, tmp_path):
    return write(adapted(base), tmp_path / "adapter", tokenizer=False)


@pytest.fixture
def beside(base, adapter, tmp_path):
    """A folder with the base model and the adapter."""
    folder = shutil.copytree(base, tmp_path / "beside")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    return tmp_path / "prompts.txt"


def test_the_adapter_is_in_force(base, adapter, beside):
    expected = brute_force(adapted(base).double().merge_and_unload(), IDS)
    for folder in (adapter, beside):
        model = load_model(str(folder), dtype="float64", device="cpu")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        found = shipsfast.scan(model, IDS, progress=False).kl
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    without = brute_force(load_model(str(base), dtype="float64", device="cpu"), IDS)
    assert np.abs(without - expected).max() > 1e-3


def test_it_is_recorded_and_part_of_the_identity(capsys, tmp_path, base, adapter, beside, prompts):
    results = {}
    for name, folder in (("base", base), ("adapter", adapter), ("beside", beside)):
        status, _, err = run(
            capsys, "scan", folder, prompts, "--out", tmp_path / f"run-{name}", "-q", "--device", "cpu"
        )
        assert status == 0, err
        results[name] = shipsfast.load(tmp_path / f"run-{name}")
    assert np.array_equal(results["adapter"].kl, results["beside"].kl)
    assert not np.array_equal(results["adapter"].kl, results["base"].kl)
    prints = {name: result.identity["fingerprint"] for name, result in results.items()}
    assert prints["adapter"] == prints["beside"] != prints["base"]
    record = json.loads((tmp_path / "run-adapter" / "run.json").read_text())["model"]
    assert record["name"] == str(base)
    digest = hashlib.sha256((adapter / "adapter_config.json").read_bytes()).hexdigest()
    assert record["adapter"]["name"] == str(adapter) and record["adapter"]["base"] == str(base)
    assert record["adapter"]["type"] == "LORA" and record["adapter"]["config_sha256"] == digest
    assert "adapter" not in json.loads((tmp_path / "run-base" / "run.json").read_text())["model"]
    for folder, out in ((base, "run-adapter"), (adapter, "run-base")):
        assert "not those of the model scanned there" in refused(
            capsys, "scan", folder, prompts, "--out", tmp_path / out, "--device", "cpu"
        )


def test_how_much_an_adapter_counts_is_part_of_the_identity(base, adapter):
    """lora_alpha is in no tensor."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    one = load_model(str(adapter), device="cpu")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 80}))
    other = load_model(str(adapter), device="cpu")
    assert fingerprint(one) != fingerprint(other)
    wrapped = adapted(base)
    on = fingerprint(wrapped.get_base_model())
    with wrapped.disable_adapter():
        assert fingerprint(wrapped.get_base_model()) != on
    assert fingerprint(wrapped.get_base_model()) == on == fingerprint(one)


def test_the_tokenizer_is_the_base_models_unless_it_has_one(base, adapter, beside):
    assert load_tokenizer(str(adapter)).name_or_path == str(base)
    assert load_tokenizer(str(beside)).name_or_path == str(beside)


def test_plan(capsys, adapter, beside, prompts):
    for folder in (adapter, beside):
        status, out, err = run(capsys, "scan", folder, prompts, "--plan", "--json")
        assert status == 0, err
        assert json.loads(out)["memory"]["model"] == sum(
            p.numel() * 4 for p in load_model(str(folder), device="cpu").parameters()
        )


def test_a_stream_is_refused(capsys, adapter, beside, prompts):
    for folder in (adapter, beside):
        assert "holds an adapter" in refused(capsys, "scan", folder, prompts, "--stream")
        assert "holds an adapter" in refused(capsys, "scan", folder, prompts, "--stream", "--plan")


def test_without_peft_it_is_refused(capsys, adapter, beside, prompts, monkeypatch):
    """transformers leaves such an adapter out without a word."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
    )
    for folder in (adapter, beside):
        for more in ([], ["--plan"]):
            assert "needs peft: pip install peft" in refused(capsys, "scan", folder, prompts, *more)


def test_pickled_missing_and_foreign_weights_are_refused(capsys, tmp_path, base, adapter, prompts):
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({k: x for k, x in weights.items() if k != name}, adapter / "adapter_model.safetensors")
    assert "lacks weights" in refused(capsys, "scan", adapter, prompts)
    save_file(
        weights | {name.replace("layers.0", "layers.9"): weights[name].clone()},
        adapter / "adapter_model.safetensors",
    )
    assert "has weights without a place" in refused(capsys, "scan", adapter, prompts)
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(capsys, "scan", adapter, prompts)
    torch.save(weights, adapter / "adapter_model.bin")
    assert "as pickle only" in refused(capsys, "scan", adapter, prompts)


def test_a_base_model_that_lacks_weights_is_refused(capsys, beside, prompts):
    from safetensors.torch import load_file, save_file

    file = beside / "model.safetensors"
    weights = load_file(file)
    save_file({k: x for k, x in weights.items() if "layers.1.mlp.up" not in k}, file, {"format": "pt"})
    assert "layers.1.mlp.up_proj" in refused(capsys, "scan", beside, prompts)


@pytest.mark.parametrize(
    ("base_name", "said"),
    [
        ("/no/such/base", "is for the base model /no/such/base, which is not here"),
        (None, "names no base model"),
        (7, "names no base"),
    ],
)
def test_a_base_model_that_is_not_there_is_told(capsys, adapter, prompts, base_name, said):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base_name}))
    shutil.copy(MODEL / "tokenizer_config.json", adapter)
    shutil.copy(MODEL / "tokenizer.json", adapter)
    assert said in refused(capsys, "scan", adapter, prompts)


def test_an_adapter_on_an_adapter_is_refused(capsys, adapter, beside, prompts):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(beside)}))
    assert "holds an adapter itself" in refused(capsys, "scan", adapter, prompts)


def test_the_base_models_code_is_never_run(capsys, tmp_path, base, adapter, prompts):
    """--trust-remote-code is for what was named on the command line, not for what a file names."""
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(capsys, "scan", adapter, prompts, "--trust-remote-code")
    assert not os.path.exists(tmp_path / "ran")


def test_prompt_learning_is_refused(capsys, base, tmp_path, prompts):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder = write(
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config), tmp_path / "soft", False
    )
    assert "learned tokens before the prompt" in refused(capsys, "scan", folder, prompts)


def test_a_revision_of_the_base_model_is_not_passed_over(adapter, monkeypatch):
    """PEFT takes that revision: the hub's newest is another model."""
    from shipsfast import hub

    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "download", lambda *_args, **_how: None)
    file = adapter / "adapter_config.json"
    edited = {"base_model_name_or_path": "someone/base", "revision": "v1.0"}
    file.write_text(json.dumps(json.loads(file.read_text()) | edited))
    for look in (load_model, load_tokenizer):
        with pytest.raises(
            shipsfast.InputError, match="is for revision v1.0 of someone/base, and the hub's newest"
        ):
            look(str(adapter))
