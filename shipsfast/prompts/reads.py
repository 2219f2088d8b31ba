"""Where a prompt is read: behind its last token, at other positions of it, or before every token of an answer.

A read is a position of a sequence whose next-token distribution is measured. Without answers and positions each prompt has one,
its last. An answer of A tokens follows its prompt as it is (teacher forcing) and has A reads: token a is read at the position
before it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..text import counted, one_line
from .special_tokens import names

Place = int | str


@dataclass(frozen=True)
class Reads:
    """ids: the sequences, of prompts with their answers; places: the positions of each that are read, as they were asked for; targets: the
    answers' tokens, one for each read, None without answers; notes: what a user should know of them."""

    ids: list[list[int]]
    places: list[tuple[int, ...]]
    targets: list[tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()


def as_answers(answers: Iterable, count: int) -> tuple:
    """One answer for each of `count` prompts: strings, or tuples of token ids. Raises InputError for anything else."""
    if isinstance(answers, (str, bytes)) or not isinstance(answers, Iterable):
        raise InputError(
            f"answers must be a list with one text or token-id list for each prompt, got {type(answers).__name__}"
        )
    answers = [answer.tolist() if hasattr(answer, "tolist") else answer for answer in answers]
    if len(answers) != count:
        raise InputError(
            f"there are {counted(len(answers), 'answer')} for {counted(count, 'prompt')}: give one for each"
        )
    out = []
    for i, answer in enumerate(answers):
        if isinstance(answer, str):
            out.append(answer)
            continue
        try:
            out.append(tuple(operator.index(token) for token in answer))
        except TypeError:
            raise InputError(f"answer {i} is neither text nor a list of token ids: {answer!r:.80}") from None
    for i, answer in enumerate(out):
        if isinstance(answer, str) != isinstance(out[0], str):
            raise InputError(
                f"answer {i} is in another form than answer 0: give all as text, or all as token ids"
            )
        if not len(answer):
            raise InputError(f"answer {i} is empty: give it text, or leave its prompt out")
    return tuple(out)


def with_answers(ids: Sequence[Sequence[int]], answers: Sequence, tokenizer) -> Reads:
    """Prompts, each followed by its answer, as `as_answers` gives them. A text is tokenised on its own, without special tokens
    around it; texts of special tokens in it are read as these."""
    if isinstance(answers[0], str):
        if tokenizer is None:
            raise InputError(
                "answers are text, so a tokenizer is needed: pass the model's, or give token ids"
            )
        tokens = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    else:
        tokens = answers
    for i, answer in enumerate(tokens):
        if not len(answer):
            raise InputError(f"answer {i} has no tokens: give it text, or leave its prompt out")
    pairs = list(zip(ids, tokens, strict=True))
    return Reads(
        [[*prompt, *map(int, answer)] for prompt, answer in pairs],
        [tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1)) for prompt, answer in pairs],
        [tuple(map(int, answer)) for _, answer in pairs],
    )


def as_places(at, count: int) -> tuple[tuple[Place, ...], ...]:
    """The positions of each of `count` prompts, as they were given: one for all, or a list with one, or several in a tuple, for
    each. Raises InputError for anything else."""
    each = [at] * count if _is_place(at) else at
    if not isinstance(each, (list, tuple)) and not hasattr(each, "tolist"):
        raise InputError(
            f"at={at!r} (--at): expected all, end, a position, a text of the prompt, or one of these for each prompt"
        )
    each = each.tolist() if hasattr(each, "tolist") else list(each)
    if len(each) != count:
        raise InputError(
            f"at has {counted(len(each), 'position')} for {counted(count, 'prompt')}: give one for all, or one for each prompt"
        )
    out = tuple(
        (places,) if _is_place(places) else tuple(places) if isinstance(places, (list, tuple)) else ()
        for places in each
    )
    for i, places in enumerate(out):
        if not places or not all(map(_is_place, places)):
            raise InputError(
                f"at, prompt {i}: expected a position, a text of the prompt, or several of them, got {each[i]!r}"
            )
    return tuple(tuple(p if isinstance(p, str) else operator.index(p) for p in places) for places in out)


def _is_place(value) -> bool:
    if isinstance(value, (str, bool)):
        return isinstance(value, str) and bool(value)
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def at_places(ids: Sequence[Sequence[int]], places: Sequence[Sequence[Place]], tokenizer) -> Reads:
    """Prompts read at these positions, as `as_places` gives them: from the end where negative; of a text, which must stand in the
    prompt once, its last token, or the one that its last character is part of."""
    found = []
    for i, (own, wanted) in enumerate(zip(ids, places, strict=True)):
        positions: dict[int, Place] = {}
        for place in wanted:
            at = _position(own, place, tokenizer, i)
            if at in positions:
                raise InputError(
                    f"at, prompt {i}: {positions[at]!r} and {place!r} are one position, {at}: name each once"
                )
            positions[at] = place
        found.append(tuple(positions))
    return Reads([list(own) for own in ids], found, notes=tuple(_said(ids, found, tokenizer)))


def _said(ids: Sequence[Sequence[int]], found: Sequence[tuple[int, ...]], tokenizer) -> Iterator[str]:
    tokens = [f"{names(tokenizer, [ids[0][place]])} ({place} of {len(ids[0])})" for place in found[0]]
    yield f"prompt 0 is read behind its token {', '.join(tokens)}, counted from 0"
    alike = {tuple(own[: max(places) + 1]) for own, places in zip(ids, found, strict=True)}
    if len(alike) == 1 < len(ids):
        yield f"all {len(ids)} prompts begin with the same tokens up to where they are read: their scores are one and the same"


def _position(ids: Sequence[int], place: Place, tokenizer, prompt: int) -> int:
    if isinstance(place, str):
        return _of_text(ids, place, tokenizer, prompt)
    if not -len(ids) <= place < len(ids):
        raise InputError(
            f"at={place} (--at): prompt {prompt} has {counted(len(ids), 'token')}, so positions from {-len(ids)} to {len(ids) - 1}"
        )
    return place % len(ids)


def _of_text(ids: Sequence[int], text: str, tokenizer, prompt: int) -> int:
    if tokenizer is None:
        raise InputError(
            f"at={text!r} is a text, so a tokenizer is needed: pass the model's, or give the position"
        )

    def written(count: int) -> str:
        return tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False)

    whole = written(len(ids))
    times = sum(whole.startswith(text, start) for start in range(len(whole)))
    if times != 1:
        found = f"is {times:,} times in" if times else "is not in"
        raise InputError(
            f"at={text!r} (--at): it {found} prompt {prompt}, {one_line(whole)!r:.120}: give a text that is in it "
            "once, or the position"
        )
    low, high = 1, len(ids)  # the fewest tokens that write it
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if text in written(middle) else (middle + 1, high)
    return low - 1
