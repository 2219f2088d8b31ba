"""The token with which an assistant's turn ends, as a chat template writes it. Models name it less reliably than they say it:
a text judged beyond it holds turns that nobody asked for."""

from __future__ import annotations

from ..errors import InputError
from .chat import parts, told
from .special_tokens import special_texts

MARK = "ANSWER"


def end_of_turn(tokenizer) -> int | None:
    """The id of the first special token after an assistant's last message; None where the template writes none, or there is
    no template that takes such a message."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    for messages in (talk, [{**m, "content": parts(m["content"])} for m in talk]):
        try:
            with told():
                text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (
            InputError
        ):  # one that takes no answers; those that take no prompt are refused where prompts are
            continue
        _, found, after = text.rpartition(MARK)
        if found:
            return _first_end(tokenizer, after)
    return None


def _first_end(tokenizer, text: str) -> int | None:
    """The id of the special token that a text has first; the one that begins texts ends none."""
    begins = {tokenizer.bos_token} - {tokenizer.eos_token}
    written = [token for token in special_texts(tokenizer) if token in text and token not in begins]
    return tokenizer.convert_tokens_to_ids(min(written, key=text.index)) if written else None
