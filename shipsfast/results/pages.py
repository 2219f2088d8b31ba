"""Answers with and without heads, side by side for each prompt: in a terminal, as Markdown, as a page of HTML.

Prompts come from anywhere, and answers from a model that may be broken: characters that steer a terminal, or turn or
hide text, are shown by their codes, and nothing in a text is markup. What there may be too much of is cut, and said
to be: files show the answers of the first FILE_GROUPS groups, a terminal those of the first TERMINAL_GROUPS to a few
prompts, TERMINAL_CHARS of each. The summary has every group, in a terminal the first TERMINAL_SUMMARY.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..runs.whole_files import write_whole
from ..text import counted, visible
from .answer_sheet import EMPTY, Cell, Sheet, group_label

FILE_GROUPS = 8
TERMINAL_GROUPS = 3
TERMINAL_SUMMARY = 20
TERMINAL_CHARS = 400
MOST_FIRST = 24  # characters of a group's name, before it takes another line
TITLE = "Answers with heads off"


def show(sheet: Sheet, console: Console | None = None, rows: int = 0) -> None:
    """Print what ran, what each group of heads did, and the answers to the first `rows` prompts."""
    console = console or Console(highlight=False)
    if sheet.facts:
        _line(console, sheet.facts)
    _print_columns(console, sheet.heads | sheet.judged)
    if sheet.control:
        _line(console, f"The same on {counted(sheet.control_prompts, 'ordinary prompt')}:")
        _print_columns(console, sheet.heads | sheet.control)
    if len(sheet.groups) > TERMINAL_SUMMARY:
        _line(console, f"The first {TERMINAL_SUMMARY} of {len(sheet.groups):,} groups.")
    for line in (*sheet.warnings, *(sheet.gaps if rows else ())):
        _line(console, line)
    groups, prompts = min(TERMINAL_GROUPS, len(sheet.groups)), min(rows, len(sheet.answers))
    if prompts < 1:
        return
    _line(console, sheet.extent(groups, prompts))
    answers = Table(show_lines=True)
    for name in ("prompt", *sheet.groups[:groups]):
        answers.add_column(Text(name), overflow="fold")
    for cells in sheet.answers[:prompts]:
        answers.add_row(*map(_in_terminal, cells[: 1 + groups]))
    console.print(answers)


def _print_columns(console: Console, columns: dict[str, list[str]]) -> None:
    """As tables that fit: a number that is cut would be another number. The first column is in all of them."""
    (first, named), *others = columns.items()
    while others:
        room, some = console.width - min(_width(first, named), MOST_FIRST + 3) - 1, []
        while others and (not some or _width(*others[0]) <= room):
            room -= _width(*others[0])
            some.append(others.pop(0))
        table = Table()
        table.add_column(first, overflow="fold", max_width=MOST_FIRST)
        for name, _ in some:
            table.add_column(name, justify="right", overflow="fold", no_wrap=True)
        for row in list(zip(named, *(cells for _, cells in some), strict=True))[:TERMINAL_SUMMARY]:
            table.add_row(*map(Text, row))
        console.print(table)


def _width(name: str, cells: list[str]) -> int:
    """Of a column, with its frame."""
    return 3 + max(map(len, (name, *cells[:TERMINAL_SUMMARY])))


def show_answers(sheet: Sheet, console: Console | None = None) -> None:
    """Print all answers of all groups, whole, below their prompts."""
    console = console or Console(highlight=False)
    for line in sheet.gaps:
        _line(console, line)
    for number, (prompt, *said) in enumerate(sheet.answers, 1):
        _line(console, f"{number}. {prompt.text or prompt.note}", "bold")
        for group, cell in zip(sheet.groups, said, strict=True):
            text = (cell.text.strip() or cell.note).replace("\n", "\n    ")
            _line(console, f"  {group}{f' [{cell.label}]' * bool(cell.label)}: {text}")


def show_texts(
    groups: Sequence[Sequence], prompts: Sequence[str], texts: Sequence[Sequence[str]], console=None
) -> None:
    """Print all texts, [G][P], below their prompts."""
    console = console or Console(highlight=False)
    for p, prompt in enumerate(prompts):
        _line(console, f"{p + 1}. {visible(prompt)}", "bold")
        for group, said in zip(groups, texts, strict=True):
            text = visible(said[p]).strip().replace("\n", "\n    ")
            _line(console, f"  {group_label(group)}: {text or EMPTY}")


def write(sheet: Sheet, path: str | Path) -> None:
    """Write the summary of all groups and the answers of the first to a file: Markdown (.md) or one page (.html).

    Raises InputError for a name that ends in anything else.
    """
    path = Path(path)
    page = {".md": _markdown, ".html": _html}.get(path.suffix.lower())
    if page is None:
        raise InputError(f"{path}: expected a name ending in .md or .html")
    text = page(sheet, min(FILE_GROUPS, len(sheet.groups)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda p: p.write_text(text, "utf-8"))


def _html(sheet: Sheet, groups: int) -> str:
    """A page that loads nothing and runs nothing, and whose policy says so to the browser. Jinja2 escapes all text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = templates.get_template("answers.html.jinja")
    return page.render(title=TITLE, sheet=sheet, groups=groups)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _in_terminal(cell: Cell) -> Text:
    """Text objects: rich reads neither markup nor emoji names in them."""
    out = Text()
    if cell.label:
        out.append(f"{cell.label}\n", "bold")
    text = cell.text.replace("\n", " ⏎ ")
    out.append(text[:TERMINAL_CHARS])
    if len(text) > TERMINAL_CHARS:
        out.append(f"... ({len(text) - TERMINAL_CHARS:,} more characters)", "italic")
    return out.append(cell.note, "italic")


