"""Chat messages as a prompt: a conversation whose last word is the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def to_json(self) -> dict:
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


def is_conversation(prompt) -> bool:
    """Whether a prompt, as the caller gave it or as `as_prompts` made it, is meant as chat messages."""
    if isinstance(prompt, Mapping):
        return True
    first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else None
    return isinstance(first, (Message, Mapping))


def as_conversation(prompt, i: int) -> Conversation:
    """Prompt i, a list of messages with role and content or an object {"messages": [...]}, as a tuple of `Message`.

    Raises InputError, naming prompt and message, for anything that would not reach the model as it is.
    """
    if isinstance(prompt, Mapping):
        if set(prompt) != {"messages"}:
            raise InputError(
                f"prompt {i} is an object with {_names(prompt)}: expected a list of messages, or an object with "
                "messages alone"
            )
        prompt = prompt["messages"]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)) or not prompt:
        raise InputError(f"prompt {i} must be a list of at least one message with role and content")
    said = tuple(_message(message, f"prompt {i}, message {n}") for n, message in enumerate(prompt))
    last = said[-1].role
    if last == "assistant":
        raise InputError(
            f"prompt {i} ends with the assistant's message, and what comes next is measured: leave that message out, "
            "or give what the answer begins with as prefix (--prefix)"
        )
    if last != "user":
        raise InputError(f"prompt {i} ends with a message of {last!r}: the last message must be the user's")
    return said


def _message(message, where: str) -> Message:
    if isinstance(message, Message):  # anyone may make one
        message = message.to_json()
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {type(message).__name__}: expected an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    if not {"role", "content"} <= set(given):
        raise InputError(f"{where} is an object with {_names(given)}: expected role and content")
    more = [name for name in given if name not in ("role", "content")]
    if more:
        raise InputError(
            f"{where} has {_names(more)} beside role and content, which would be lost: leave it out"
        )
    role, content = given["role"], _text(given["content"], where)
    if not isinstance(role, str) or not role.strip():
        raise InputError(f"{where} has the role {role!r}: expected a text such as user, assistant or system")
    if role == "user" and not content.strip():
        raise InputError(f"{where} is empty: remove it or give it text")
    return Message(role, content)


def _text(content, where: str) -> str:
    """A content that is a text, or a list of one part that is a text."""
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if kinds != ["text"]:
            raise InputError(
                f"{where} has the parts {', '.join(map(str, kinds)) or 'none'}: expected one text; images and other "
                "media are not taken"
            )
        content = content[0].get("text")
    if not isinstance(content, str):
        raise InputError(f"{where} has a content of type {type(content).__name__}: expected a text")
    return content


def _names(names) -> str:
    return ", ".join(map(str, names)) or "nothing"


def prompt_text(prompt: str | Conversation) -> str:
    """The text that stands for a prompt where one is shown or judged: the prompt itself, or the user's last message.

    prompt: of a measurement. Raises InputError for token ids, which have none.
    """
    if isinstance(prompt, str):
        return prompt
    if is_conversation(prompt):
        return prompt[-1].content
    raise InputError("prompts are token ids, and a text is needed: give strings or chat messages")
