"""Models that think before they answer: where the answer begins. Judges judge what follows the thought.

A thought stands between two markers, at the beginning of a text. A template may have opened it at the end of the prompt,
and then the text has the closing marker alone. Markers that are special tokens are gone from a text that was decoded
without these, so they are looked for in tokens (`answers_of`); in a text that comes as a string, in the string.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Opening and closing, as they are written; a space stands where a tokenizer may put one between special tokens.
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, GLM, Phi, Nemotron and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma
    ("<|channel|> analysis", "<|channel|> final <|message|>"),  # gpt-oss: everything before its final channel
    ("<|channel|> commentary", "<|channel|> final <|message|>"),
)
# What describes them, for JSON.
THOUGHTS = hashlib.sha256(repr(MARKERS).encode()).hexdigest()[:12]


def _pattern(marker: str) -> str:
    return r"\s*".join(map(re.escape, marker.split(" ")))


_OPENINGS = [re.compile(_pattern(opening)) for opening, _ in MARKERS]
_CLOSINGS = [re.compile(_pattern(closing)) for _, closing in MARKERS]
_CLOSING = re.compile("|".join(dict.fromkeys(map(_pattern, (closing for _, closing in MARKERS)))))
_MARK = re.compile("|".join(each.pattern for each in (*_OPENINGS, *_CLOSINGS)))
# What may stand before a thought, and between one and the next.
_SPECIAL = r"(?:\s|<\|[^|<>]{1,40}\|>|<[^<>]{1,40}\|>)*(?:assistant\s*(?=<\|))?"
_BEGINNING = re.compile(_SPECIAL + "(?:" + "|".join(each.pattern for each in _OPENINGS) + ")")


@dataclass(frozen=True)
class Answer:
    """text: what follows the thought, all of the text where there is none; tokens: of it; thinking: the thought has no
    end, and there is no answer."""

    text: str
    tokens: int
    thinking: bool


def answer_start(text: str, opened: int | None = None) -> int | None:
    """Where in a text the answer begins: 0 where it does not think, None where the thought has no end.

    opened: the row of MARKERS that the prompt ended in.
    A closing marker without an opening one ends a thought that the prompt began. Further on in a text, an opening marker is a
    word of the answer, as in one that tells of markers.
    """
    if opened is None:
        if _BEGINNING.match(text):
            return _past_thoughts(text, 0)
        closed = _CLOSING.search(text)
        if closed is None or any(each.search(text, 0, closed.start()) for each in _OPENINGS):
            return 0
    else:
        closed = _CLOSINGS[opened].search(text)
    return None if closed is None else _past_thoughts(text, closed.end())


def _past_thoughts(text: str, at: int) -> int | None:
    """Past thoughts that begin there."""
    for i, opening in enumerate(_OPENINGS):
        if again := re.compile(_SPECIAL + opening.pattern).match(text, at):
            closed = _CLOSINGS[i].search(text, again.end())
            return None if closed is None else _past_thoughts(text, closed.end())
    return at


def left_open(rendered: str, prompt: object) -> int | None:
    """The row of MARKERS that a rendered prompt leaves open, None for none.

    prompt: what the user wrote. Markers in it, and before it, are words: only what the template put behind it counts, or,
    where it is not found in `rendered`, the very end.
    """
    for row, opening in enumerate(_OPENINGS):
        if re.search(opening.pattern + r"\s*$", rendered):
            return row
    asked = prompt.strip() if isinstance(prompt, str) else ""
    # A short prompt may be a piece of a marker.
    at = (rendered if _MARK.search(asked) else _MARK.sub(lambda m: "\0" * len(m[0]), rendered)).rfind(asked)
    if not asked or at < 0:
        return None
    tail = rendered[at + len(asked) :]
    found = [(match.start(), row) for row, each in enumerate(_OPENINGS) for match in each.finditer(tail)]
    start, row = max(found, default=(0, None))
    return None if row is None or _CLOSINGS[row].search(tail, start) else row


def answers_of(
    tokenizer, rows: Sequence[Sequence[int]], prompts: Sequence[tuple[Sequence[int], object]]
) -> Iterator[Answer]:
    """The answer of each row of new tokens. prompts: of each, the token ids that it goes on from, and what the user wrote."""
    if not rows:
        return  # transformers decodes no rows to one text
    marked = tokenizer.batch_decode(list(rows), skip_special_tokens=False)
    plain = tokenizer.batch_decode(list(rows), skip_special_tokens=True)
    open_in: dict[tuple, int | None] = {}
    for row, text, shown, (ids, prompt) in zip(rows, marked, plain, prompts, strict=True):
        key = tuple(ids)
        if key not in open_in:
            open_in[key] = left_open(_decoded(tokenizer, ids), prompt)
        start = answer_start(text, open_in[key])
        if start == 0:
            yield Answer(shown, len(row), False)
        elif start is None:
            yield Answer("", 0, True)
        else:
            # The first tokens whose text reaches that far; what is left of the last of them belongs to the answer.
            cut = bisect.bisect_left(range(len(row)), start, key=lambda n: len(_decoded(tokenizer, row[:n])))
            rest = tokenizer.batch_decode([list(row[cut:])], skip_special_tokens=True)[0]
            yield Answer(_decoded(tokenizer, row[:cut])[start:] + rest, len(row) - cut, False)


def _decoded(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.batch_decode([list(ids)], skip_special_tokens=False)[0]
