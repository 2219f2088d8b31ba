"""Directions of the residual stream against transformers' own hidden states, and what they say of themselves."""

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast import Direction, InputError
from shipsfast.engine import replacement_values
from shipsfast.scans import direction as module
from tests.support import family_oracle
from tests.support.models import build
from tests.support.numerics import assert_close_abs
from tests.support.streams import MODELS, stream
from tests.support.tokenizers import of_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

A = [[5, 9, 17, 23, 33, 8], [5, 9, 17, 7], [5, 9, 4, 12, 3], [5, 9, 17]]
B = [[5, 9, 17, 23, 11], [6, 20, 31], [7, 7, 7, 7, 40, 2]]


@pytest.mark.parametrize("position", [-1, -3, 1])
@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_differences_of_means(name, position):
    model = MODELS[name]()
    means = [torch.stack([stream(model, ids)[:, position] for ids in some]).mean(0) for some in (A, B)]
    found = shipsfast.direction(model, A, B, position=position, progress=False)
    assert found.vectors.dtype == np.float64
    assert_close_abs(found.vectors, means[0] - means[1], 1e-12)
    assert found.position == position
    assert np.array_equal(found.vector, found.vectors[found.layer])


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_those_of_output_hidden_states(name):
    """But the last, which transformers gives behind the final norm."""
    model, hidden = MODELS[name](), []
    with family_oracle.oracle_attention(model), torch.no_grad():
        for some in (A, B):
            out = [model(torch.tensor([ids]), output_hidden_states=True, use_cache=False) for ids in some]
            hidden.append(torch.stack([torch.stack(x.hidden_states)[1:, 0, -1] for x in out]).mean(0))
    expected = hidden[0] - hidden[1]
    found = shipsfast.direction(model, A, B, layer=1, progress=False)
    assert_close_abs(found.vectors[:-1], expected[:-1], 1e-12)
    assert np.abs(found.vectors[-1] - expected[-1].numpy()).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_auroc_is_of_prompts_the_direction_was_not_made_of(name):
    model = MODELS[name]()
    found = shipsfast.direction(model, A, B, seed=3, progress=False)
    generator = np.random.default_rng(3)
    states = [torch.stack([stream(model, ids)[:, -1] for ids in some]).numpy() for some in (A, B)]
    halves = [np.array_split(generator.permutation(len(x)), 2) for x in states]
    for layer, got in enumerate(found.auroc):
        values = []
        for fit in (0, 1):
            (a, b) = (
                [x[part[i], layer] for x, part in zip(states, halves, strict=True)] for i in (fit, 1 - fit)
            )
            vector = a[0].mean(0) - a[1].mean(0)
            pairs = [(x @ vector > y @ vector) + (x @ vector == y @ vector) / 2 for x in b[0] for y in b[1]]
            values.append(np.mean(pairs))
        assert got == pytest.approx(np.mean(values), abs=1e-15)
    assert found.auroc[found.layer] == found.auroc.max()
    assert (shipsfast.direction(model, A, B, seed=3, progress=False)) == found


def test_of_equally_good_layers_the_one_with_the_widest_gap():
    """Two layers that order all held-out prompts rightly: the second does so by more of its own spread."""
    generator = np.random.default_rng(0)
    wide, narrow = (generator.normal(size=(8, 2)) * [s, 1] for s in (0.4, 0.1))
    found = [module._held_out(x + [2, 0], x - [2, 0], 0) for x in (wide, narrow)]
    assert [auroc for auroc, _ in found] == [1, 1]
    assert found[1] > found[0]


def test_the_prompts_pass_once(monkeypatch):
    runs = []
    through = replacement_values.tree_outputs
    monkeypatch.setattr(
        module, "tree_outputs", lambda *args: runs.append(args[2].num_tokens) or through(*args)
    )
    shipsfast.direction(build(), A, B, progress=False)
    assert runs == [6 + 1 + 3 + 1 + 3 + 6]  # nodes of the prefix tree, for all layers


