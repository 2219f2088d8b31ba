"""Which columns of a file hold its prompts, and what a prompt is made of.

Published sets are known by their columns. In any other file one column bears a name of prompts; where several do, or a
context stands beside it, nobody can know, and the file is refused with the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

CHATS = ("messages", "conversations", "conversation")
COLUMNS = (
    "input",
    "goal",
    "prompt",
    "query",
    "behavior",
    "instruction",
    "question",
    "forbidden_prompt",
    *CHATS,
)
# What may belong to a prompt.
BESIDE = (
    "context",
    "contextstring",
    "passage",
    "history",
    "system",
    "system_prompt",
    "choices",
    "options",
)
# What a text is about, and no text holds.
MEDIA = (
    "image", "images", "image_path", "image_url", "img", "picture", "pixel_values", "video", "videos", "audio", "audios",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What a prompt is made of, by the columns of a file.

    name: of the published form, None for a file of one's own; has: the columns that tell it; takes: those of the prompt, in
    their order; main: the one of them that may not be empty; between: what stands between those that are not empty;
    kinds: columns that tell apart what the set mixes, the first that is there counts.
    """

    name: str | None
    takes: tuple[str, ...]
    has: tuple[str, ...] = ()
    main: str | None = None
    between: str = "\n\n"
    kinds: tuple[str, ...] = ()


# In lower case, as files are compared.
KNOWN = (
    Layout("Alpaca", ("instruction", "input"), ("instruction", "input", "output"), "instruction"),
    Layout(  # the separator is that of its DirectRequest
        "HarmBench", ("contextstring", "behavior"), ("behavior", "contextstring", "behaviorid"), "behavior",
        "\n\n---\n\n", ("functionalcategory",),
    ),
    Layout("JailbreakBench", ("goal",), ("goal", "target", "behavior", "category")),
    Layout("AdvBench", ("goal",), ("goal", "target")),
    Layout("StrongREJECT", ("forbidden_prompt",), ("forbidden_prompt", "category")),
    Layout("XSTest", ("prompt",), ("prompt", "type", "focus"), kinds=("label", "type")),
    Layout("OR-Bench, or another of prompt and category", ("prompt",), ("prompt", "category"), kinds=("category",)),
)  # fmt: skip


def choose(columns: Sequence[str] | None, path: str | Path, column: str | None) -> Layout:
    """The layout of a file with these columns, by the file's own names. Without columns (None) it takes none.

    column: the user's choice, which is one name or several with commas between them.
    Raises InputError for a file without such a column, and for one where the choice is the user's.
    """
    if columns is None:
        return Layout(None, ())
    columns = list(dict.fromkeys(columns))
    if not columns:
        raise InputError(f"{path} is empty")
    if column is not None:
        return Layout(None, _named(columns, path, column))
    found = {name.strip().lower(): name for name in reversed(columns)}
    media = [name for name in columns if name.strip().lower() in MEDIA]
    if media:
        raise InputError(
            f"{path} has prompts with {', '.join(media)}, and only text is read: name the column of the text with --column to "
            "scan it without them"
        )
    prompts = [name for name in columns if name.strip().lower() in COLUMNS]
    beside = [name for name in columns if name.strip().lower() in BESIDE]
    meant = [name.strip().lower() for name in (*prompts, *beside)]
    for known in KNOWN:
        has = set(known.has)
        if has <= found.keys() and has.issuperset(meant) and len(set(meant)) == len(meant):
            return _with_names(known, found)
    if not prompts:
        raise InputError(
            f"{path} has no column named {', '.join(COLUMNS)}: it has {', '.join(columns)}; name the right one with --column"
        )
    if len(prompts) + len(beside) > 1:
        several = ", ".join([*prompts, *beside])
        raise InputError(
            f"{path} has several columns that may be of the prompt, {several}: name one with --column, or those that belong "
            f"together, as in --column {','.join([*beside, *prompts][:2])}, with a blank line between them"
        )
    return Layout(None, (prompts[0],))


def check_beside(
    columns: Sequence[str] | None, path: str | Path, layout: Layout, beside: Sequence[str]
) -> None:
    """Raises InputError for columns `beside` the prompts' that the file does not have, or that hold its prompts."""
    for name in beside:
        if columns is None:
            raise InputError(
                f"{path} has prompts and no columns, so none is named {name!r}: take a csv or jsonl file"
            )
        if name not in columns:
            raise _no_column(columns, path, name)
        if name in layout.takes:
            raise InputError(
                f"{path}: column {name!r} holds the prompts: name another one for what stands beside them"
            )


def _no_column(columns: Sequence[str], path: str | Path, name: str) -> InputError:
    return InputError(f"{path} has no column {name!r}: it has {', '.join(columns)}")


def _named(columns: list[str], path: str | Path, column: str) -> tuple[str, ...]:
    if column in columns:
        return (column,)
    several = tuple(column.split(","))
    for name in several:
        if name not in columns:
            raise _no_column(columns, path, name)
    return several


def _with_names(known: Layout, found: dict[str, str]) -> Layout:
    """With the file's own names in place of those in lower case."""
    return Layout(
        known.name,
        tuple(found[name] for name in known.takes),
        tuple(found[name] for name in known.has),
        found.get(known.main),
        known.between,
        tuple(found[name] for name in known.kinds if name in found)[:1],
    )