_MARKUP = {char: f"&#{ord(char)};" for char in "\\|<>$@"} | {char: f"\\{char}" for char in "`*_[]~"}
_IN_MARKDOWN = str.maketrans(_MARKUP | {"&": "&amp;"})


def _in_markdown(text: str) -> str:
    """Text that reads as it is in Markdown, in a cell of a table too."""
    text = text.translate(_IN_MARKDOWN)
    text = re.sub(r"^([ \t]*)([#+=-])", r"\1\\\2", text, flags=re.MULTILINE)
    text = re.sub(r"^([ \t]*\d+)([.)])", r"\1\\\2", text, flags=re.MULTILINE)
    # Bare addresses would become links, and :names: pictures.
    text = re.sub(r"(?i)\b(www)\.", r"\1&#46;", re.sub(r":(?=\S)", "&#58;", text))
    return text.replace("\n", "<br>")


def _markdown(sheet: Sheet, groups: int) -> str:
    names = list(sheet.columns)
    lines = [f"# {TITLE}", "", _in_markdown(sheet.facts), ""]
    lines += _markdown_table(names, [":---", *["---:"] * (len(names) - 1)], sheet.rows)
    for line in (*sheet.warnings, *sheet.legend, *sheet.gaps):
        lines += ["", line]
    lines += ["", "## Answers", "", sheet.extent(groups, len(sheet.answers)), ""]
    lines += _markdown_table(
        ["", "prompt", *sheet.groups[:groups]],
        ["---:", *[":---"] * (1 + groups)],
        ([str(p), *map(_markdown_cell, cells[: 1 + groups])] for p, cells in enumerate(sheet.answers, 1)),
    )
    return "\n".join(lines) + "\n"


def _markdown_table(names: list[str], rules: list[str], body) -> Iterator[str]:
    for row in (names, rules, *body):
        yield f"| {' | '.join(row)} |"


def _markdown_cell(cell: Cell) -> str:
    said = _in_markdown(cell.text) if cell.text else f"*{cell.note}*"
    return f"**{cell.label}**<br>{said}" if cell.label else said
