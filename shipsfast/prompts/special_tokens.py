"""Texts to token ids, with the special tokens that belong before a text and none after it.

A tokenizer may put tokens before a text (BOS) and after it (EOS, SEP). What comes after the prompt would be what the next
token is measured behind, so it is left away. What comes before is put once: not again where the text begins with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import InputError


@dataclass
class Encoded:
    """ids: of each text; own: how many of them are the text's; stripped: the tokens that were left away after texts, by
    how many texts they were left away from; doubled: how many texts would have begun with a special token twice."""

    ids: list[list[int]] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    stripped: dict[tuple[int, ...], int] = field(default_factory=dict)
    doubled: int = 0


def encode(tokenizer, texts: Sequence[str], special: bool) -> Encoded:
    """special: the tokenizer puts its special tokens before each text, as it does for plain text.

    Raises InputError, naming the prompt, where a text cannot be told from what the tokenizer puts around it.
    """
    out, specials = Encoded(), set(getattr(tokenizer, "all_special_ids", []))
    for i, text in enumerate(texts):
        body = _ids(tokenizer, text, i, add_special_tokens=False)
        before, after = [], []
        if special:  # where a text is nothing at all, another shows what is before and what after it
            shown = text if body else "a"
            own = body or _ids(tokenizer, shown, i, add_special_tokens=False)
            before, after = _around(_ids(tokenizer, shown, i), own, i)
        body, more = _without_end(tokenizer, text, body)
        after = [*more, *after]
        if after:
            out.stripped[tuple(after)] = out.stripped.get(tuple(after), 0) + 1
        ids = _once(before, body, specials, getattr(tokenizer, "bos_token_id", None))
        out.ids.append(ids)
        out.own.append(len(body))
        out.doubled += len(ids) < len(before) + len(body)
    return out


def _once(before: list[int], body: list[int], specials: set[int], bos: int | None) -> list[int]:
    """Both in a row, without special tokens that stand at the end of one and the beginning of the other, and with no two
    BOS in a row before the first ordinary token."""
    held = (n for n in range(len(before), 0, -1) if body[:n] == before[-n:] and specials.issuperset(body[:n]))
    ids = before + body[next(held, 0) :]
    first = next((n for n, token in enumerate(ids) if token not in specials), len(ids))
    return [token for n, token in enumerate(ids) if not (0 < n < first and token == bos == ids[n - 1])]


def special_texts(tokenizer) -> list[str]:
    """Texts that the tokenizer reads as a special token wherever they stand, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = [str(token) for token in added.values() if getattr(token, "special", False)]
    texts = {*map(str, getattr(tokenizer, "all_special_tokens", [])), *found} - {""}
    return sorted(texts, key=len, reverse=True)


def names(tokenizer, ids: Sequence[int]) -> str:
    """Tokens as a tokenizer writes them."""
    find = getattr(tokenizer, "convert_ids_to_tokens", None)
    return " ".join(map(str, find(list(ids)) if find else ids))


def _ids(tokenizer, text: str, i: int, **how) -> list[int]:
    try:
        return [int(token) for token in tokenizer(text, **how)["input_ids"]]
    except Exception as error:  # the tokenizers library raises bare ones, and others' code anything
        raise InputError(f"prompt {i} cannot be made tokens: {' '.join(str(error).split())}") from error


def _around(whole: list[int], body: list[int], i: int) -> tuple[list[int], list[int]]:
    """What stands before and after the text's own tokens."""
    for at in range(len(whole) - len(body) + 1):
        if whole[at : at + len(body)] == body:
            return whole[:at], whole[at + len(body) :]
    raise InputError(
        f"prompt {i}: with special tokens the tokenizer makes other tokens of the text itself, so that they cannot be told "
        "apart: give token ids"
    )


def _without_end(tokenizer, text: str, body: list[int]) -> tuple[list[int], list[int]]:
    """The tokens without an EOS or SEP that the tokenizer appends even where no special tokens are asked for."""
    for name in ("eos_token", "sep_token"):
        token, number = (getattr(tokenizer, each, None) for each in (name, f"{name}_id"))
        unknown = number == getattr(tokenizer, "unk_token_id", None)
        if number is None or not body or body[-1] != number or unknown:
            continue
        if not text.endswith(str(token)) and not text.rstrip().endswith(str(token)):
            return body[:-1], body[-1:]
    return body, []
