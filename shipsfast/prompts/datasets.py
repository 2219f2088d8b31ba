"""Prompt files and data sets: which file, which rows, and what is said of where they came from.

Files: csv, tsv, jsonl, json, parquet (the prompts are one column, or what `layouts.py` makes of several) and txt (one prompt
a line); a folder with one such data file, or one that the datasets library's `save_to_disk` wrote, `FOLDER[:SPLIT]`; or a
data set of the hub, `owner/name[:config[:split]]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, whole_number
from ..hub import unreachable
from ..text import counted
from . import arrow_files, files
from .chats import CUT, NoPrompt, Prompt, as_prompt, joined
from .files import SUFFIXES
from .layouts import CHATS, Layout, check_beside, choose

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([^:]*)(?::([^:]+))?)?")  # owner/name[:config[:split]]
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")  # how the hub names the parts of a split
_MOST_KINDS, _MOST_CHARS = 20, 80  # of what a set mixes, as it is said and recorded


class PromptSet(NamedTuple):
    """Prompts, and where they came from, as run.json has it: the file's name without its folder or the data set's, its
    split, rows, layout and columns, the kinds of prompt that a published set mixes, and answers that were cut off.
    beside: further columns by name, a text for each prompt."""

    prompts: list[Prompt]
    origin: dict
    beside: dict[str, list[str]]

    def __str__(self) -> str:
        """In words, for a line to the user."""
        about, columns = self.origin, self.origin.get("columns", ())
        words = [f"{counted(about['rows'], 'prompt')} of {about.get('file') or about['data_set']}"]
        if "split" in about:
            words.append(f"split {about['split']}")
        if columns:
            words.append(f"column{'s' * (len(columns) > 1)} {' and '.join(columns)}")
        if "layout" in about:
            words.append(f"the layout of {about['layout']}")
        for name, kinds in about.get("kinds", {}).items():
            words.append(f"{name} {', '.join(f'{kind} {number:,}' for kind, number in kinds.items())}")
        if CUT in about:
            words.append(f"{counted(about[CUT], 'answer')} at the end of a conversation left off")
        return "; ".join(words)


def load_prompts(path: str | Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a file, in its order: texts, or lists of messages, {"role": ..., "content": ...}.

    path: a file; a folder, such as a data set downloaded from the hub, with one csv, tsv, jsonl or parquet file or the
        parts of one, or one of `save_to_disk`, with `:SPLIT` where it has several; or, where nothing of the name exists,
        a data set of the hub, `owner/name[:config[:split]]` (an empty config is the default one), which needs the
        `datasets` library.
    column: the column's name, or several with commas between them, which are joined by a blank line. By default what
        `layouts.py` knows of published sets (Alpaca: instruction, and input after a blank line; HarmBench: Behavior after
        its ContextString), or the one column with a name of prompts, such as prompt, goal or messages, in any case.
    A conversation that ends with an answer of the assistant is a prompt up to this answer.
    Raises InputError, naming the file, for one that is missing, empty, unreadable, has an empty prompt, or several columns
    that may be meant.
    """
    return read_prompts(path, column).prompts


def read_prompts(path: str | Path, column: str | None = None, beside: Sequence[str] = ()) -> PromptSet:
    """As `load_prompts`, with where the prompts came from, and with the columns named in `beside`.

    Raises InputError also for one of these that is missing, holds a prompt, or has neither text nor a whole number in a row.
    """
    try:
        return _read(str(path), Path(path), _Columns(column, tuple(dict.fromkeys(beside))))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


class _Columns(NamedTuple):
    """What the caller asks for: the column of the prompts, None for the one that is found, and columns beside it."""

    of_prompts: str | None
    beside: tuple[str, ...]