def test_little_memory_gives_the_same(monkeypatch):
    """Cut into packs by what is free, and by half again where it runs out."""
    model = build()
    whole, runs = shipsfast.direction(model, A, B, layer=1, progress=False), []
    through = replacement_values.tree_outputs

    def short(*args):
        runs.append(len(args[2].last_index))
        if len(args[2].last_index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return through(*args)

    monkeypatch.setattr(module, "tree_outputs", short)
    cut = shipsfast.direction(model, A, B, layer=1, progress=False)
    assert runs == [7, 3, 1, 2, 4, 2, 2]
    assert_close_abs(cut.vectors, whole.vectors, 1e-12)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_bf16_states_are_averaged_in_float64(monkeypatch):
    model, states, through = build(dtype=torch.bfloat16), [], module._states
    monkeypatch.setattr(module, "_states", lambda *args: states.extend(through(*args)) or states)
    found = shipsfast.direction(model, A, B, layer=0, progress=False)
    for got, each in zip(found.vectors, states, strict=True):
        assert each.dtype == torch.bfloat16
        assert np.array_equal(got, each[:4].double().mean(0) - each[4:].double().mean(0))
    means = [torch.stack([stream(model, ids)[:, -1] for ids in some]).mean(0) for some in (A, B)]
    assert_close_abs(found.vectors, means[0] - means[1], 0.05 * np.abs(found.vectors).max())
    assert found.record["packing_error"] < 0.05


def test_texts_in_a_chat_template():
    tokenizer, said = of_bytes(), (["Mend a kettle.", "Sing."], ["Tell a story.", "Dance.", "Why?"])
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 256
    found = shipsfast.direction(model, *said, tokenizer, template="chat", position=-2, progress=False)
    ids = [[_chat(tokenizer, text) for text in some] for some in said]
    means = [torch.stack([stream(model, x)[:, -2] for x in some]).mean(0) for some in ids]
    assert_close_abs(found.vectors, means[0] - means[1], 1e-12)
    assert found.record["template"] == "chat"


def _chat(tokenizer, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position": -4}, "^prompt 3 has 3 tokens, and none at position -4: choose another, or leave it out$"),
        ({"position": 3}, "^prompt 3 has 3 tokens, and none at position 3"),
        ({"prompts_b": [[1, 2, 3], [1, 2]], "position": 2}, "^in prompts_b: prompt 1 has 2 tokens, and none at position 2"),
        ({"prompts_b": A}, "^up to position -1 both sets have the same tokens: there is nothing to tell apart$"),
        ({"prompts_b": [[5, 1]], "position": 0}, "^up to position 0 both sets have the same tokens"),
        ({"prompts_b": []}, "^in prompts_b: there are no prompts"),
        ({"prompts_b": [[61]]}, "^in prompts_b: prompt 0 has token ids outside"),
        ({"prompts_b": ["a"]}, "^in prompts_b: prompts are text, so a tokenizer is needed"),
        ({"prompts_b": [[3, 1]]}, r"^a set of one prompt has no halves to choose a layer by: .* layer= \(--layer\)$"),
        ({"layer": 3}, "^layer 3: the model has 3 decoder layers, counted from 0$"),
        ({"layer": -1}, "^layer must be a whole number of at least 0, got -1$"),
        ({"layer": True}, "^layer must be a whole number"),
        ({"position": 1.5}, "^position must be a whole number"),
        ({"seed": -1}, "^seed must be a whole number"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message):
    given = {"prompts_a": A, "prompts_b": B} | given
    with pytest.raises(InputError, match=message):
        shipsfast.direction(build(), **given, progress=False)


def test_a_model_that_overflows_is_refused():
    model = build(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3e4
    with pytest.raises(
        InputError, match="stream of prompt 0 of both sets is not finite after decoder layer 1"
    ):
        shipsfast.direction(model, A, B, progress=False)


def test_one_prompt_in_a_set():
    found = shipsfast.direction(build(), A, B[:1], layer=1, progress=False)
    assert np.isnan(found.auroc).all()
    assert found.layer == 1


def test_a_model_that_packing_changes_is_refused(monkeypatch):
    through = module.pack
    monkeypatch.setattr(module, "pack", lambda prompts: through([[*ids[:-1], 1] for ids in prompts]))
    with pytest.raises(shipsfast.UnsupportedModelError, match="hidden states of prompt 0 differ by"):
        shipsfast.direction(build(), A, B, progress=False)


def test_keywords_and_words():
    with pytest.raises(TypeError, match=r"^direction\(\) got an unexpected keyword argument 'ablation'"):
        shipsfast.direction(build(), A, B, ablation="zero")
    for name in ("prompts_a", "prompts_b", "layer", "position", "seed", "template", "max_memory"):
        assert f"\n    {name}: " in shipsfast.direction.__doc__
    for name in ("ablation", "unit", "scale", "layers", "heads"):
        assert f"\n    {name}: " not in shipsfast.direction.__doc__


def test_saved_and_loaded(tmp_path):
    found = shipsfast.direction(build(), A, B, progress=False)
    found.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert again == found
    assert again.record == found.record
    assert len(again.identity["prompts_a"]) == 4
    assert again.identity["fingerprint"]
