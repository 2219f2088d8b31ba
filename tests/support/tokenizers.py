"""Tokenizers as people bring them, small: bytes or whole words, and what each puts around a text."""

from __future__ import annotations

import datetime

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|end|>"]
BOS, EOS, UNK, USER, END = range(len(SPECIAL))
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
# Writes the day, and does so in the ways of templates in use.
DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = 'never' %}{% endif %}{% endif %}\n"
    '  {% macro year() %}{{ strftime_now("%Y") | int + 1 }}{% endmacro %}'
    "Today: {{ date_string }}, soon {{ year() }}\n"
)


def set_clock(monkeypatch, year: int) -> None:
    """The clock that chat templates read."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(year, 3, 4, 5, 6)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def of_bytes(around: str = "<s> $A", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Every byte a token. around: what is put around a text, with $A in its place."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(BPE(words, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _with(inner, around, chat_template)


def like_sentencepiece(around: str = "<s> $A", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Letters, with a mark for spaces and one before each text; what is no letter is bytes."""
    letters = [chr(ord("a") + i) for i in range(26)]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    inner = Tokenizer(
        BPE({word: i for i, word in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return _with(inner, around, chat_template)


def of_words(*words: str, around: str = "$A") -> PreTrainedTokenizerFast:
    """Every word a token, others unknown."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with(inner, around, None)


def _with(inner: Tokenizer, around: str, chat_template: str | None) -> PreTrainedTokenizerFast:
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    inner.post_processor = TemplateProcessing(
        single=around, special_tokens=[(word, i) for i, word in enumerate(SPECIAL)]
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=["<|user|>", "<|end|>"],
    )  # fmt: skip
    out.chat_template = chat_template
    return out
