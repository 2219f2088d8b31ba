"""Prompts through chat templates of other people: nothing of them is lost, and no day changes them."""

import pytest

from shipsfast.errors import InputError
from shipsfast.prompts.tokens import as_prompts, tokenised, tokenize
from shipsfast.prompts.wrapping import DATE, TemplateArgs, Wrapping
from tests.support import tokenizers

PROMPTS = ["How do I mend a kettle?", "Tell me a story."]
# As templates of vision-language models, which write nothing of a content that is a text.
PARTS = tokenizers.CHATML.replace(
    "{{ m.content }}",
    "{% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
)
MIXED = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{% if m.role == 'system' %}{{ m.content | trim }}{% else %}"
    "{{ m.content[0].text }}{% endif %}<|end|>{% endfor %}<|user|>assistant"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + tokenizers.CHATML
)
DATED = tokenizers.DATE + tokenizers.CHATML


def text_of(template: str, prompts=PROMPTS, **how) -> tuple[list[str], object]:
    """What the prompts are as text in a chat template, and all that is known of their tokens."""
    tokenizer = tokenizers.of_bytes(chat_template=template)
    found = tokenised(tokenizer, as_prompts(prompts), Wrapping("chat", **how))
    return [tokenizer.decode(ids) for ids in found.ids], found


def chatml(prompt: str, before: str = "", after: str = "") -> str:
    return f"<s>{before}<|user|>user\n{prompt}<|end|><|user|>assistant\n{after}"


@pytest.mark.parametrize(("template", "content"), [(tokenizers.CHATML, "text"), (PARTS, "parts")])
def test_contents_are_handed_over_as_the_template_reads_them(template, content):
    texts, found = text_of(template)
    assert texts == [chatml(prompt) for prompt in PROMPTS]
    assert found.record["content"] == content and found.notes == []


def test_a_system_message_as_text_beside_parts():
    texts, found = text_of(MIXED, system="Be brief.")
    assert texts[0] == f"<|user|>system\nBe brief.<|end|><|user|>user\n{PROMPTS[0]}<|end|><|user|>assistant"
    assert found.record["content"] == "parts, system as text"


@pytest.mark.parametrize("prompts", [PROMPTS, ["a", "you"]])  # short ones are in every text
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}you are a machine {{ messages[0].text }}", "leaves out the user message, as text and as a list"),
        ("{{ messages[0]['content'].upper() }}", "leaves out the user message"),
        ("{% if messages %}{{ messages.nothing.more }}{% endif %}", "chat template failed: .* has no attribute 'nothing'"),
        ("{{ messages", "chat template failed: unexpected"),
        ("{{ raise_exception('not today') }}", "chat template failed: not today"),
        ("{{ messages[0].content }}{{ range(99999) | random }}", "writes something else each time"),
        (
            "you {% for m in messages %}{% if 'probe' in m.content %}{{ m.content }}{% endif %}{% endfor %} a How",
            "does not write the user message of prompt 0 as it is",
        ),
    ],
)  # fmt: skip
def test_templates_that_lose_the_prompt_are_refused(template, message, prompts):
    with pytest.raises(InputError, match=message):
        text_of(template, prompts)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM, "chat template failed: System role not supported"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the system message, as text and as a list of parts: leave the system message out",
        ),
    ],
)
def test_templates_that_lose_the_system_message_are_refused(template, message):
    text_of(template)
    for system in ("Be brief.", ""):
        with pytest.raises(InputError, match=message):
            text_of(template, system=system)


@pytest.mark.parametrize(
    "prompt", ["  padded \n", "two\n\n lines", 'a "quoted" word', "C:\\path\t{x}", "ünï 💡"]
)
@pytest.mark.parametrize(
    "template", [".strip()", " | trim", " | tojson", " | replace('\n', ' ')"], ids=["strip", "trim", "json", "lines"]
)  # fmt: skip
def test_white_space_and_quotes_are_the_templates_own(template, prompt):
    text_of(tokenizers.CHATML.replace("m.content", "m.content" + template), [prompt])


def test_an_earlier_answer_may_lose_its_thoughts():
    template = tokenizers.CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    said = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "<think>Hm.</think>Hello yourself."},
        {"role": "user", "content": "Tell me more."},
    ]
    assert "<|user|>assistant\nHello yourself.<|end|>" in text_of(template, [said])[0][0]
    said[2]["content"] = "What does </think> mean?"
    with pytest.raises(InputError, match="does not write the user message of prompt 0"):
        text_of(template, [said])