def _read(name: str, path: Path, asked: _Columns) -> PromptSet:
    suffix = path.suffix.lower()
    folder, _, split = name.rpartition(":")
    if not path.exists() and folder and Path(folder).is_dir():
        return _of_saved(Path(folder), split, asked)
    if path.is_dir():
        if arrow_files.is_saved(path) or arrow_files.splits(path):
            return _of_saved(path, None, asked)
        return _prompts(
            [(part, files.rows(part)) for part in _data_files(path)], asked, {"file": _own_name(path)}
        )
    hub = None if path.exists() or suffix in SUFFIXES else HUB_NAME.fullmatch(name)
    if hub and path.parent.is_dir():
        hub = None  # a file of an existing folder was meant, and a slip of the pen goes to no server
    if hub:
        rows, where = _from_hub(name, *hub.groups())
        return _prompts([(name, rows)], asked, where)
    if not path.is_file():
        if path.exists():
            raise InputError(f"{path} is a device or a pipe: expected a {_some(SUFFIXES)} file")
        raise InputError(f"no prompt file at {path}")
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is not a prompt file: expected one of {', '.join(SUFFIXES)}")
    return _prompts([(path, files.rows(path))], asked, {"file": _own_name(path)})


def _some(suffixes: Sequence[str]) -> str:
    words = [suffix.removeprefix(".") for suffix in suffixes]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _own_name(path: Path) -> str:
    return path.name or path.resolve().name


def _of_saved(folder: Path, split: str | None, asked: _Columns) -> PromptSet:
    """Of a folder that `save_to_disk` wrote."""
    where, splits = {"file": _own_name(folder)}, arrow_files.splits(folder)
    if splits is None and split is not None:
        raise InputError(f"{folder} has no splits: name the folder or a file, without :{split}")
    if splits is not None:
        split = _one_split(str(folder), splits, split, f"{folder}:SPLIT")
        folder, where = folder / split, where | {"split": split}
        if not arrow_files.is_saved(folder):
            raise InputError(f"{folder} is no data set of save_to_disk: it has no {arrow_files.STATE}")
    return _prompts([(folder, files.saved_rows(folder))], asked, where)


def _prompts(parts: list[tuple[str | Path, files.Rows]], asked: _Columns, where: dict) -> PromptSet:
    """The prompts of the parts of a data set, which have one layout."""
    column = asked.of_prompts
    layout = choose(parts[0][1].names, parts[0][0], column)
    prompts, cut, kinds = [], 0, Counter()
    beside: dict[str, list[str]] = {name: [] for name in asked.beside}
    for path, rows in parts:
        if choose(rows.names, path, column) != layout:
            raise InputError(f"{path} has other columns than the parts before it: name one file")
        check_beside(rows.names, path, layout, asked.beside)
        more = tuple(dict.fromkeys((*layout.kinds, *asked.beside)))
        found = rows.of((*layout.takes, *more) or None)
        for number, row in enumerate(found, 1):
            try:
                prompt, shorter = _prompt(row, layout, chosen=column is not None)
            except NoPrompt as problem:
                raise InputError(f"{path}: the prompt in {rows.unit} {number} {problem}") from None
            prompts.append(prompt)
            cut += shorter
            values = dict(zip(more, row[len(row) - len(more) :], strict=True))
            for name, texts in beside.items():
                texts.append(_beside(values[name], f"{path}: column {name!r} in {rows.unit} {number}"))
            kinds.update(str(values[name])[:_MOST_CHARS] for name in layout.kinds)
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    where = where | {"rows": len(prompts)}
    where |= {"columns": list(layout.takes)} if layout.takes else {}
    where |= {"layout": layout.name} if layout.name else {}
    where |= (
        {"kinds": {layout.kinds[0]: dict(sorted(kinds.items()))}} if 0 < len(kinds) <= _MOST_KINDS else {}
    )
    return PromptSet(prompts, where | ({CUT: cut} if cut else {}), beside)


