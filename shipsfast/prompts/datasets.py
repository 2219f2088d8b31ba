"""Prompt files and data sets, templates and tokenising.

Files: csv, jsonl, parquet (the prompts are a column) and txt (one prompt a line); a folder with one such data file;
or a data set of the hub, `owner/name[:config[:split]]`. Among them the published forms of AdvBench (csv with goal,
target), JailbreakBench (csv or the hub's JailbreakBench/JBB-Behaviors:behaviors:harmful; its prompt is Goal, while
Behavior is a short name), MaliciousInstruct (txt), and the csv with `input` of the paper's repository.
Templates: `chat` is the tokenizer's own chat template with one user turn; `query-answer` is the wrapper of
the paper's Ships (arXiv 2410.13708, appendix B.1); `none` takes the prompt as it is; any other string must
contain {prompt}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, whole_number
from . import files

# The first that is there holds the prompts: in JailbreakBench Goal, not Behavior.
COLUMNS = ("input", "goal", "prompt", "query", "behavior")
SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([^:]*)(?::([^:]+))?)?")  # owner/name[:config[:split]]
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")  # how the hub names the parts of a split


def load_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order.

    path: a file; a folder, such as a data set downloaded from the hub, with one csv, jsonl or parquet file or the
        parts of one; or, where nothing of the name exists, a data set of the hub, `owner/name[:config[:split]]`
        (an empty config is the default one), which needs the `datasets` library.
    column: the column's name; by default the first of COLUMNS that the file has, in any case.
    Raises InputError, naming the file, for one that is missing, empty, unreadable or has an empty prompt.
    """
    try:
        return _load(str(path), Path(path), column)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _load(name: str, path: Path, column: str | None) -> list[str]:
    if path.is_dir():
        return [prompt for part in _data_files(path) for prompt in load_prompts(part, column)]
    suffix = path.suffix.lower()
    hub = None if path.exists() or suffix in SUFFIXES else HUB_NAME.fullmatch(name)
    if hub and path.parent.is_dir():
        hub = None  # a file of an existing folder was meant, and a slip of the pen goes to no server
    if not hub and not path.is_file():
        if path.exists():
            raise InputError(f"{path} is a device or a pipe: expected a csv, jsonl, parquet or txt file")
        raise InputError(f"no prompt file at {path}")
    if not hub and suffix not in SUFFIXES:
        raise InputError(f"{path} is not a prompt file: expected one of {', '.join(SUFFIXES)}")
    if hub:
        prompts, where = _from_hub(name, *hub.groups(), column), "row"
    elif suffix == ".txt":
        prompts, where = [line for line in files.lines(path) if line.strip()], "line"
    else:
        chosen = _choose(files.names(path), path, column)
        prompts, where = files.column(path, chosen), "row"
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{path}: the prompt in {where} {i + 1} is empty: remove it or give it text")
        problem = _not_text(prompt)
        if problem:
            raise InputError(f"{path}: the prompt in {where} {i + 1} {problem}: remove it or the row")
    return prompts


def _not_text(prompt: str) -> str | None:
    """What is in it that no tokenizer can take, or that no text has."""
    if "\0" in prompt:
        return "holds a NUL character"
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair, U+{ord(prompt[error.start]):04X}"
    return None


def sample_prompts(
    prompts: Sequence[str], limit: int | None = None, sample: int | None = None, seed: int = 0
) -> list[str]:
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
    rng = np.random.default_rng(whole_number("--seed", seed, least=0))
    chosen = rng.choice(len(prompts), size=sample, replace=False)
    return [prompts[i] for i in sorted(chosen.tolist())]


def _data_files(folder: Path) -> list[Path]:
    """The one data file of a folder, or all parts of the one split it holds."""
    files = sorted(
        file
        for file in (*folder.glob("*"), *folder.glob("*/*"))  # the hub keeps them there, or one folder down
        if file.suffix.lower() in (".csv", ".jsonl", ".parquet")
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise InputError(f"{folder} is a folder without a csv, jsonl or parquet file: name the prompt file")
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    kinds = {
        (file.parent, file.suffix, shard and shard.groups())
        for file, shard in zip(files, shards, strict=True)
    }
    if len(files) > 1 and (len(kinds) > 1 or not shards[0]):
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise InputError(f"{folder} holds several data files: name one of {names}")
    if shards[0] and int(shards[0][2]) != len(files):
        raise InputError(f"{folder} holds {len(files)} of the {int(shards[0][2])} parts of {shards[0][1]}")
    return files


def _from_hub(name: str, repository: str, config: str | None, split: str | None, column: str | None) -> list:
    """The prompts of one split of a data set of the hub."""
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
    try:
        splits = datasets.load_dataset(repository, config or None)
    except Exception as error:  # of many libraries: the hub's, fsspec's, pyarrow's, their own
        raise InputError(
            f"no prompt file at {name}, and it cannot be loaded from the hub as owner/name[:config[:split]]: "
            f"{' '.join(str(error).split())}"
        ) from error
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        asked = "several splits" if split is None else f"no split {split!r}"
        form = f"{repository}:{config or ''}:SPLIT"
        raise InputError(f"{name} has {asked}: name one of {', '.join(splits)} as {form}")
    rows = splits[split]
    return list(rows[_choose(list(rows.column_names), name, column)])


def _choose(columns: Sequence[str], path: str | Path, column: str | None) -> str:
    """The name of the prompts' column."""
    if not columns:
        raise InputError(f"{path} is empty")
    if column is not None:
        if column not in columns:
            raise InputError(f"{path} has no column {column!r}: it has {', '.join(columns)}")
        return column
    by_name = {name.strip().lower(): name for name in reversed(columns)}
    for name in COLUMNS:
        if name in by_name:
            return by_name[name]
    raise InputError(
        f"{path} has no column named {', '.join(COLUMNS)}: it has {', '.join(columns)}; name the right one with --column"
    )
