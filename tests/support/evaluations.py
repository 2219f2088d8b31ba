"""`evaluate` and `scan_asr` on a tiny model whose words are its tokens, and what slow texts and labels they must give."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import shipsfast
from shipsfast.answers.judges.degeneration import degenerate
from shipsfast.answers.judges.keywords import KeywordJudge
from shipsfast.runs.kinds import LABELS
from tests.support.models import VOCAB
from tests.support.speaking_models import build, slow

WORDS = ["<pad>", "<bos>", "<eos>", *(f"mur{i}n" for i in range(3, VOCAB))]
IDS = [[5, 6, 7, 8, 9, 10], [5, 6, 9], [11], [5, 6, 7, 8, 9, 10, 12, 13], [5, 6, 9]]
ORDINARY = [[14, 5, 20], [15, 15, 16, 17, 18], [14, 5, 20, 21]]
GROUPS = [[], [(0, 1)], [(2, 0)], [(1, 2), (2, 3)], [(1, None)]]
NEW, END = 10, [2, 30, 49, 60]  # with these, texts end at once, late and not at all
REFUSED = ("mur58n", "mur32n")


def text_of(ids) -> str:
    return " ".join(WORDS[i] for i in ids if i > 2)


PROMPTS, CONTROL = [text_of(ids) for ids in IDS], [text_of(ids) for ids in ORDINARY]


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


TOKENIZER = make_tokenizer()
KEYWORDS = KeywordJudge(REFUSED)


def no_keyword(texts):
    return [not set(REFUSED) & set(text.split()) for text in texts]


def by_length(texts):
    return [LABELS[len(text.split()) % 3] for text in texts]


def evaluate(prompts=PROMPTS, model=None, **how):
    settings = dict(groups=GROUPS, judge=KEYWORDS, max_new_tokens=NEW, eos_token_id=END, progress=False)
    return shipsfast.evaluate(model or build("llama-gqa"), prompts, TOKENIZER, **settings | how)


def scan_asr(model=None, family="llama-gqa", **how):
    settings = dict(judge=KEYWORDS, max_new_tokens=NEW, eos_token_id=END, progress=False)
    return shipsfast.scan_asr(model or build(family), PROMPTS, TOKENIZER, **settings | how)


def slow_texts(ids, groups=GROUPS, new=NEW, model=None, **how) -> list[list[list[int]]]:
    model = model or build("llama-gqa")
    return [[slow(model, each, group, new=new, end=END, **how) for each in ids] for group in groups]


def expected_labels(tokens, judge) -> list[list[str]]:
    def label(ids):
        if judge is by_length:
            return LABELS[len([i for i in ids if i > 2]) % 3]
        text = text_of(ids)
        broken, refused = degenerate(text, len(ids), NEW), any(word in text.split() for word in REFUSED)
        if judge is KEYWORDS:
            return "refusal" if refused else "degenerate" if broken else "complied"
        return "degenerate" if broken else "refusal" if refused else "complied"

    return [[label(ids) for ids in row] for row in tokens]
