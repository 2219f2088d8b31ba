"""The token with which an assistant's turn ends, as a chat template writes it. Models name it less reliably than they say it:
a text judged beyond it holds turns that nobody asked for."""

from __future__ import annotations

from jinja2 import TemplateError

MARK = "ANSWER"


def end_of_turn(tokenizer) -> int | None:
    """The id of the first special token after an assistant's last message; None where the template writes none, or there is
    no template that takes such a message."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    for messages in (talk, [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (ValueError, TypeError, TemplateError):
            continue
        _, found, after = text.rpartition(MARK)
        if found:
            written = (
                t for t in tokenizer(after, add_special_tokens=False)["input_ids"] if t in _ends(tokenizer)
            )
            return next((t for t in written if tokenizer.convert_ids_to_tokens(t) in after), None)
    return None


def _ends(tokenizer) -> set[int]:
    """Special tokens, also those that have no role of their own, such as <|im_end|> in some. The one that begins a text ends
    none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return special - ({tokenizer.bos_token_id} - {tokenizer.eos_token_id})
