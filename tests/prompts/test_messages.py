"""Chat messages as prompts."""

import dataclasses
import json

import numpy as np
import pytest

from shipsfast import Ablation, InputError
from shipsfast.answers.measurements import EvaluationMeasurement
from shipsfast.prompts.messages import Message, prompt_text
from shipsfast.prompts.tokens import as_prompts, tokenize
from shipsfast.scans.measurements import ShipsMeasurement
from tests.support import tokenizers

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "How do I mend a kettle?"},
]
ONE = [{"role": "user", "content": "Tell me a story."}]
WHOLE = (
    "<s><|user|>system\nBe brief.<|end|><|user|>user\nHello.<|end|><|user|>assistant\nGood day.<|end|>"
    "<|user|>user\nHow do I mend a kettle?<|end|><|user|>assistant\n"
)


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize(
    "given",
    [
        [TURNS, ONE],
        [{"messages": TURNS}, {"messages": ONE}],
        [tuple(TURNS), np.array(ONE)],
        [[{**m, "name": None, "content": parts(m["content"])} for m in said] for said in (TURNS, ONE)],
    ],
    ids=["lists", "objects", "arrays", "parts"],
)
def test_conversations_in_every_form(given):
    prompts = as_prompts(given)
    assert prompts == as_prompts([TURNS, ONE]) == as_prompts(prompts)
    assert len({prompts, as_prompts(prompts)}) == 1
    assert [prompt_text(prompt) for prompt in prompts] == ["How do I mend a kettle?", "Tell me a story."]
    tokenizer = tokenizers.of_bytes()
    ids = tokenize(tokenizer, prompts, "chat")
    assert tokenizer.decode(ids[0]) == WHOLE
    assert ids[1:] == tokenize(tokenizer, ["Tell me a story."], "chat")


def test_in_measurements():
    source = Ablation("mean", prompts=[ONE])
    given = EvaluationMeasurement(
        prompts=[TURNS, ONE],
        control=[ONE],
        template="chat",
        prefix="Sure",
        template_args={"a": [1, None]},
        ablation=source,
    )
    body = json.loads(json.dumps(given.to_json()))
    assert body["prompts"] == [TURNS, ONE] and body["control"] == body["ablation"]["prompts"] == [ONE]
    assert body["template_args"] == {"a": [1, None]} and body["prefix"] == "Sure"
    again = EvaluationMeasurement.from_json(body)
    assert again == given and hash(again) == hash(given) and again.to_json() == body
    assert dataclasses.replace(given, prompts=["a"]).prompts == ("a",)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (ONE, "prompts is one conversation: make it one prompt of a list"),
        ({"messages": ONE}, "or a conversation as a list of one"),
        ([ONE, "text"], "prompt 1 is no chat messages, and prompt 0 is"),
        (["text", ONE], "prompt 1 is no text, and prompt 0 is"),
        ([ONE, [1, 2]], "prompt 1 is no chat messages"),
        ([[1, 2], ONE], "prompt 1 is neither text nor"),
        ([TURNS[:3]], "prompt 0 ends with the assistant's message.* give what the answer begins with as prefix"),
        ([ONE, TURNS[:1]], "prompt 1 ends with a message of 'system': the last message must be the user's"),
        ([[{"role": "user", "content": " "}]], "prompt 0, message 0 is empty"),
        ([[{"from": "human", "value": "Hello."}]], "is an object with from, value: expected role and content"),
        ([{"prompt": "Hello."}], "prompt 0 is an object with prompt: expected a list of messages"),
        ([{"messages": ONE, "id": 3}], "prompt 0 is an object with messages, id"),
        ([{"messages": []}], "prompt 0 must be a list of at least one message"),
        ([[*ONE, "Hello."]], "prompt 0, message 1 is str: expected an object"),
        ([[{**ONE[0], "tool_calls": [1]}]], "has tool_calls beside role and content, which would be lost"),
        ([[{"role": 3, "content": "Hello."}]], "has the role 3"),
        ([[{"role": "user", "content": b"Hello."}]], "has a content of type bytes: expected a text"),
        ([[{"role": "user", "content": [*parts("Hello."), {"type": "image"}]}]], "has the parts text, image: .* images"),
        ([[Message("user", None)]], "is an object with role: expected role and content"),
        ([[Message("user", " ")]], "prompt 0, message 0 is empty"),
        ([[Message("user", b"Hello.")]], "has a content of type bytes"),
        ([b"Hello."], r"prompt 0 is bytes: decode it to text, prompt.decode\('utf-8'\)"),
        (["Hello.", bytearray(b"Hello.")], "prompt 1 is bytearray"),
        (b"Hello.", "got a single string"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(prompts, message):
    with pytest.raises(InputError, match=message):
        as_prompts(prompts)
    if prompts != b"Hello.":
        with pytest.raises(InputError, match="the prompts of ablation mean must be a list .*: .*" + message):
            Ablation("mean", prompts=prompts)


def test_they_need_a_chat_template():
    for template in ("none", "query-answer", "Q: {prompt}"):
        with pytest.raises(
            InputError, match=r"chat messages, which need template 'chat' \(--template chat\): it is"
        ):
            ShipsMeasurement(prompts=[ONE], template=template)
        with pytest.raises(InputError, match="chat messages, which need template 'chat'"):
            tokenize(tokenizers.of_bytes(), as_prompts([ONE]), template)


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_tokenizer_without_a_template_cannot_write_them(template):
    """Neither way out that there is for texts is one here."""
    tokenizer = tokenizers.of_bytes(chat_template=None)
    with pytest.raises(
        InputError, match="chat messages, and the tokenizer has no chat template .* give texts"
    ):
        tokenize(tokenizer, as_prompts([ONE]), template)


def test_one_system_message():
    with pytest.raises(
        InputError, match=r"prompt 1 has a system message of its own, and system \(--system\) is given"
    ):
        tokenize(tokenizers.of_bytes(), as_prompts([ONE, TURNS]), ShipsMeasurement(
            prompts=[ONE, TURNS], template="chat", system="x").wrapping)  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [{"prefix": "Sure"}, {"system": "", "template": "chat"}, {"template_args": {"a": 1}, "template": "chat"}],
)
def test_nothing_is_put_around_token_ids(how):
    name = next(iter(how))
    with pytest.raises(
        InputError, match=f"prompts are token ids, which are taken as they are: leave {name} out"
    ):
        ShipsMeasurement(prompts=[[1, 2]], **how)


def test_token_ids_are_no_text():
    with pytest.raises(InputError, match="prompts are token ids, and a text is needed"):
        prompt_text(as_prompts([[1, 2]])[0])
