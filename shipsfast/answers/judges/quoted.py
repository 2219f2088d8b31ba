"""What an answer quotes: somebody's words in a story, a letter, a block of code. A refusal in there is not the model's own."""

from __future__ import annotations

import re

COVER = (
    "\ue000"  # a character for private use stands for each that is covered, so that places stay what they are
)
QUOTES = 1  # version of the rule, for JSON
_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^[ \t]*>.*$", re.MULTILINE)
_DASHED = re.compile(r"^[ \t]*[\u2013\u2014\u2015].*$", re.MULTILINE)  # a line of dialogue
# Within one paragraph. A single mark may be an apostrophe: it opens before a word and after none, and closes the other way.
_MARKS = re.compile(
    r"\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|\u201e[^\u201c\u201d\n]*[\u201c\u201d]|\u00ab[^\u00bb\n]*\u00bb|\u00bb[^\u00ab\n]*\u00ab"
    r"|\u300c[^\u300d\n]*\u300d|\u300e[^\u300f\n]*\u300f"
    r"|(?<!\w)['\u2018](?=\w)[^\n]{1,1000}?(?<=[\w.,!?])['\u2019](?!\w)"
)
_SPEAKER = re.compile(r"^[ \t]*[*_]*([A-Z][\w .'-]{0,24}?)[*_]*:[*_]*(?=[ \t])(.*)$", re.MULTILINE)
_MODEL = {
    "a",
    "ai",
    "ai assistant",
    "answer",
    "assistant",
    "bot",
    "chatbot",
    "model",
    "output",
    "reply",
    "response",
}
_NO_SPEAKER = {
    "note",
    "disclaimer",
    "warning",
    "important",
    "reason",
    "instead",
    "caution",
    "please note",
    "subject",
    "re",
}
_WORD = re.compile(r"[^\W_]")


def without_quotes(text: str) -> str:
    """The text with quoted words covered: code blocks, block quotes, lines of dialogue, text in quotation marks.

    Lines of a dialogue begin with a dash, or with a speaker where there are two; a line that is labelled as the model's own
    answer stays. Where all of the text is quoted, it is the answer, and stays as it is.
    """
    covered = text
    for pattern in (_FENCE, _BLOCK, _DASHED):
        covered = pattern.sub(_cover, covered)
    stays = _MODEL | _NO_SPEAKER
    if len({match[1].casefold() for match in _SPEAKER.finditer(covered)} - stays) > 1:
        covered = _SPEAKER.sub(lambda m: m[0] if m[1].casefold() in stays else _cover(m), covered)
    covered = _MARKS.sub(_cover, covered)
    own = _SPEAKER.sub(lambda m: m[2] if m[1].casefold() in _MODEL else m[0], covered)
    return covered if _WORD.search(own) else text


def _cover(match: re.Match) -> str:
    return "".join(char if char == "\n" else COVER for char in match[0])
