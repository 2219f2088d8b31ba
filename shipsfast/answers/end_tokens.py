"""The tokens that end a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from ..errors import InputError, whole_number
from ..prompts.end_of_turn import end_of_turn


def find_end_tokens(
    model: PreTrainedModel, tokenizer, given: int | Sequence[int] | None, vocab_size: int
) -> frozenset[int]:
    """Those in `given`, or all that are named. Raises InputError if none is, or for one in `given` that the vocabulary does not
    have."""
    if given is not None:
        named = given if isinstance(given, Iterable) else [given]
        tokens = [whole_number("eos_token_id", each, 0) for each in named]
        if max(tokens, default=0) >= vocab_size:
            raise InputError(
                f"eos_token_id {max(tokens)} is no token of the model: its vocabulary has {vocab_size}"
            )
        return frozenset(tokens)
    found = named_end_tokens(model, tokenizer, vocab_size)
    if found:
        return found
    raise InputError(
        "neither the model nor the tokenizer names an end-of-sequence token: give eos_token_id (--eos-token-id), or [] "
        "(--eos-token-id none) to let every text run to max_new_tokens"
    )


def named_end_tokens(model: PreTrainedModel, tokenizer, vocab_size: int) -> frozenset[int]:
    """All that the model's generation settings, its config, the tokenizer and its chat template name: each of them is known to
    leave out what another says."""
    found: set[int] = set()
    for tokens in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        end_of_turn(tokenizer),
    ):
        if tokens is not None:
            found.update(map(int, tokens if isinstance(tokens, Iterable) else [tokens]))
    return frozenset(
        token for token in found if 0 <= token < vocab_size
    )  # a tokenizer may have more than the model
