"""Text of somebody else's, made safe to print: nothing in it steers a terminal, turns or hides what stands beside it."""

import unicodedata

MOST_CHARS = 1500  # of a message: names of a million columns are no help


class _Visible(dict):
    """For str.translate: by code, what steers, turns or hides text or is no character; joiners belong to scripts."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        steers = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        self[code] = f"[U+{code:04X}]" if steers and char not in "\n\t\u200c\u200d" else char
        return self[code]


_VISIBLE = _Visible()


def visible(text: str) -> str:
    """The text with control characters, bidirectional overrides and the like shown by their codes."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def counted(number: int, what: str) -> str:
    """ "1 part", "2,000 parts"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def one_line(text: str) -> str:
    """The same as a message: on one line, and cut where it is far too long."""
    text = " ".join(visible(text).split())
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}... ({len(text) - MOST_CHARS:,} more)"
