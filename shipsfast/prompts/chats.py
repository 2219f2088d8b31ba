"""What one prompt of a file is: a text, or a list of messages; anything else is refused with the reason.

A message is {"role": ..., "content": ...}. ShareGPT's {"from": ..., "value": ...} is the same in other words. A conversation
that ends with an answer is a prompt up to that answer: training data has it, and the model's own would follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

Prompt = str | list[dict[str, str]]
_SHARE_GPT = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
# What a chat template may read beside the text. Other notes, such as ids and scores, are left away.
_READ = (
    "name", "tool_calls", "function_call", "tool_call_id", "tools", "documents", "images", "reasoning", "reasoning_content",
    "thinking",
)  # fmt: skip
CUT = "answers_left_off"  # in what is recorded of a file
EMPTY = "is empty: remove it or give it text"


class NoPrompt(ValueError):
    """Why a value is no prompt: what follows "the prompt in row 3"."""


def as_prompt(value) -> tuple[Prompt, bool]:
    """The prompt, and whether an answer was cut off its end. Raises NoPrompt."""
    if value is None:
        raise NoPrompt(EMPTY)
    if isinstance(value, str):
        return _text(value), False
    if isinstance(value, (bytes, bytearray)):
        raise NoPrompt("holds bytes: decode them to text first")
    if not isinstance(value, (list, tuple)):
        raise NoPrompt(f"is a value of type {type(value).__name__}: expected text, or a list of messages")
    if not value:
        raise NoPrompt("is an empty list: remove it or give it messages")
    cut = _speaker(value[-1]) == "assistant"
    messages = [_message(each, number) for number, each in enumerate(value[: len(value) - cut], 1)]
    if not any(each["role"] == "user" for each in messages):
        raise NoPrompt("has no message of the user: remove it or give it one")
    if messages[-1]["role"] == "assistant":
        raise NoPrompt("ends with two answers: remove the last one")
    return messages, cut


def joined(parts: Sequence, names: Sequence[str], main: str | None, between: str) -> str:
    """One text of the columns of a row. Raises NoPrompt."""
    for part, name in zip(parts, names, strict=True):
        if part is not None and not isinstance(part, str):
            raise NoPrompt(f"has no text in column {name!r}: only texts can be joined")
        if name == main and not (part and part.strip()):
            raise NoPrompt(f"has nothing in column {name!r}: remove it or give it text")
    return between.join(part for part in parts if part and part.strip())


def _text(text: str, what: str = "") -> str:
    """The text. Raises NoPrompt where it is empty, or holds what no tokenizer can take or no text has."""
    if not text.strip():
        raise NoPrompt(f"{what}{EMPTY}")
    if "\0" in text:
        raise NoPrompt(f"{what}holds a NUL character: remove it or the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise NoPrompt(f"{what}holds half of a surrogate pair, U+{code:04X}: remove it or the row") from None
    return text


def _speaker(value) -> str | None:
    """Whose message it is, by the name that chat templates know; None for what has none."""
    if not isinstance(value, dict):
        return None
    role = value.get("role")
    if role is None and isinstance(value.get("from"), str):
        return _SHARE_GPT.get(value["from"])
    return role


def _message(value, number: int) -> dict[str, str]:
    what = f"is a list whose element {number} "
    if not isinstance(value, dict):
        raise NoPrompt(f"{what}is no message: expected role and content, or from and value")
    for key in _READ:
        if value.get(key):
            raise NoPrompt(f"{what}has {key}: only role and text are read")
    if "role" in value and "content" in value:
        role, content = value["role"], value["content"]
    elif "from" in value and "value" in value:
        content, role = value["value"], _speaker(value)
        if role is None:
            raise NoPrompt(f"{what}is from {value['from']!r:.40}: expected {', '.join(_SHARE_GPT)}")
    else:
        raise NoPrompt(
            f"{what}has {', '.join(map(str, value)):.80}: expected role and content, or from and value"
        )
    if not isinstance(role, str) or not role.strip():
        raise NoPrompt(f"{what}has no role: expected system, user or assistant")
    if isinstance(content, list):
        content = _only_text(content, what)
    if not isinstance(content, str):
        raise NoPrompt(f"{what}has content that is no text: expected text")
    if content or role != "system":  # an empty one is how some sets say that there is none
        _text(content, f"{what}has content that ")
    return {"role": _text(role, f"{what}has a role that "), "content": content}


def _only_text(parts: list, what: str) -> str:
    """The text of content that is given in parts."""
    if len(parts) == 1 and isinstance(parts[0], dict) and parts[0].get("type") == "text":
        return parts[0].get("text")
    kinds = sorted({str(part.get("type")) if isinstance(part, dict) else "?" for part in parts})
    raise NoPrompt(f"{what}has {len(parts)} parts of content ({', '.join(kinds):.80}): expected one of text")
