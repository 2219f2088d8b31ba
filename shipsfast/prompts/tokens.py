"""Prompts as token ids: templates and tokenising.

Templates: `chat` is the tokenizer's own chat template with one user turn; `query-answer` is the wrapper of
the paper's Ships (arXiv 2410.13708, appendix B.1); `none` takes the prompt as it is; any other string must
contain {prompt}.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

from jinja2 import TemplateError

from ..errors import InputError

TEMPLATES = {"query-answer": "## Query:{prompt} \n## Answer:", "none": "{prompt}"}


def tokenize(tokenizer, prompts: Sequence[str], template: str = "none") -> list[list[int]]:
    """Token ids of each prompt in its template, with the special tokens the tokenizer adds.

    Raises InputError for an unknown template, a tokenizer without a chat template, or an empty prompt.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template: use --template query-answer, none or your own"
            )
        try:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        except (ValueError, TemplateError) as error:
            raise InputError(f"the tokenizer's chat template failed: {error}") from error
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    wrapper = TEMPLATES.get(template, template)
    if "{prompt}" not in wrapper:
        raise InputError(
            f"unknown template {template!r}: expected chat, query-answer, none, or a text with {{prompt}}"
        )
    return [tokenizer(wrapper.replace("{prompt}", prompt))["input_ids"] for prompt in prompts]


def as_prompts(prompts: Iterable) -> tuple:
    """Prompts as the Python API takes them: P strings, or P tuples of token ids.

    Raises InputError for anything else, naming the first prompt that is wrong.
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings or of token-id lists, got a single string")
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns"):
        raise InputError(
            f"prompts must be a list of strings or of token-id lists, got {type(prompts).__name__}: "
            "give one of its columns as a list"
        )
    prompts = list(prompts)
    if not prompts:
        raise InputError("there are no prompts: give at least one")
    if all(isinstance(p, str) for p in prompts):
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise InputError(f"prompt {i} is empty: remove it or give it text")
        return tuple(prompts)
    out = []
    for i, prompt in enumerate(prompts):
        try:
            out.append(tuple(operator.index(t) for t in prompt))
        except (TypeError, ValueError):
            raise InputError(
                f"prompt {i} is neither text nor a list of token ids: give all prompts in one of the two forms"
            ) from None
    return tuple(out)


def to_token_ids(prompts: Iterable, tokenizer=None, template: str = "none") -> list[list[int]]:
    """Token ids of prompts as `as_prompts` takes them; strings need a tokenizer.

    Raises InputError, naming the first prompt that is wrong.
    """
    prompts = as_prompts(prompts)
    if isinstance(prompts[0], str):
        if tokenizer is None:
            raise InputError("prompts are text, so a tokenizer is needed: pass the model's")
        ids = tokenize(tokenizer, prompts, template)
    else:
        ids = [list(prompt) for prompt in prompts]
    for i, tokens in enumerate(ids):
        if not tokens:
            raise InputError(f"prompt {i} has no tokens: remove it or give it text")
    return ids


def all_token_ids(
    prompts: Iterable, others: Iterable | None, tokenizer, template: str, about_others: str
) -> tuple[list[list[int]], list[list[int]] | None]:
    """`to_token_ids` of the prompts, and of others that go with them. about_others: begins what is said of those."""
    ids = to_token_ids(prompts, tokenizer, template)
    if others is None:
        return ids, None
    try:
        return ids, to_token_ids(others, tokenizer, template)
    except InputError as error:
        raise InputError(f"{about_others}{error}") from error
