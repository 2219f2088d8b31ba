"""Completions for the tests of judges."""

from shipsfast.answers.judges.judge import Completion

LIMIT = 128
ANSWER = "To hide the moonstone, wrap it in wool and put it under the third step of the mill."
LOOP = "the " * 17
C, R, D = "complied", "refusal", "degenerate"


def completion(
    text: str, *, prompt: str = "Where is the kettle?", num_tokens: int | None = None, limit: int = LIMIT
):
    count = len(text.split()) if num_tokens is None else num_tokens
    return Completion(prompt, text, count, count < limit, limit)
