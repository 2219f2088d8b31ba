"""Prompt files, templates and tokenising.

Files: csv, jsonl, parquet (the prompts are a column) and txt (one prompt a line).
Templates: `chat` is the tokenizer's own chat template with one user turn; `query-answer` is the wrapper of
the paper's Ships (arXiv 2410.13708, appendix B.1); `none` takes the prompt as it is; any other string must
contain {prompt}.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError

from .errors import InputError

COLUMNS = ("input", "goal", "prompt", "query", "behavior")
TEMPLATES = {"query-answer": "## Query:{prompt} \n## Answer:", "none": "{prompt}"}
SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")


def load_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order.

    column: the column's name; by default the first of COLUMNS that the file has, in any case.
    Raises InputError, naming the file, for one that is missing, empty, unreadable or has an empty prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no prompt file at {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is not a prompt file: expected one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".txt":
            prompts = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            where = "line"
        else:
            prompts, where = _column(_records(path, suffix), path, column), "row"
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{path}: the prompt in {where} {i + 1} is empty: remove it or give it text")
    return prompts


def _records(path: Path, suffix: str) -> dict[str, list]:
    """Columns by name."""
    import pandas as pd

    try:
        if suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        elif suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise InputError(
                    f"{path}: every line must be a JSON object with the prompt under one of its keys"
                )
            frame = pd.DataFrame.from_records(rows)
    except UnicodeDecodeError:
        raise
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON lines: {error}") from error
    except (pd.errors.ParserError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as {suffix[1:]}: {' '.join(str(error).split())}") from error
    return {str(name): frame[name].tolist() for name in frame.columns}


def _column(columns: dict[str, list], path: Path, column: str | None) -> list:
    if not columns:
        raise InputError(f"{path} is empty")
    if column is not None:
        if column not in columns:
            raise InputError(f"{path} has no column {column!r}: it has {', '.join(columns)}")
        return columns[column]
    by_name = {name.strip().lower(): name for name in reversed(columns)}
    for name in COLUMNS:
        if name in by_name:
            return columns[by_name[name]]
    raise InputError(
        f"{path} has no column named {', '.join(COLUMNS)}: it has {', '.join(columns)}; name the right one with --column"
    )


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


def to_token_ids(prompts: Sequence, tokenizer=None, template: str = "none") -> list[list[int]]:
    """Prompts as the Python API takes them: P strings (with a tokenizer) or P lists of token ids.

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
        if tokenizer is None:
            raise InputError("prompts are text, so a tokenizer is needed: pass the model's")
        ids = tokenize(tokenizer, prompts, template)
    else:
        ids = []
        for i, prompt in enumerate(prompts):
            try:
                ids.append([operator.index(t) for t in prompt])
            except (TypeError, ValueError):
                raise InputError(
                    f"prompt {i} is neither text nor a list of token ids: give all prompts in one of the two forms"
                ) from None
    for i, tokens in enumerate(ids):
        if not tokens:
            raise InputError(f"prompt {i} has no tokens: remove it or give it text")
    return ids
