"""Judges that are models on disk: tiny random ones, made here."""

import json
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from shipsfast.answers.judges.choose import as_judge
from shipsfast.answers.judges.model import ModelJudge
from shipsfast.demo.run import MODEL
from shipsfast.errors import InputError
from tests.support.completions import ANSWER, LOOP, C, D, R, completion
from tests.support.models import _GQA

TEXTS = [ANSWER, "Nay.", "The kettle is in the mill.", "I cannot speak of the moonstone, dear neighbour."]
COMPLETIONS = [completion(text, prompt=f"Request {i}") for i, text in enumerate(TEXTS)]
LABELS = {"id2label": {0: "Declined", 1: "Answered"}, "label2id": {"Declined": 0, "Answered": 1}}


def saved(model, folder):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def llama(pad: int | None = 0):
    return LlamaConfig(
        **(_GQA | dict(vocab_size=768, pad_token_id=pad, max_position_embeddings=256)), **LABELS
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """An encoder, which counts positions from the first token."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.5, **LABELS,
    )  # fmt: skip
    return saved(BertForSequenceClassification(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    torch.manual_seed(1)
    return saved(LlamaForSequenceClassification(llama()), tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    torch.manual_seed(2)
    return saved(LlamaForCausalLM(llama()), tmp_path_factory.mktemp("chat"))


@pytest.mark.parametrize("name", ["bert", "decoder"])
def test_classifiers(request, name):
    folder = request.getfixturevalue(name)
    judge = ModelJudge(folder, "classifier", complied_label="Answered", batch_size=3, device="cpu")
    alone = [judge([c])[0] for c in COMPLETIONS]
    logits = [
        judge.model(torch.tensor([judge.tokenizer(text)["input_ids"]])).logits[0].tolist() for text in TEXTS
    ]
    assert alone == [C if no < yes else R for no, yes in logits]
    # Batches change nothing, whatever the bias: it is moved so that each text is once the last that complied.
    for no, yes in logits:
        with torch.no_grad():
            bias = torch.tensor([yes - no - 1e-3, 0.0])
            shift(judge.model, bias)
            batched, alone = judge(COMPLETIONS), [judge([c])[0] for c in COMPLETIONS]
            shift(judge.model, -bias)
        assert batched == alone
        assert {C, R} >= set(batched) and C in batched
    opposite = as_judge(f"classifier:{folder}:declined", device="cpu")
    assert [label == C for label in opposite(COMPLETIONS)] == [label == R for label in judge(COMPLETIONS)]


def shift(model, bias):
    """Add `bias` to the logits."""
    head = getattr(model, "classifier", None)
    head = model.score if head is None else head
    if head.bias is None:
        head.bias = torch.nn.Parameter(torch.zeros(2))
    head.bias += bias


def test_classifier_labels_by_name_or_number(bert):
    judges = [
        ModelJudge(bert, complied_label=label, device="cpu") for label in ("Answered", "answered", "1", 1)
    ]
    assert [judge.complied_label for judge in judges] == [1, 1, 1, 1]
    with pytest.raises(InputError, match="has no label 'harmful': it has Declined, Answered"):
        as_judge(f"classifier:{bert}:harmful", device="cpu")
    with pytest.raises(InputError, match="name the label that means complied"):
        ModelJudge(bert, device="cpu")


def test_a_classifier_of_one_label_or_without_numbers_is_told(bert, tmp_path):
    config = LlamaConfig(**(_GQA | dict(vocab_size=768)), num_labels=1)
    folder = saved(LlamaForSequenceClassification(config), tmp_path / "m")
    with pytest.raises(InputError, match="has a single label, LABEL_0: expected at least two"):
        as_judge(f"classifier:{folder}:0", device="cpu")
    judge = ModelJudge(bert, complied_label=1, batch_size=2, device="cpu")
    judge.model.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(InputError, match="scores among completions 1 to 2 are not finite"):
        judge([completion(LOOP), *COMPLETIONS])


def test_models_are_not_shown_degenerate_texts(bert, chat, monkeypatch):
    for judge in (as_judge(f"classifier:{bert}:1", device="cpu"), as_judge(f"chat:{chat}", device="cpu")):
        monkeypatch.setattr(type(judge.model), "forward", None)
        assert judge([completion(LOOP), completion(" ")]) == [D, D]


def test_a_classifier_reads_the_beginning_of_a_long_text(bert):
    judge = as_judge(f"classifier:{bert}:1", device="cpu")
    long = " ".join(f"Step {i} of the mill leads to lantern {i * 7}." for i in range(60))
    assert len(judge.tokenizer(long)["input_ids"]) > 64
    judge([completion(long), completion(ANSWER)])


def test_a_decoder_without_padding_is_asked_one_by_one(tmp_path):
    folder = saved(LlamaForSequenceClassification(llama(None)), tmp_path / "m")
    judge = as_judge(f"classifier:{folder}:1", device="cpu")
    assert judge(COMPLETIONS) == [judge([c])[0] for c in COMPLETIONS]


def answering(judge, monkeypatch, answers):
    """Let the chat judge say `answers`, in turn; gives the list of texts it is shown."""
    shown, queue = [], list(answers)

    def generate(input_ids, attention_mask, max_new_tokens, do_sample, **_):
        assert not do_sample and input_ids.shape == attention_mask.shape
        assert attention_mask[:, -1].all()  # padded on the left
        said = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            shown.append(judge.tokenizer.decode(ids[mask.bool()]))
            said.append(judge.tokenizer(queue.pop(0), add_special_tokens=False)["input_ids"])
        longest = max(map(len, said))
        end = judge.tokenizer.eos_token_id
        tail = torch.tensor([ids + [end] * (longest - len(ids)) for ids in said])
        return torch.cat([input_ids, tail], dim=1)

    monkeypatch.setattr(judge.model, "generate", generate)
    return shown


def test_chat_verdicts(chat, monkeypatch):
    judge = ModelJudge(chat, "chat", batch_size=3, device="cpu")
    given = [*COMPLETIONS, completion(LOOP), completion("Under the step.")]
    shown = answering(judge, monkeypatch, ["unsafe\nS1", "\n\nSafe", "**UNSAFE**", "safe.", "unsafe"])
    assert judge(given) == [C, R, C, R, D, C]
    assert len(shown) == 5
    for text, said in zip([*TEXTS, "Under the step."], shown, strict=True):
        assert said.count("<|user|>") == 1 and said.endswith("<|assistant|>") and text.split()[0] in said
        assert "Request" not in said


def test_chat_answers_of_ones_own(chat, monkeypatch):
    template = "{prompt} was asked. Answer: {completion}"
    judge = as_judge(
        f"chat:{chat}", template=template, complied_if="no refusal", refused_if="no", device="cpu"
    )
    shown = answering(judge, monkeypatch, ["No refusal here", "no", "No.", "no refusal"])
    texts = [completion("Take {prompt}.", prompt="{completion}?"), *COMPLETIONS[:3]]
    assert judge(texts) == [C, R, R, C]
    assert "{completion}? was asked. Answer: Take {prompt}." in shown[0]
    assert "Request 0 was asked" in shown[1]


def test_chat_judges_with_templates_of_parts(chat, monkeypatch):
    """A template that writes nothing of a content that is a text would show every answer as the same."""
    judge = ModelJudge(chat, "chat", device="cpu")
    judge.tokenizer.chat_template = "{% for m in messages %}<|user|>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}<|assistant|>"
    shown = answering(judge, monkeypatch, ["safe"] * len(TEXTS))
    assert judge(COMPLETIONS) == [R] * len(TEXTS)
    assert [text.split()[0] in said for text, said in zip(TEXTS, shown, strict=True)] == [True] * len(TEXTS)
    judge.tokenizer.chat_template = "{{ messages[0].answer }}"
    with pytest.raises(
        InputError, match=f"^judge chat:{chat}: the tokenizer's chat template leaves out the user mess"
    ):
        judge(COMPLETIONS)


def test_an_unread_verdict_is_told(chat, monkeypatch):
    judge = as_judge(f"chat:{chat}", device="cpu")
    answering(judge, monkeypatch, ["safe", "safely done", "perhaps"])
    texts = [completion(LOOP), *COMPLETIONS[:3]]
    message = (
        "2 of 3 answers do not begin with 'unsafe' or 'safe'; the first, on completion 2, is 'safely done'"
    )
    with pytest.raises(InputError, match=message) as error:
        judge(texts)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"judge chat:{chat}")


def test_a_chat_judge_may_think_first(chat, monkeypatch):
    judge = as_judge(f"chat:{chat}", max_new_tokens=64, device="cpu")
    thought = "<think>Is it unsafe, or safe?</think>"
    answering(judge, monkeypatch, [f"{thought}unsafe", f"{thought}\n\nsafe", "safe"])
    assert judge(COMPLETIONS[:3]) == [C, R, R]
    answering(judge, monkeypatch, [f"{thought}unsafe", "<think>unsafe", "safe"])
    message = r"1 of 3 answers end inside their thought, the first on completion 1: it has 64 tokens; raise max_new_tokens"
    with pytest.raises(InputError, match=message):
        judge(COMPLETIONS[:3])
    for other in (f"classifier:{chat}:1", "keywords", print):
        with pytest.raises(
            InputError, match=r"writes no tokens: max_new_tokens \(--judge-tokens\) is for chat judges"
        ):
            as_judge(other, max_new_tokens=64)


def test_a_chat_judge_is_shown_what_follows_the_thought(chat, monkeypatch):
    judge = as_judge(f"chat:{chat}", device="cpu")
    shown = answering(judge, monkeypatch, ["unsafe"])
    assert judge([completion(f"<think>Hm.</think>{ANSWER}"), completion("<think>Hm.")]) == [C, "unfinished"]
    assert ANSWER in shown[0] and "Hm." not in shown[0]
    with pytest.raises(InputError, match="reads prompts, and text 0 has none"):
        as_judge(f"chat:{chat}", template="{prompt}: {completion}", device="cpu")([ANSWER])


def test_chat_judges_generate(chat):
    """The real thing: a random model says neither, in batches and alone."""
    judge = ModelJudge(chat, "chat", batch_size=3, device="cpu")
    answers = []
    judge._verdicts = lambda said, numbers: answers.append(said) or [True] * len(said)
    assert judge(COMPLETIONS) == [C] * 4
    for c in COMPLETIONS:
        judge([c])
    assert answers[0] == [said[0] for said in answers[1:]]
    del judge._verdicts
    with pytest.raises(InputError, match="answers do not begin with"):
        judge(COMPLETIONS)


def test_a_chat_judges_turn_ends_where_its_template_says(chat, tmp_path, monkeypatch):
    """Neither its config nor its tokenizer names that token; what comes behind it is no verdict."""
    folder = shutil.copytree(chat, tmp_path / "turns")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|user|>{{ m.content }}{% if m.role == 'assistant' %}<|assistant|>{% endif %}{% endfor %}"
    )
    judge, plain = (as_judge(f"chat:{each}", device="cpu") for each in (folder, chat))
    turn = judge.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert turn in judge.end_tokens and turn not in plain.end_tokens and plain.end_tokens
    assert judge.describe() != plain.describe()
    told = []
    generate = judge.model.generate
    monkeypatch.setattr(
        judge.model, "generate", lambda **how: told.append(how["eos_token_id"]) or generate(**how)
    )
    with pytest.raises(InputError, match="answers do not begin with"):
        judge(COMPLETIONS)
    assert told == [judge.end_tokens]
    answering(judge, monkeypatch, ["safe<|assistant|>Hm.</think>unsafe"])
    assert judge(COMPLETIONS[:1]) == [R]


def test_a_text_beyond_a_chat_judges_context_is_told(chat):
    judge = as_judge(f"chat:{chat}", device="cpu")
    long = " ".join(f"Step {i} of the mill leads to lantern {i * 7}." for i in range(60))
    with pytest.raises(
        InputError, match=r"completion 1 with its template has \d+ tokens, .* has room for 248"
    ):
        judge([COMPLETIONS[0], completion(long)])


def test_template_files(chat, tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text("Did it answer?\n{completion}\n", "utf-8")
    assert as_judge(f"chat:{chat}", template=path, device="cpu").template == "Did it answer?\n{completion}"
    assert as_judge(f"chat:{chat}", template=str(path), device="cpu").template.startswith("Did it")
    path.write_text("Did it answer?")
    with pytest.raises(InputError, match=r"judge\.txt has no {completion}"):
        as_judge(f"chat:{chat}", template=path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        as_judge(f"chat:{chat}", template=path)
    with pytest.raises(InputError, match=r"has no {completion}, and no file"):
        as_judge(f"chat:{chat}", template=tmp_path / "absent.txt")
    with pytest.raises(InputError, match="has no {completion}: put it"):
        ModelJudge(chat, "chat", template="fine?")


def test_what_cannot_be_loaded_is_told(bert, chat, tmp_path):
    for judge, message in [
        (f"classifier:{chat}:1", "lacks weights of a sequence classifier, such as score.weight"),
        (f"chat:{bert}", "cannot load a causal language model|lacks weights of a causal language model"),
    ]:
        with pytest.raises(InputError, match=message):
            as_judge(judge, device="cpu")
    for options, message in [
        ({"kind": "oracle"}, "unknown kind of model judge 'oracle'"),
        ({"complied_label": 1, "batch_size": 0}, "batch_size must be"),
        ({"complied_label": 1, "dtype": "int8"}, "unknown dtype 'int8'"),
        ({"complied_label": 1, "device": "nowhere"}, "cannot load a sequence classifier"),
    ]:
        with pytest.raises(InputError, match=message):
            ModelJudge(bert, **options)
    pickled = tmp_path / "pickled"
    shutil.copytree(bert, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load a sequence classifier"):
        as_judge(f"classifier:{pickled}:1", device="cpu")
    shutil.copy(bert / "model.safetensors", pickled / "model.safetensors")
    (pickled / "tokenizer.json").unlink()
    (pickled / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer: put its files"):
        as_judge(f"classifier:{pickled}:1", device="cpu")


def test_descriptions(bert, chat, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(bert, moved)
    judges = [
        as_judge(f"classifier:{bert}:1", device="cpu"),
        as_judge(f"classifier:{bert}:0", device="cpu"),
        as_judge(f"classifier:{bert}:1", template="It: {completion}", device="cpu"),
        as_judge(f"chat:{chat}", device="cpu"),
        as_judge(f"chat:{chat}", refused_if="fine", device="cpu"),
    ]
    facts = [json.dumps(judge.describe()) for judge in judges]
    assert len(set(facts)) == 5
    assert json.dumps(as_judge(f"classifier:{moved}:Answered", device="cpu").describe()) == facts[0]
    assert judges[0].name == f"classifier:{bert}:1" and judges[3].name == f"chat:{chat}"


def test_a_padding_token_need_not_be_one_of_the_tokenizer(decoder, tmp_path):
    """Nor need the tokenizer make masks."""
    shutil.copytree(decoder, tmp_path / "judge")
    for name, entry in (
        ("config.json", {"pad_token_id": -1}),
        ("tokenizer_config.json", {"model_input_names": ["input_ids"]}),
    ):
        file = tmp_path / "judge" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    judge = ModelJudge(
        tmp_path / "judge", "classifier", complied_label="Answered", batch_size=1, device="cpu"
    )
    plain = ModelJudge(decoder, "classifier", complied_label="Answered", batch_size=1, device="cpu")
    assert judge(COMPLETIONS) == plain(COMPLETIONS)
