"""Checkpoints that also take images load on the command line and are scanned on text: heads of the language model only."""

import json
import shutil

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.demo.run import MODEL
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.models.without_weights import hollow_model
from tests.support import family_oracle
from tests.support.checkpoints import save
from tests.support.command_line import refused, run
from tests.support.tiny_configs import tiny_model

# Those that AutoModelForCausalLM refuses, and one that it takes.
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "smolvlm", "internvl", "paligemma")
REFUSED = ("paligemma",)  # its mask
IDS = [[5, 30, 17, 44], [6, 9, 7]]


def checkpoint(family, folder, dtype=torch.float64):
    try:
        model = tiny_model(family, dtype)
    except Exception as error:  # noqa: BLE001 (families raise whatever they like)
        pytest.skip(f"transformers builds no tiny {family} here: {error}")
    save(model, folder, "1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_scans_as_the_definition_says(tmp_path, family):
    model = checkpoint(family, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype="float64", device="cpu")
    assert type(loaded) is type(model)
    assert type(hollow_model(str(tmp_path / "model"))) is type(model)
    try:
        result = shipsfast.scan(loaded, IDS, progress=False)
    except shipsfast.UnsupportedModelError as error:
        assert family in REFUSED, error
        return
    assert family not in REFUSED
    config = model.config.get_text_config()
    assert result.kl.shape == (2, config.num_hidden_layers, config.num_attention_heads)
    loaded.set_attn_implementation("eager")
    np.testing.assert_allclose(result.kl, family_oracle.ships(loaded, IDS), rtol=0, atol=1e-10)
    assert result.kl.max() > 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_command_line(capsys, tmp_path, family):
    folder, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    checkpoint(family, folder, torch.float32)
    _shrink_vocabulary(folder)
    prompts.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n')
    found = []
    for number, more in enumerate(([], ["--stream"])):
        status, _, err = run(
            capsys, "scan", folder, prompts, "--out", tmp_path / f"run-{number}", "-q", *more
        )
        assert status == 0, err
        found.append(shipsfast.load(tmp_path / f"run-{number}"))
    assert np.array_equal(found[0].kl, found[1].kl) and found[0].identity == found[1].identity
    status, out, err = run(capsys, "scan", folder, prompts, "--plan", "--json")
    assert status == 0 and json.loads(out)["units"] == found[0].kl[0].size, err


def _shrink_vocabulary(folder):
    """A tokenizer with as many tokens as the tiny models: letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(ord("a"), ord("z") + 1))]
    inside = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )


def test_the_processors_chat_template_is_taken(tmp_path):
    """Older checkpoints keep it in a file that only the processor reads."""
    checkpoint("llava", tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_tokenizer(str(tmp_path)).chat_template == "{{ messages[0].content }}"
    for damaged in ("[]", "{", '{"chat_template": 3}'):
        (tmp_path / "chat_template.json").write_text(damaged)
        with pytest.raises(shipsfast.InputError, match="is not a chat template"):
            load_tokenizer(str(tmp_path))


def test_missing_weights_are_refused(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    checkpoint("llava", folder)
    prompts.write_text("a\n")
    weights = load_file(folder / "model.safetensors")
    lost = next(k for k in weights if "language_model" in k and "q_proj" in k)
    save_file({k: x for k, x in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    assert "lacks weights" in refused(capsys, "scan", folder, prompts)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_placeholder_of_an_image_is_refused_in_words(tmp_path, family):
    """Without an image the model takes the token's own embedding, which it was never trained to see."""
    model = checkpoint(family, tmp_path)
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    asked = [IDS[0], [5, token, 7]]
    said = f"prompt 1 has token {token}, in whose place {type(model).__name__} wants an image"
    for run_it in (shipsfast.scan, shipsfast.scan_dataset, shipsfast.sahara):
        with pytest.raises(shipsfast.InputError, match=said):
            run_it(model, asked, progress=False)
    with pytest.raises(shipsfast.InputError, match="in the prompts of ablation mean: " + said):
        shipsfast.scan(model, IDS, ablation=shipsfast.Ablation("mean", prompts=asked), progress=False)
