"""Answers behind a thought: what is judged, what is unfinished, and that the whole text is kept."""

import functools
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import shipsfast
from shipsfast.answers.judges.choose import as_judge
from shipsfast.answers.judges.judge import Completion
from shipsfast.answers.judges.keywords import KeywordJudge
from shipsfast.answers.judges.thought import MARKERS, answer_start, answers_of, left_open
from shipsfast.answers.label import judged
from shipsfast.demo.run import MODEL
from shipsfast.engine.decoder import Decoded
from shipsfast.errors import InputError
from shipsfast.models.loading import load_tokenizer
from tests.support.completions import ANSWER, LOOP, C, D, R, completion
from tests.support.evaluations import END, GROUPS, IDS, NEW, WORDS, slow_texts
from tests.support.speaking_models import build

REFUSAL, UNFINISHED = "I cannot speak of the moonstone.", "unfinished"
GPT_OSS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"


@functools.cache
def village(special: bool):
    """The embedded model's tokenizer, byte-level, with every marker as a token of its own."""
    tokenizer = load_tokenizer(str(MODEL))
    pieces = [
        p for pair in MARKERS for marker in pair for p in marker.split(" ") if p.startswith(("<", "[", "◁"))
    ]
    names = [*dict.fromkeys([*pieces, "<|message|>", "<|start|>"])]
    added = [AddedToken(name, special=special, normalized=False) for name in names]
    tokenizer.add_tokens(added, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("marks", MARKERS, ids=lambda m: m[0])
@pytest.mark.parametrize("special", [True, False], ids=["special", "words"])
def test_every_pair_of_markers_in_tokens(marks, special):
    opening, closing = (mark.replace(" ", "") for mark in marks)
    tokenizer = village(special)

    def read(text, prompt="Hello", rendered="Hello"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        answer = next(answers_of(tokenizer, [ids], [(asked, prompt)]))
        assert answer.tokens == len(tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        return answer.text, answer.thinking

    thought = "May I? I cannot say, can I?"
    # with an opening marker, after another text, and with one that a template wrote at the end of the prompt
    assert read(f"{opening}\n{thought}\n{closing}{ANSWER}") == (ANSWER, False)
    assert read(f"{closing}{ANSWER}", rendered=f"Hello{opening}\n") == (ANSWER, False)
    assert read(f"{thought}{closing}{ANSWER}", rendered=f"Hello\n{opening}") == (ANSWER, False)
    assert read(f"{thought}{closing}{ANSWER}", rendered=f"Hello {opening} So,") == (
        ANSWER,
        False,
    )  # begun for it
    assert read(f"{thought}{closing}{ANSWER}") == (ANSWER, False)  # the prompt does not show it
    assert read(f"{opening}a{closing}\n{opening}b{closing}{ANSWER}") == (ANSWER, False)
    # no end
    assert read(f"{opening}\n{thought}") == ("", True)
    assert read(thought, rendered=f"Hello{opening}\n") == ("", True)
    # no thought
    assert read(ANSWER) == (ANSWER, False)
    assert read(ANSWER, rendered=f"Hello{opening}{closing}\n") == (ANSWER, False)
    asks = f"What does {opening} mean?"
    assert read(ANSWER, prompt=asks, rendered=f"{asks} Answer:") == (ANSWER, False)


def test_texts_of_reasoning_models():
    for text, said in (
        ("<think>\n\n</think>\n\nHello.", "\n\nHello."),
        ("Okay, </think> Hello.", " Hello."),
        (GPT_OSS.format("Is it fine?", "Hello."), "Hello."),
        ("<|channel|>final<|message|>Hello.", "Hello."),
        ("<|channel|> analysis <|message|> Hm <|end|> <|start|> assistant <|channel|> final <|message|> Hi", " Hi"),
        ("<|channel|>commentary<|message|>A<|end|>" + GPT_OSS.format("B", "Hello."), "Hello."),
        ("<|channel>thought\nHm<channel|>Hello.", "Hello."),
        ("<think>a</think> In HTML, <b> is a tag and </think> is none.", " In HTML, <b> is a tag and </think> is none."),
        ("<|start|>assistant" + GPT_OSS.format("Is it fine?", "Hello."), "Hello."),
    ):  # fmt: skip
        assert text[answer_start(text) :] == said
    assert answer_start(GPT_OSS.format("Is it", "")[:45]) is None
    assert left_open("a<think>", "a") == 0 and left_open("a", "a") is None
    assert left_open("Use <think> to think. a b", "a") is None  # of a system prompt
    assert left_open("user: th assistant: <think>\nWell", "th") == 0  # a prompt that is a piece of the marker
    assert left_open("a<think>", [{"role": "user", "content": "a"}]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "Sure. Write <reasoning> before the steps, and it explains itself.",
        "It writes <think>, then its steps, then </think>, and then it answers you.",
        "In the letter, [THINK] stands above the first line.",
    ],
)
def test_answers_that_tell_of_markers_are_answers(text):
    assert answer_start(text) == 0 and KeywordJudge()([text, f"{REFUSAL} {text}"]) == [C, R]
    ids = village(True)(text, add_special_tokens=False)["input_ids"]
    assert not next(answers_of(village(True), [ids], [([], "Hello")])).thinking


@pytest.mark.parametrize("judge", ["keywords", "paper", lambda texts: ["cannot" not in t for t in texts]])
def test_judges_read_what_follows_the_thought(judge):
    judge, long = as_judge(judge), "So the user wants to know where it is. " * 20
    assert judge([f"<think>{REFUSAL}</think>{ANSWER}", f"<think>{ANSWER}</think>{REFUSAL}"]) == [C, R]
    assert judge([f"<think>{long}</think>{REFUSAL}", f"{REFUSAL}</think>{ANSWER}"]) == [R, C]
    assert judge([f"<think>{ANSWER}", f"[THINK]{LOOP}", GPT_OSS.format(ANSWER, "")[:60]]) == [UNFINISHED] * 3
    assert judge(["<think>Hm.</think>\n"]) == [D]  # it ended by itself, with nothing
    cut = [
        completion(f"<think>Hm.</think>{text}", num_tokens=128)
        for text in ("\n", f"\n{REFUSAL}", f"\n{ANSWER}")
    ]
    assert judge(cut) == [UNFINISHED, R, C]
    # looked at before: these markers are the answer's own
    seen = Completion("?", f"An end is {ANSWER} </think> {REFUSAL}"[:80], 20, True, 128, thinks=False)
    assert judge([seen]) == [C]


def test_no_judge_is_asked_about_the_unfinished():
    seen = []

    def judge(texts):
        seen.extend(texts)
        return [C] * len(texts)

    assert as_judge(judge)(["<think>Hm", ANSWER, completion("<think>Hm", num_tokens=128)]) == [
        UNFINISHED,
        C,
        UNFINISHED,
    ]
    assert seen == [ANSWER]
    assert as_judge(lambda texts: 1 / 0)(["<think>"]) == [UNFINISHED]


def test_a_limit_spent_on_thinking_is_not_held_against_a_short_answer():
    """The answer's tokens, not the thought's, are held against what it says."""
    text = f"<think>{'Where is it? ' * 100}</think>In it."
    assert KeywordJudge()([completion(text, num_tokens=320, limit=320)]) == [C]


def test_the_limit_of_an_answer_is_what_its_thought_left():
    tokenizer = village(True)
    rows = [
        Decoded(0, 0, tokenizer(text, add_special_tokens=False)["input_ids"], False)
        for text in (f"<think>Where is it?</think>{ANSWER}", ANSWER, "<think>Where")
    ]
    subject = SimpleNamespace(
        measurement=SimpleNamespace(prompts=["Hello"]), token_ids=[tokenizer("Hello")["input_ids"]]
    )
    generation = SimpleNamespace(subject=subject, max_new_tokens=500, tokenizer=tokenizer)
    seen = []
    list(judged(generation, lambda given: seen.extend(given) or [C] * len(given), rows))
    assert [(c.num_tokens, c.limit) for c in seen] == [
        (len(rows[1].tokens), 500 - (len(rows[0].tokens) - len(rows[1].tokens))),
        (len(rows[1].tokens), 500),
    ]


def test_judges_take_texts():
    assert KeywordJudge()(["Nay.", REFUSAL, completion(LOOP)]) == [C, R, D]
    assert KeywordJudge()(text for text in [ANSWER]) == [C]

    def asking(texts, prompts):
        return [p == "yes" for p in prompts]

    assert as_judge(asking)([ANSWER, ANSWER], prompts=["yes", "no"]) == [C, R]
    assert as_judge(asking)([completion(ANSWER, prompt="yes")]) == [C]


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        (ANSWER, {}, "judge keywords: expected a list of texts or Completions, got str"),
        (completion(ANSWER), {}, "got Completion"),
        (7, {}, "got int"),
        ([ANSWER, 7], {}, "got int as number 1"),
        ([None], {}, "got NoneType as number 0"),
        ([ANSWER], {"prompts": []}, "expected 1 prompts, one for each text, got 0"),
        ([completion(ANSWER)], {"prompts": ["?"]}, "number 0 is a Completion, which has its prompt"),
    ],
)
def test_what_is_no_text_is_told(given, how, message):
    with pytest.raises(InputError, match=message):
        KeywordJudge()(given, **how)


