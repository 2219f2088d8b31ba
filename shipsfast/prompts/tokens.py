"""Prompts as token ids: what is a prompt, and what becomes of it in its template (wrapping.py has the templates)."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from ..text import counted
from .chat import render
from .messages import Message, as_conversation, is_conversation
from .special_tokens import encode, names, special_texts
from .wrapping import Wrapping, as_wrapping

_SHOWN = 5  # prompts that a note names


@dataclass
class Tokenised:
    """ids: of each prompt; record: how they came about, for run.json; notes: what a user would not expect; empty: prompts
    that have no token of their own."""

    ids: list[list[int]]
    record: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)


def tokenize(tokenizer, prompts: Sequence, template: str | Wrapping = "none") -> list[list[int]]:
    """Token ids of each prompt in its template: `tokenised` has how they came about."""
    return tokenised(tokenizer, prompts, template).ids


def tokenised(tokenizer, prompts: Sequence, template: str | Wrapping = "none") -> Tokenised:
    """Token ids of each prompt in its template, with the special tokens that the tokenizer puts before a text.

    prompts: strings, or conversations as `as_prompts` gives them. A chat template writes all special tokens itself. What
    the tokenizer appends is left away, and BOS stands once.
    Raises InputError for an unknown template, a tokenizer without a chat template, or one that drops what a prompt says.
    """
    wrapping = as_wrapping(template)
    chats = bool(prompts) and is_conversation(prompts[0])
    if chats and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "prompts are chat messages, and the tokenizer has no chat template to write them with: give texts, or set the "
            "tokenizer's chat_template"
        )
    if chats and wrapping.template != "chat":
        raise InputError(
            f"prompts are chat messages, which need template 'chat' (--template chat): it is {wrapping.template!r}"
        )
    record, notes = wrapping.to_json() | {"prompts": "messages" if chats else "text"}, []
    if wrapping.template == "chat":
        turns = prompts if chats else [(Message("user", prompt),) for prompt in prompts]
        rendered = render(tokenizer, turns, wrapping) if turns else None
        texts = rendered.texts if rendered else []
        if rendered:
            record["content"] = rendered.content
            if rendered.reads_clock:
                record["template_date"] = wrapping.date
                notes.append(
                    f"the chat template writes today's date: it is {wrapping.date} on every day, so that runs can be "
                    "continued and compared (--template-date)"
                )
    else:
        texts = [wrapping.text.replace("{prompt}", prompt) for prompt in prompts]
    found = encode(tokenizer, [text + wrapping.prefix for text in texts], wrapping.template != "chat")
    if found.stripped:
        record["appended_tokens_stripped"] = [
            {"tokens": names(tokenizer, ids), "prompts": count} for ids, count in found.stripped.items()
        ]
        which = " or ".join(names(tokenizer, ids) for ids in found.stripped)
        notes.append(
            f"the tokenizer appends {which} to a text: left away, so that the prompt ends with its own words"
        )
    if found.doubled:
        record["doubled_bos_removed"] = found.doubled
        notes.append(
            f"{counted(found.doubled, 'prompt')} would begin with a special token twice: once is kept"
        )
    out = Tokenised(found.ids, record, notes, [i for i, own in enumerate(found.own) if not own])
    _look(out, tokenizer, prompts, wrapping)
    return out


def _look(out: Tokenised, tokenizer, prompts: Sequence, wrapping: Wrapping) -> None:
    """Notes of prompts that are not what they seem: read as special tokens, unknown to the tokenizer, or alike."""
    said = [_whole(prompt) for prompt in prompts]
    specials = re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")
    held = Counter(token for text in said for token in set(specials.findall(text)))
    if held:
        out.record["special_tokens_in_prompts"] = dict(sorted(held.items()))
        if wrapping.template != "none":  # a prompt that brings its own template means them
            which = ", ".join(f"{token} ({count})" for token, count in held.most_common(_SHOWN))
            out.notes.append(f"texts of special tokens in prompts are read as these tokens: {which}")
    end = getattr(tokenizer, "eos_token_id", None)
    if wrapping.template == "chat" and end is not None and out.ids and out.ids[0][-1:] == [end]:
        out.notes.append(
            f"the chat template ends prompts with {names(tokenizer, [end])}: what follows it is measured"
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and any(unknown in ids for ids in out.ids):
        alone = [
            i
            for i, text in enumerate(said)
            if _all(unknown, tokenizer(text, add_special_tokens=False)["input_ids"])
        ]
        if alone:
            out.record["prompts_of_unknown_tokens"] = len(alone)
            out.notes.append(f"{_which(alone)} nothing but unknown tokens to this tokenizer")
    alike: dict[tuple[int, ...], dict] = {}
    for i, (ids, prompt) in enumerate(zip(out.ids, prompts, strict=True)):
        alike.setdefault(tuple(ids), {}).setdefault(prompt, i)
    same = [list(those.values()) for those in alike.values() if len(those) > 1]
    if same:
        out.record["different_prompts_of_equal_tokens"] = sum(map(len, same))
        out.notes.append(
            f"{_which(same[0])} different texts and the same tokens"
            + (f", and so are {len(same) - 1} more sets of prompts" if len(same) > 1 else "")
        )


def _whole(prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)


def _all(token: int, ids: Sequence[int]) -> bool:
    return bool(ids) and all(each == token for each in ids)


def _which(prompts: list[int]) -> str:
    more = f" and {len(prompts) - _SHOWN} more" if len(prompts) > _SHOWN else ""
    return f"prompt{'s' * (len(prompts) > 1)} {', '.join(map(str, prompts[:_SHOWN]))}{more} {'are' if len(prompts) > 1 else 'is'}"


def as_prompts(prompts: Iterable) -> tuple:
    """Prompts as the Python API takes them: P strings, P tuples of token ids, or P conversations, tuples of `Message`.

    Raises InputError for anything else, naming the first prompt that is wrong.
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings or of token-id lists, got a single string")
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns"):
        raise InputError(
            f"prompts must be a list of strings or of token-id lists, got {type(prompts).__name__}: "
            "give one of its columns as a list, or a conversation as a list of one"
        )
    prompts = list(prompts)
    if not prompts:
        raise InputError("there are no prompts: give at least one")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, (bytes, bytearray, memoryview)):
            raise InputError(
                f"prompt {i} is {type(prompt).__name__}: decode it to text, prompt.decode('utf-8')"
            )
    prompts = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompts]
    if isinstance(prompts[0], str):
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"prompt {i} is no text, and prompt 0 is: give all prompts in one form")
            if not prompt.strip():
                raise InputError(f"prompt {i} is empty: remove it or give it text")
        return tuple(prompts)
    if all(isinstance(p, Message) or (isinstance(p, Mapping) and "role" in p) for p in prompts):
        raise InputError("prompts is one conversation: make it one prompt of a list, [messages]")
    if is_conversation(prompts[0]):
        for i, prompt in enumerate(prompts):
            if not is_conversation(prompt):
                raise InputError(
                    f"prompt {i} is no chat messages, and prompt 0 is: give all prompts in one form"
                )
        return tuple(as_conversation(prompt, i) for i, prompt in enumerate(prompts))
    out = []
    for i, prompt in enumerate(prompts):
        try:
            out.append(tuple(operator.index(t) for t in prompt))
        except (TypeError, ValueError):
            raise InputError(
                f"prompt {i} is neither text nor a list of token ids: give all prompts in one form, which is text, token "
                "ids or chat messages"
            ) from None
    return tuple(out)


