"""Special tokens around prompts: one BOS, nothing after the prompt, and nothing changed in token ids."""

import pytest
from tokenizers import normalizers
from transformers import ByT5Tokenizer, LlamaTokenizer

from shipsfast.errors import InputError
from shipsfast.prompts.tokens import to_token_ids, to_tokens, tokenised
from shipsfast.prompts.wrapping import Wrapping
from tests.support import tokenizers
from tests.support.tokenizers import BOS, END, EOS, UNK, USER, of_bytes, of_words

MAKERS = [tokenizers.of_bytes, tokenizers.like_sentencepiece]


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("around", "before", "stripped"),
    [
        ("$A", [], None),
        ("<s> $A", [BOS], None),
        ("$A </s>", [], "</s>"),
        ("<s> $A </s>", [BOS], "</s>"),
        ("<|user|> <s> $A <|end|> </s>", [USER, BOS], "<|end|> </s>"),
    ],
)
def test_nothing_stands_after_a_prompt(make, around, before, stripped):
    tokenizer = make(around)
    for template, text in (("none", "hello you"), ("query-answer", "## Query:hello you \n## Answer:")):
        found = tokenised(tokenizer, ["hello you"], template)
        assert found.ids == [before + plain(tokenizer, text)]
        if stripped is None:
            assert "appended_tokens_stripped" not in found.record and found.notes == []
        else:
            assert found.record["appended_tokens_stripped"] == [{"tokens": stripped, "prompts": 1}]
            assert f"the tokenizer appends {stripped} to a text: left away" in found.notes[0]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "<|user|> <s> $A"])
@pytest.mark.parametrize("text", ["<s>hello", "<s><s>hello"])
def test_bos_stands_once(make, around, text):
    tokenizer = make(around)
    found = tokenised(tokenizer, [text])
    ids = found.ids[0]
    # The same words alone, behind what stands before any text of this tokenizer.
    words = plain(tokenizer, text)
    words = words[next(i for i, token in enumerate(words) if token not in (BOS, USER)) :]
    assert ids[-len(words) :] == words
    assert ids[: len(ids) - len(words)].count(BOS) == 1 and ids[:1] != [EOS]
    doubled = (BOS in plain(tokenizer, text) and BOS in tokenizer("x")["input_ids"]) or text == "<s><s>hello"
    assert ("doubled_bos_removed" in found.record) == doubled


@pytest.mark.parametrize("around", ["<|user|> $A", "<|user|> <s> $A", "<s> <|user|> $A"])
def test_other_tokens_before_a_text_stand_once_too(around):
    tokenizer = of_bytes(around)
    before = around.removesuffix(" $A").replace(" ", "")
    assert tokenised(tokenizer, [before + "hi"]).ids == tokenised(tokenizer, ["hi"]).ids


def test_templates_that_write_bos():
    tokenizer = of_bytes("<s> $A </s>")
    assert tokenised(tokenizer, ["hi"], "<s>Q: {prompt} A:").ids == [[BOS, *plain(tokenizer, "Q: hi A:")]]
    found = tokenised(tokenizer, ["hi"], "chat")
    assert (
        found.ids == [plain(tokenizer, "<s><|user|>user\nhi<|end|><|user|>assistant\n")] and found.notes == []
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizers.CHATML
    assert tokenised(tokenizer, ["hi"], "chat").ids == found.ids


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_tokenizers_without_a_post_processor():
    found = tokenised(ByT5Tokenizer(), ["hi", "bye</s>"])
    assert found.ids == [[107, 108], [101, 124, 104, 1]]  # the second says so itself
    assert found.record["appended_tokens_stripped"] == [{"tokens": "</s>", "prompts": 1}]


@pytest.mark.parametrize("end", [False, True])
def test_settings_of_llama_tokenizers(end):
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "\u2581", "h", "i"])}
    tokenizer = LlamaTokenizer(vocab=words, merges=[], add_eos_token=end, add_bos_token=True)
    found = tokenised(tokenizer, ["hi", "<s>hi"])
    assert [ids.count(1) for ids in found.ids] == [1, 1] and found.ids[0][-2:] == found.ids[1][-2:] == [4, 5]
    assert ("appended_tokens_stripped" in found.record) == end


class Stubborn:
    """A tokenizer with code of its own, which puts special tokens around every text whatever it is told."""

    bos_token_id, eos_token_id, eos_token, all_special_ids = BOS, EOS, "</s>", [BOS, EOS]
    chat_template = tokenizers.CHATML

    def __init__(self) -> None:
        self.inner = of_bytes("<s> $A </s>")
        self.apply_chat_template = self.inner.apply_chat_template
        self.convert_ids_to_tokens = self.inner.convert_ids_to_tokens

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text)