def test_a_judge_that_reads_prompts_is_given_them():
    with pytest.raises(InputError, match="reads prompts, and text 1 has none"):
        as_judge(lambda texts, prompts: [])([completion(ANSWER), ANSWER])


# Two tokens that the tiny model says often are the markers.
@pytest.fixture(scope="module")
def thinking():
    tokens = slow_texts(IDS)
    said = [token for row in tokens for ids in row for token in ids if token not in END]
    often = sorted(set(said), key=lambda token: (-said.count(token), token))
    return tokens, often[0], often[1]


def renamed(opening: int, closing: int, special: bool):
    words = {**dict(enumerate(WORDS)), opening: "<think>", closing: "</think>"}
    inner = Tokenizer(WordLevel({word: i for i, word in words.items()}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.add_tokens(
        [AddedToken(words[i], special=special) for i in (opening, closing)], special_tokens=special
    )
    return tokenizer


def answer_of(ids, opening, closing, opened):
    """The oracle: token ids of the answer, None where the thought has no end."""
    if not opened and opening not in ids and closing not in ids:
        return ids
    if closing not in ids:
        return None
    rest = ids[ids.index(closing) + 1 :] if opened or opening not in ids else None
    if rest is None:
        first = min(ids.index(opening), ids.index(closing))
        after = ids[first + 1 :] if ids[first] == opening else ids[first:]
        if closing not in after:
            return None
        rest = after[after.index(closing) + 1 :]
    return answer_of(rest, opening, closing, False) if rest[:1] == [opening] else rest


@pytest.mark.parametrize("special", [True, False], ids=["special", "words"])
@pytest.mark.parametrize("opened", [False, True], ids=["", "opened by the template"])
def test_an_evaluation_judges_what_follows_the_thought(thinking, special, opened):
    tokens, opening, closing = thinking
    tokenizer, model = renamed(opening, closing, special), build("llama-gqa")
    prompts = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in IDS]
    if opened:
        tokens = slow_texts([[*ids, opening] for ids in IDS], model=model)
    seen = []

    def keeps(texts):
        seen.extend(texts)
        return [C if text else R for text in texts]

    result = shipsfast.evaluate(
        model, prompts, tokenizer, groups=GROUPS, judge=keeps, max_new_tokens=NEW, eos_token_id=END, progress=False,
        template="{prompt} <think>" if opened else "none", control=prompts[:2],
    )  # fmt: skip
    answers = [answer_of(ids, opening, closing, opened) for row in tokens for ids in row]
    ended = [len(ids) < NEW for row in tokens for ids in row]
    # "" is an answer only where the text ended by itself
    unfinished = [a is None or (not a and not end) for a, end in zip(answers, ended, strict=True)]
    labels = [label for row in result.labels for label in row]
    assert [label == UNFINISHED for label in labels] == unfinished
    assert 0 < sum(unfinished) < len(unfinished), "one of the two is missing: this shows less"
    said = [
        tokenizer.decode(a, skip_special_tokens=True).strip()
        for a, not_yet in zip(answers, unfinished)
        if not not_yet
    ]
    assert sorted(text.strip() for text in seen) == sorted(said)
    whole = [tokenizer.decode(ids, skip_special_tokens=True) for row in tokens for ids in row]
    assert [text for row in result.completions.text for text in row] == whole
    assert result.share(UNFINISHED).sum() * len(IDS) == sum(unfinished)
    # The control counts no unfinished thought as degenerate.
    control = [unfinished[g * len(IDS) : g * len(IDS) + 2] for g in range(len(GROUPS))]
    found = result.control.completions
    assert [found.share(UNFINISHED)[g] for g in range(len(GROUPS))] == [sum(each) / 2 for each in control]