def to_token_ids(prompts: Iterable, tokenizer=None, template: str | Wrapping = "none") -> list[list[int]]:
    """Token ids of prompts as `as_prompts` takes them; strings and messages need a tokenizer.

    Raises InputError, naming the first prompt that is wrong.
    """
    return to_tokens(prompts, tokenizer, template).ids


def to_tokens(prompts: Iterable, tokenizer=None, template: str | Wrapping = "none") -> Tokenised:
    """`to_token_ids`, with how they came about. Token ids are taken as they are."""
    prompts = as_prompts(prompts)
    if isinstance(prompts[0], str) or is_conversation(prompts[0]):
        if tokenizer is None:
            kind = "text" if isinstance(prompts[0], str) else "chat messages"
            raise InputError(f"prompts are {kind}, so a tokenizer is needed: pass the model's")
        out = tokenised(tokenizer, prompts, template)
    else:
        out = Tokenised([list(prompt) for prompt in prompts], {"prompts": "token ids"})
        out.notes += _kept(out.ids, tokenizer)
        if out.notes:
            out.record["kept"] = list(out.notes)
    for i, tokens in enumerate(out.ids):
        if not tokens or i in out.empty:
            raise InputError(f"prompt {i} has no tokens: remove it or give it text")
    return out


def _kept(token_ids: Sequence[Sequence[int]], tokenizer) -> list[str]:
    """What would have been changed in texts, and is left in token ids, which may mean it."""
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    twice = [i for i, ids in enumerate(token_ids) if bos is not None and list(ids[:2]) == [bos, bos]]
    ended = [i for i, ids in enumerate(token_ids) if eos is not None and len(ids) > 1 and ids[-1] == eos]
    return [
        f"token ids are taken as they are: {_which(some)} {what}"
        for some, what in (
            (twice, "with BOS twice"),
            (ended, "with EOS at the end, behind which the next token is measured"),
        )
        if some
    ]


def all_tokens(
    prompts: Iterable, others: Iterable | None, tokenizer, template: str | Wrapping, about_others: str
) -> tuple[Tokenised, Tokenised | None]:
    """`to_tokens` of the prompts, and of others that go with them. about_others: begins what is said of those."""
    own = to_tokens(prompts, tokenizer, template)
    if others is None:
        return own, None
    try:
        return own, to_tokens(others, tokenizer, template)
    except InputError as error:
        raise InputError(f"{about_others}{error}") from error


def token_text(tokenizer, token: int) -> str:
    """What one token is as text, with its leading space; "" where nobody knows: no tokenizer, or a vocabulary that is larger
    than the tokenizer's. A piece of a letter is what the tokenizer calls it."""
    if tokenizer is None or token >= len(tokenizer):
        return ""
    text, piece = (
        tokenizer.decode([token], clean_up_tokenization_spaces=False),
        tokenizer.convert_ids_to_tokens(token),
    )
    if "\ufffd" in text:
        return str(piece)
    # SentencePiece leaves away the space before the first word.
    return " " + text if str(piece).startswith("\u2581") and not text.startswith(" ") else text
