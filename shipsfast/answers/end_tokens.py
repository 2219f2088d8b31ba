"""The tokens that end a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from ..errors import InputError, whole_number


def find_end_tokens(
    model: PreTrainedModel, tokenizer, given: int | Sequence[int] | None, vocab_size: int
) -> frozenset[int]:
    """The tokens that end a text. Raises InputError if nobody names one, or `given` names none of the vocabulary."""
    if given is not None:
        named = given if isinstance(given, Iterable) else [given]
        tokens = [whole_number("eos_token_id", each, 0) for each in named]
        if max(tokens, default=0) >= vocab_size:
            raise InputError(
                f"eos_token_id {max(tokens)} is no token of the model: its vocabulary has {vocab_size}"
            )
        return frozenset(tokens)
    for tokens in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if tokens is not None:
            return frozenset(map(int, [tokens] if isinstance(tokens, int) else tokens))
    raise InputError(
        "neither the model nor the tokenizer names an end-of-sequence token: give eos_token_id (--eos-token-id), or [] "
        "(--eos-token-id none) to let every text run to max_new_tokens"
    )
