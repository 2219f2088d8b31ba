"""Checkpoints as they are found: one safetensors file, shards with an index, tied embeddings; and pickled ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.models.streaming import no_progress_bar
from tests.support.command_line import refused, run
from tests.support.models import _GQA

FORMS = ("single", "sharded", "tied")


@pytest.fixture(params=FORMS)
def checkpoint(request, tmp_path):
    """(model, its folder)"""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**(_GQA | dict(vocab_size=768)), tie_word_embeddings=request.param == "tied")
    )
    return model.eval(), write(model, tmp_path / "model", "50KB" if request.param == "sharded" else "1GB")


def write(model, folder, shard: str):
    with no_progress_bar():
        model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def test_each_form_scans_from_the_command_line(capsys, tmp_path, checkpoint):
    model, folder = checkpoint
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    assert len(list(folder.glob("*.safetensors"))) == (len(set(names.values())) if names else 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc\n")
    found = []
    for number, more in enumerate(([], ["--stream"])):
        out = tmp_path / f"run-{number}"
        status, text, err = run(
            capsys, "scan", folder, prompts, "--template", "none", "--out", out, "-q", *more
        )
        assert status == 0 and "layer-head" in text, err
        found.append(shipsfast.ShipsResult.load(out))
    assert np.array_equal(found[0].kl, found[1].kl)
    assert found[0].identity == found[1].identity
    tokenizer = shipsfast_tokenizer(folder)
    expected = shipsfast.scan(model, ["a b", "c"], tokenizer, progress=False)
    assert np.array_equal(found[0].kl, expected.kl)


def shipsfast_tokenizer(folder):
    from shipsfast.models.loading import load_tokenizer

    return load_tokenizer(str(folder))


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["in-memory", "streamed"])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"]
)
def test_a_pickled_checkpoint_is_refused_with_the_remedy(capsys, tmp_path, name, more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(_GQA | dict(vocab_size=768))))
    folder = write(model, tmp_path / "model", "1GB")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    line = refused(capsys, "scan", folder, prompts, *more)
    assert name in line and "convert it to safetensors" in line and "save_pretrained" in line


def test_the_remedy_works(capsys, tmp_path):
    """What the refusal says to do is done, and the folder scans."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(_GQA | dict(vocab_size=768))))
    folder = write(model, tmp_path / "model", "1GB")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    converted = write(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "converted", "1GB")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    status, _, err = run(capsys, "scan", converted, prompts, "-q")
    assert status == 0, err


def test_a_folder_without_weights_is_refused(capsys, tmp_path):
    folder = write(LlamaForCausalLM(LlamaConfig(**(_GQA | dict(vocab_size=768)))), tmp_path / "model", "1GB")
    (folder / "model.safetensors").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    for more in ([], ["--stream"]):
        assert "model.safetensors" in refused(capsys, "scan", folder, prompts, *more)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["device", "cpu", "python"],
)
def test_weights_that_do_not_fit_are_told_as_such(capsys, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    assert "does not fit on cpu: use --stream" in refused(capsys, "scan", MODEL, prompts, "--device", "cpu")