@pytest.mark.parametrize("template", ["none", "chat"])
def test_tokenizers_that_cannot_be_told(template):
    theirs, ours = tokenised(Stubborn(), ["hi"], template), tokenised(of_bytes("<s> $A"), ["hi"], template)
    assert theirs.ids == ours.ids
    assert theirs.record["appended_tokens_stripped"] == [{"tokens": "</s>", "prompts": 1}]


def test_an_eos_that_is_part_of_the_prompt_stays():
    tokenizer = of_bytes("<s> $A </s>")
    for text in ("bye</s>", "bye</s></s>"):
        assert tokenised(tokenizer, [text]).ids == [[BOS, *plain(tokenizer, text)]]
    assert tokenised(Stubborn(), ["bye</s>"]).ids == [[BOS, *plain(tokenizer, "bye</s></s>")]]


def test_a_prefix_is_what_the_prompt_ends_with():
    tokenizer = of_bytes("<s> $A </s>")
    assert tokenised(tokenizer, ["hi"], Wrapping(prefix=" Sure")).ids == [[BOS, *plain(tokenizer, "hi Sure")]]
    assert to_token_ids(["hi"], tokenizer, Wrapping("Q: {prompt}", prefix="\n")) == [
        [BOS, *plain(tokenizer, "Q: hi\n")]
    ]


def test_token_ids_are_taken_as_they_are():
    tokenizer = of_bytes("<s> $A </s>")
    given = [[BOS, BOS, 9, 9], [BOS, 9, EOS]]
    found = to_tokens(given, tokenizer)
    assert found.ids == given
    assert found.notes == found.record["kept"] and found.record["prompts"] == "token ids"
    assert found.notes[0] == "token ids are taken as they are: prompt 0 is with BOS twice"
    assert "prompt 1 is with EOS at the end" in found.notes[1]
    assert to_tokens(given, None).notes == to_tokens([[BOS, 9]], tokenizer).notes == []


def test_texts_of_special_tokens_are_told():
    tokenizer = of_bytes()
    prompts = ["stop <|end|> here", "mild"]
    found = tokenised(tokenizer, prompts, "chat")
    assert found.ids[0].count(END) == 2 and found.record["special_tokens_in_prompts"] == {"<|end|>": 1}
    assert found.notes == ["texts of special tokens in prompts are read as these tokens: <|end|> (1)"]
    # A prompt that brings its own template means them.
    assert tokenised(tokenizer, ["<|user|>hi<|end|>"]).notes == []


def test_a_template_that_ends_the_prompt_is_told():
    tokenizer = of_bytes(chat_template="{{ messages[0].content }}{{ eos_token }}")
    assert "the chat template ends prompts with </s>" in tokenised(tokenizer, ["hi"], "chat").notes[0]


def test_different_prompts_of_equal_tokens_are_told():
    tokenizer = of_words("kettle", "story")
    found = tokenised(tokenizer, ["kettle", "story", "kettle ", "moon story", "kettle", "sun story"])
    assert found.notes == [
        "prompts 0, 2 are different texts and the same tokens, and so are 1 more sets of prompts"
    ]
    assert found.record["different_prompts_of_equal_tokens"] == 4
    assert tokenised(tokenizer, ["kettle", "kettle"]).notes == []  # given twice


def test_prompts_of_unknown_words_are_told():
    tokenizer = of_words("kettle")
    found = tokenised(tokenizer, ["kettle", "moon sun", "moon kettle"], "kettle {prompt}")
    assert found.notes == ["prompt 1 is nothing but unknown tokens to this tokenizer"]
    assert found.record["prompts_of_unknown_tokens"] == 1
    assert UNK not in tokenised(tokenizers.like_sentencepiece(), ["ñ 💡"]).ids[0]  # bytes


def test_prompts_that_vanish_are_refused():
    tokenizer = of_words("kettle", around="<s> $A </s>")
    assert tokenised(tokenizer, [""]).ids == [[BOS]]
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("moon", "")
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        to_token_ids(["kettle", "moon"], tokenizer)


def test_text_that_is_none_is_named():
    with pytest.raises(InputError, match="prompt 1 cannot be made tokens"):
        to_token_ids(["kettle", "half \ud800 pair"], of_bytes())
