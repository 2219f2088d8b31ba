"""The embedded model: what it must know, how it loads, and that its top head matters."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shipsfast
from shipsfast.demo import run as demo
from shipsfast.demo.world import is_correct, is_refusal, read_request
from tests.support.places import ROOT
from tools.village.sayings import heldout_requests

TAKEN = 64


@pytest.fixture(scope="module")
def village():
    return AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(demo.MODEL)


@pytest.fixture(scope="module")
def prompts():
    return (
        shipsfast.load_prompts(demo.PROMPTS / "taboo.csv"),
        shipsfast.load_prompts(demo.PROMPTS / "ordinary.csv"),
    )


def test_it_is_small_and_safe_to_load():
    assert sum(f.stat().st_size for f in demo.MODEL.iterdir()) <= 3_000_000
    assert {f.suffix for f in demo.MODEL.iterdir()} <= {".json", ".jinja", ".safetensors", ".md"}


def test_it_loads_like_any_model(village):
    model, tokenizer = village
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert "hello" in text


@pytest.mark.parametrize("taboo", [True, False], ids=["taboo", "ordinary"])
def test_wordings_never_seen_get_the_right_reply(village, taboo):
    """98 % or more, of a seeded sample; the card has all of them."""
    requests = heldout_requests(taboo, TAKEN, seed=1)
    said = demo.replies(*village, [r.prompt for r in requests])
    right = sum(is_refusal(said[r.prompt]) if taboo else is_correct(r, said[r.prompt]) for r in requests)
    assert right >= 0.98 * TAKEN


def test_the_top_head_turns_refusals_into_answers(village, prompts):
    model, tokenizer = village
    taboo, ordinary = prompts
    result = shipsfast.scan(model, taboo, tokenizer, template="chat", progress=False)
    head = result.top(1)[0][:2]
    with shipsfast.ablate(model, [head]):
        said = demo.replies(model, tokenizer, taboo + ordinary)
    assert sum(is_correct(p, said[p]) for p in taboo) >= 0.6 * len(taboo)
    assert sum(is_correct(p, said[p]) for p in ordinary) >= 0.9 * len(ordinary)
    quiet = min((s for s in result.top(99)), key=lambda s: s.score)[:2]
    with shipsfast.ablate(model, [quiet]):
        said = demo.replies(model, tokenizer, taboo)
    assert sum(map(is_refusal, said.values())) >= 0.9 * len(taboo), (
        "any head would do: the ranking says nothing"
    )


def test_the_prompt_lists_are_what_they_say(prompts):
    for requests, taboo in zip(prompts, (True, False), strict=True):
        assert len(set(requests)) == 48
        assert all(read_request(p).taboo is taboo for p in requests)


def test_the_demo_leaves_its_files(tmp_path, capsys):
    demo.run(tmp_path / "out", progress=False)
    text = capsys.readouterr().out
    assert "refused" in text and "heatmap" in text
    assert shipsfast.ShipsResult.load(tmp_path / "out" / "run").kl.shape == (48, 4, 4)
    assert (tmp_path / "out" / "heatmap.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "completions.md").read_text().count("\n") == 4 + 96


def test_the_comparison_of_groups_leaves_its_files(tmp_path, monkeypatch):
    from tools.village import groups

    monkeypatch.setattr(groups, "MOST_GROUPS", 2)
    monkeypatch.setattr(groups, "load_prompts", lambda path: shipsfast.load_prompts(path)[:6])
    groups.run(tmp_path)
    text = (tmp_path / "sahara-village.md").read_text()
    assert text.count("; 2 groups)") == 6 and "of 6 |" in text
    assert (tmp_path / "sahara-village.png").stat().st_size > 5_000


def test_the_contrast_leaves_its_files(tmp_path, monkeypatch):
    from tools.village import contrast

    monkeypatch.setattr(contrast, "load_prompts", lambda path: shipsfast.load_prompts(path)[:5])
    contrast.run(tmp_path)
    text = (tmp_path / "contrast.md").read_text()
    assert (
        len(re.findall(r"^\| \d+ \| \d-\d \|", text, re.MULTILINE)) == 16
        and "252 relabellings (all there are)" in text
    )
    page = (ROOT / "docs" / "contrast.md").read_text()
    assert page.startswith(contrast.INTRO) and "99,999 relabellings (drawn, seed 0)" in page
    assert (tmp_path / "contrast-village.png").stat().st_size > 5_000


def test_the_training_script_makes_this_tokenizer_and_shape():
    """The training itself takes minutes; what it starts from is what the shipped model has."""
    from tools.village.train import Settings, build_model, build_tokenizer

    settings = Settings()
    tokenizer = build_tokenizer(settings)
    torch.manual_seed(settings.seed)
    model = build_model(settings, tokenizer)
    shipped = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in shipped.state_dict().items()
    }
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(demo.MODEL).get_vocab()