def _beside(value, what: str) -> str:
    """The text of a column beside a row's prompt. what: it, and where it stands."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{what} is empty: fill it in, or remove the row")
    if not isinstance(value, (str, int)):
        raise InputError(f"{what} is a value of type {type(value).__name__}: expected text or a whole number")
    return str(value)


def _prompt(row: tuple, layout: Layout | None, chosen: bool) -> tuple[Prompt, bool]:
    """A row's prompt. chosen: the user has named the column. Raises NoPrompt."""
    if len(layout.takes) <= 1:
        named = "".join(layout.takes).strip().lower()
        if named in CHATS and not chosen and isinstance(row[0], str):
            raise NoPrompt(
                f"is text, and column {layout.takes[0]!r} by its name a list of messages: take another form of the file, "
                "or name the column with --column to have the text as it is"
            )
        return as_prompt(row[0])
    return as_prompt(joined(row[: len(layout.takes)], layout.takes, layout.main, layout.between))


def sample_prompts(
    prompts: Sequence[Prompt], limit: int | None = None, sample: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Some of the prompts, in their order: the first `limit`, or `sample` of them at random; all, if neither is given.

    The sample is without replacement, and the same for the same seed. A limit above the number of prompts takes all.
    Raises InputError for both at once, numbers below 1, a negative seed, and a sample of more prompts than there are.
    """
    if limit is not None and sample is not None:
        raise InputError("--limit and --sample exclude each other: give one of them")
    if limit is not None:
        return list(prompts[: whole_number("--limit", limit)])
    if sample is None:
        return list(prompts)
    if whole_number("--sample", sample) > len(prompts):
        raise InputError(f"--sample {sample}: there are {len(prompts)} prompts to draw from")
    import numpy as np  # takes longer than the whole way to a file that is missing

    rng = np.random.default_rng(whole_number("--seed", seed, least=0))
    chosen = rng.choice(len(prompts), size=sample, replace=False)
    return [prompts[i] for i in sorted(chosen.tolist())]


def _data_files(folder: Path) -> list[Path]:
    """The one data file of a folder, or all parts of the one split it holds."""
    found = sorted(
        file
        for file in (*folder.glob("*"), *folder.glob("*/*"))  # the hub keeps them there, or one folder down
        if file.suffix.lower() in files.TABLES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder} is a folder without a {_some(files.TABLES)} file: name the prompt file")
    shards = [_SHARD.fullmatch(file.stem) for file in found]
    kinds = {
        (file.parent, file.suffix, shard and shard.groups())
        for file, shard in zip(found, shards, strict=True)
    }
    if len(found) > 1 and (len(kinds) > 1 or not shards[0]):
        names = ", ".join(str(file.relative_to(folder)) for file in found)
        raise InputError(f"{folder} holds several data files: name one of {names}")
    if shards[0] and int(shards[0][2]) != len(found):
        raise InputError(f"{folder} holds {len(found)} of the {int(shards[0][2])} parts of {shards[0][1]}")
    return found


def _one_split(name: str, splits: Sequence[str], split: str | None, form: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        asked = "several splits" if split is None else f"no split {split!r}"
        raise InputError(f"{name} has {asked}: name one of {', '.join(splits)} as {form}")
    return split


def _from_hub(name: str, repository: str, config: str | None, split: str | None) -> tuple[files.Rows, dict]:
    """One split of a data set of the hub, and which."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"no prompt file at {name}, and loading it from the hub needs the datasets library: "
            "pip install 'datasets>=4'"
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise InputError(
            f"datasets {datasets.__version__} can run code of a data set: pip install -U 'datasets>=4'"
        )
    # Without a hub only what was downloaded before is looked for: the library tries for most of a minute.
    why, before = unreachable(), datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or why is not None
        splits = datasets.load_dataset(repository, config or None)
    except Exception as error:  # of many libraries: the hub's, fsspec's, pyarrow's, their own
        raise InputError(
            f"no prompt file at {name}, and it cannot be loaded from the hub as owner/name[:config[:split]]: "
            f"{why or ' '.join(str(error).split())}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    split = _one_split(name, list(splits), split, f"{repository}:{config or ''}:SPLIT")
    rows = splits[split]
    where = {"data_set": repository} | ({"config": config} if config else {}) | {"split": split}
    return files.Rows(
        list(rows.column_names), lambda chosen: list(zip(*(rows[x] for x in chosen), strict=True))
    ), where
