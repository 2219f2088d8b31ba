"""What is put around prompts, from a public function or the command line to tokens, records and answers."""

import json
import shutil

import numpy as np
import pytest

import shipsfast
from shipsfast import Ablation, InputError
from shipsfast.demo.run import MODEL
from shipsfast.models.loading import load_model, load_tokenizer
from tests.support import tokenizers
from tests.support.command_line import refused, run

PROMPTS = ["How could we hide the hushtree?", "Please tell us how to polish the ninthbell."]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_SYSTEM = "<|begin|><|user|>Please tell us<|user|>{prompt}<|assistant|>We"
HOW = dict(template="chat", system="Please tell us", prefix="We")


@pytest.fixture(scope="module")
def village():
    tokenizer = load_tokenizer(str(MODEL))
    tokenizer.chat_template = TEMPLATE
    return load_model(str(MODEL), dtype="float64"), tokenizer


def ids_of(tokenizer, text: str) -> list[list[int]]:
    """By hand."""
    return [
        tokenizer(text.replace("{prompt}", prompt), add_special_tokens=False)["input_ids"]
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("prompts", [PROMPTS, MESSAGES], ids=["texts", "messages"])
def test_a_scan_is_that_of_the_same_tokens(village, prompts):
    model, tokenizer = village
    ids = ids_of(tokenizer, WITH_SYSTEM)
    few = dict(heads=[(0, 2), (3, 1)], progress=False)
    for how in ("undifferentiated", Ablation("mean", prompts=prompts)):
        found = shipsfast.scan(model, prompts, tokenizer, ablation=how, **few, **HOW)
        same = how if how == "undifferentiated" else Ablation("mean", prompts=ids)
        assert np.array_equal(found.kl, shipsfast.scan(model, ids, ablation=same, **few).kl, equal_nan=True)
    form = "messages" if prompts is MESSAGES else "text"
    assert found.record["prompting"] == {
        "template": "chat", "system": "Please tell us", "prefix": "We", "template_args": {}, "prompts": form, "content": "text",
    }  # fmt: skip
    with shipsfast.ablate(model, [(0, 2)], ablation=how, tokenizer=tokenizer, **HOW):
        ours = model(input_ids=model.dummy_inputs["input_ids"] * 0 + 5).logits
    with shipsfast.ablate(model, [(0, 2)], ablation=same):
        theirs = model(input_ids=model.dummy_inputs["input_ids"] * 0 + 5).logits
    assert np.array_equal(ours.detach(), theirs.detach())


def test_an_answer_is_what_follows_the_prefix(village):
    model, tokenizer = village
    whole = shipsfast.generate(model, MESSAGES, tokenizer, template="chat", progress=False)[0]
    prefix = " ".join(whole[0].split()[:3])
    found = shipsfast.generate(model, MESSAGES, tokenizer, template="chat", prefix=prefix, progress=False)[0]
    assert f"{prefix} {found[0].strip()}" == whole[0].strip()


def test_judges_see_the_last_message_of_the_user(village, tmp_path):
    model, tokenizer = village
    seen = []

    def judge(texts, prompts):
        seen.extend(prompts)
        return [True] * len(texts)

    talk = [{"role": "user", "content": "Please."}, {"role": "assistant", "content": "We."}]
    prompts = [talk + said for said in MESSAGES]
    how = dict(template="chat", max_new_tokens=4, judge=judge, progress=False)
    result = shipsfast.evaluate(model, prompts, tokenizer, groups=[[]], control=[talk + MESSAGES[1]], **how)
    assert sorted(seen) == sorted(PROMPTS) and result.prompts == PROMPTS
    seen.clear()
    shipsfast.scan_asr(model, prompts, tokenizer, heads=[(0, 0)], **how)
    assert sorted(seen) == sorted(2 * PROMPTS)
    with pytest.raises(InputError, match="in the control prompts: prompt 0 is bytes"):
        shipsfast.evaluate(model, prompts, tokenizer, control=[b"x"], **how)
    with pytest.raises(InputError, match="judges read texts, so prompts must be strings or chat messages"):
        shipsfast.evaluate(model, [[1, 2]], tokenizer, judge=judge)


@pytest.fixture
def dated(tmp_path):
    """The embedded model with a template that writes the day, and a file of prompts."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(tokenizers.DATE + "{{ note }}" + TEMPLATE)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return folder, tmp_path / "p.txt"


def test_a_run_goes_on_the_next_day(capsys, tmp_path, monkeypatch, dated):
    args = ("scan", *dated, "--out", tmp_path / "run", "--system", "", "--prefix", "We", "-q")
    for year, complete in ((2030, False), (2031, True)):
        tokenizers.set_clock(monkeypatch, year)
        status, text, err = run(capsys, *args)
        assert status == 0, err
        assert ("it was complete" in text) == complete
        assert "the chat template writes today's date: it is 2024-07-26 on every day" in err
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["template"] == "chat"
    assert found["prompting"] == {
        "template": "chat", "system": "", "prefix": "We", "template_args": {}, "prompts": "text", "content": "text",
        "template_date": "2024-07-26",
    }  # fmt: skip
    more = ("--template-date", "2030-01-01", "--template-arg", "note=now")
    status, _, err = run(capsys, *args[:-2], "I", "-q", *more)
    assert status == 2
    for said in (
        "2 of 2 prompts are other tokens", "the prefix there is 'We', here 'I'", "the template date there is '2024-07-26', here",
        "the template args there is {}, here {'note': 'now'}",
    ):  # fmt: skip
        assert said in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--template", "none", "--system", "x"),
            "system (--system) is for chat templates, and the template is 'none'",
        ),
        (("--template-arg", "colour=1"), "the tokenizer's chat template does not read colour"),
        (("--template-arg", "colour"), "--template-arg colour has no =: expected NAME=VALUE"),
        (
            ("--template-date", "soon"),
            "template_date (--template-date) must be a date such as 2024-07-26, got 'soon'",
        ),
        (
            ("--template-date", "20240726"),
            "template_date (--template-date) must be a date such as 2024-07-26, got '20240726'",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(capsys, dated, more, message):
    assert message in refused(capsys, "scan", *dated, *more)
    assert message in refused(capsys, "generate", *dated, *more)


def test_notes_of_prompts_are_one_line_each(capsys, village):
    prompts = ["kettle <|end|>", " kettle  <|end|>", "moon"]
    tokenizer = tokenizers.of_words("kettle", around="<s> $A </s>")
    for ablation in ("zero", Ablation("mean", prompts=["moon", "kettle"])):
        shipsfast.scan(
            village[0],
            prompts,
            tokenizer,
            template="kettle {prompt}",
            ablation=ablation,
            heads=[(0, 0)],
            progress=False,
        )
        assert capsys.readouterr().err.splitlines()[:4] == [
            "shipsfast: the tokenizer appends </s> to a text: left away, so that the prompt ends with its own words",
            "shipsfast: texts of special tokens in prompts are read as these tokens: <|end|> (2)",
            "shipsfast: prompt 2 is nothing but unknown tokens to this tokenizer",
            "shipsfast: prompts 0, 1 are different texts and the same tokens",
        ]