def test_system_prefix_and_arguments():
    template = (
        tokenizers.CHATML + "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{{ note }}"
    )
    args = TemplateArgs.parse(["enable_thinking=false", "note=[a=b"])
    texts, found = text_of(template, system="Be brief.", prefix="Sure, ", args=args)
    before = "<|user|>system\nBe brief.<|end|>"
    assert texts == [chatml(prompt, before, "<think></think>[a=bSure, ") for prompt in PROMPTS]
    record = {
        "system": "Be brief.",
        "prefix": "Sure, ",
        "template_args": {"enable_thinking": False, "note": "[a=b"},
    }
    assert found.record.items() >= (record | {"template": "chat", "prompts": "text"}).items()


def test_arguments_that_the_template_does_not_read_are_refused():
    with pytest.raises(InputError, match="chat template does not read enable_thinkng"):
        text_of(tokenizers.CHATML + "{{ enable_thinking }}", args=TemplateArgs({"enable_thinkng": False}))


def test_no_day_changes_a_prompt(monkeypatch):
    found = []
    for year in (2030, 2031):
        tokenizers.set_clock(monkeypatch, year)
        tokenizer = tokenizers.of_bytes(chat_template=DATED)
        plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False)
        assert f"Today: 04 Mar {year}, soon {year + 1}\n" in plain  # what the template would do
        found.append(tokenised(tokenizer, PROMPTS, "chat"))
        # Beside the date not a character differs.
        ours = tokenizer.decode(tokenize(tokenizer, ["Hi."], "chat")[0])
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True
        )
        assert ours == theirs.replace(f"04 Mar {year}", "26 Jul 2024").replace(str(year + 1), "2025")
    assert found[0].ids == found[1].ids
    assert found[0].record["template_date"] == DATE == "2024-07-26"
    assert f"it is {DATE} on every day" in found[0].notes[0] and "--template-date" in found[0].notes[0]


def test_a_date_of_ones_own():
    texts, found = text_of(DATED, date="2031-12-01")
    assert "Today: 01 Dec 2031, soon 2032\n" in texts[0] and found.record["template_date"] == "2031-12-01"


def test_templates_that_read_no_clock_have_no_date():
    for template, args in (
        (tokenizers.CHATML, {}),
        (DATED.replace("soon {{ year() }}", ""), {"date_string": "now"}),
    ):
        _, found = text_of(template, args=TemplateArgs(args))
        assert "template_date" not in found.record and found.notes == []


def test_a_date_of_a_made_up_format_is_refused():
    with pytest.raises(InputError, match="makes up a format of dates"):
        text_of("{{ strftime_now('%' ~ 'Y') }}" + tokenizers.CHATML)


def test_named_templates_are_the_default_one():
    tokenizer = tokenizers.of_bytes(chat_template={"default": tokenizers.CHATML, "tool_use": "{{ tools }}"})
    assert tokenizer.decode(tokenize(tokenizer, ["Hi."], "chat")[0]) == chatml("Hi.")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"template": "none", "system": "x"}, r"system \(--system\) is for chat templates, .* is 'none'"),
        (
            {"template": "Q: {prompt}", "args": TemplateArgs({"a": 1})},
            r"template_args \(--template-arg\) is for chat",
        ),
        ({"template": "Q:"}, "unknown template 'Q:'"),
        (
            {"template": "chat", "date": "today"},
            "template_date .* must be a date such as 2024-07-26, got 'today'",
        ),
        ({"template": "chat", "system": 3}, "system must be a text, got int"),
        ({"template": "chat", "prefix": None}, "prefix must be a text, got NoneType"),
    ],
)
def test_what_cannot_be_around_a_prompt(how, message):
    with pytest.raises(InputError, match=message):
        Wrapping(**how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "messages is not the template's to read"),
        ({"a b": 1}, "'a b' is no name"),
        ({"a": object()}, "must be JSON"),
        ({"a": float("nan")}, "must be JSON"),
        (["a=1"], "must be a mapping"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(InputError, match=message):
        TemplateArgs(given)


def test_arguments_as_text():
    parsed = TemplateArgs.parse(["a=1", "b=true", "c=word", 'd=["x"]', "e=", "f=01", "g=x=y"])
    assert parsed.to_json() == {"a": 1, "b": True, "c": "word", "d": ["x"], "e": "", "f": "01", "g": "x=y"}
    assert parsed == TemplateArgs(parsed) and hash(parsed) == hash(TemplateArgs(parsed))
    for given, message in ((["a"], "a has no ="), (["a=1", "a=2"], "a=2 is given twice")):
        with pytest.raises(InputError, match=message):
            TemplateArgs.parse(given)
