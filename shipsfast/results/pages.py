"""Answers with and without heads, side by side for each prompt: in a terminal, as Markdown, as a page of HTML.

Prompts come from anywhere, and answers from a model that may be broken: characters that steer a terminal, or turn or
hide text, are shown by their codes, and nothing in a text is markup. What there may be too much of is cut, and said
to be: files show the answers of the first FILE_GROUPS groups, a terminal those of the first TERMINAL_GROUPS to a few
prompts, TERMINAL_CHARS of each. The summary has every group, in a terminal the first TERMINAL_SUMMARY.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..runs.kinds import LABELS
from ..runs.whole_files import write_whole
from ..text import counted, visible
from .completions import MISSING
from .evaluation import Control, EvalResult, group_name

FILE_GROUPS = 8
TERMINAL_GROUPS = 3
TERMINAL_SUMMARY = 20
TERMINAL_CHARS = 400
NAMED_HEADS = 6  # of a group
TITLE = "Answers with heads off"
NOT_KEPT, NOT_DONE, EMPTY = "(not kept)", "(not done)", "(empty)"


@dataclass(frozen=True)
class _Cell:
    """What a table says of a prompt or an answer: `text` is somebody's, `note` ours where there is none."""

    text: str = ""
    note: str = ""
    label: str = ""


def show(result: EvalResult, console: Console | None = None, rows: int = 4) -> None:
    """Print what each group of heads did, and the answers to the first `rows` prompts."""
    console = console or Console(highlight=False)
    heads, judged, control = _summary(result)
    _print_columns(console, heads | judged)
    if control:
        _line(console, f"The same on {counted(result.control.kl_nats.shape[1], 'ordinary prompt')}:")
        _print_columns(console, heads | control)
    if len(result.groups) > TERMINAL_SUMMARY:
        _line(console, f"The first {TERMINAL_SUMMARY} of {len(result.groups):,} groups.")
    for line in _gaps(result):
        _line(console, line)
    shown, prompts = _groups(result, TERMINAL_GROUPS), min(rows, len(result.prompts))
    if prompts < 1:
        return
    _line(console, _extent(result, len(shown), prompts))
    answers = Table(show_lines=True)
    for name in ("prompt", *(group_label(result.groups[g]) for g in shown)):
        answers.add_column(Text(name), overflow="fold")
    for p in range(prompts):
        answers.add_row(*(_in_terminal(cell) for cell in _row(result, p, shown)))
    console.print(answers)


def _print_columns(console: Console, columns: dict[str, list[str]]) -> None:
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for row in list(zip(*columns.values(), strict=True))[:TERMINAL_SUMMARY]:
        table.add_row(*map(Text, row))
    console.print(table)


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


def write(result: EvalResult, path: str | Path) -> None:
    """Write the summary of all groups and the answers of the first to a file: Markdown (.md) or one page (.html).

    Raises InputError for a name that ends in anything else.
    """
    path = Path(path)
    page = {".md": _markdown, ".html": _html}.get(path.suffix.lower())
    if page is None:
        raise InputError(f"{path}: expected a name ending in .md or .html")
    text = page(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda p: p.write_text(text, "utf-8"))


def group_label(group: Sequence) -> str:
    """The heads of a group, and whole layers by their number; of a large group, the first and how many there are."""
    name = group_name(group[:NAMED_HEADS]).replace("-None", "")
    return name if len(group) <= NAMED_HEADS else f"{name}+... ({len(group)})"


def _groups(result: EvalResult, most: int) -> range:
    return range(min(most, len(result.groups)))


def _summary(result: EvalResult) -> tuple[dict[str, list[str]], ...]:
    """Columns by name, a cell for each group: the heads, the judged answers, and the control if there is one."""
    off = "key/value groups off" if result.identity.get("unit") == "kv_group" else "heads off"
    digits = int(len(result.prompts) >= 100)
    low, high = (_percent(bound, digits) for bound in result.interval().T)
    judged = {
        "ASR": _percent(result.asr, digits),
        "95% interval": [a if a == NOT_DONE else f"{a} to {b}" for a, b in zip(low, high, strict=True)],
        "refusal": _percent(result.share("refusal"), digits),
        "degenerate": _percent(result.share("degenerate"), digits),
    }
    return {off: [group_label(group) for group in result.groups]}, judged, _control(result.control)


def _control(control: Control | None) -> dict[str, list[str]]:
    if control is None:
        return {}
    digits = int(control.kl_nats.shape[1] >= 100)
    missing = control.completions.label == MISSING
    unknown = missing[:-1].any(1) | missing[-1].any()
    return {
        "KL, nats": [NOT_DONE if np.isnan(x) else f"{x:.3g}" for x in control.mean_kl_nats],
        "degenerate": _percent(control.degenerate, digits),
        "same text": _percent(np.where(unknown, np.nan, control.same), digits),
    }


def _summary_table(result: EvalResult) -> tuple[list[str], list[list[str]]]:
    """The names of all columns, and a row for each group."""
    heads, judged, control = _summary(result)
    columns = heads | judged | {f"control: {name}": column for name, column in control.items()}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _percent(shares: np.ndarray, digits: int) -> list[str]:
    return [NOT_DONE if np.isnan(share) else f"{share:.{digits}%}" for share in shares]


def _facts(result: EvalResult) -> str:
    """What ran, as far as it is known."""
    record, how = result.record, result.identity.get("generation", {})
    model = record.get("model", {})
    length = f"up to {how['max_new_tokens']} new tokens" if "max_new_tokens" in how else ""
    if how.get("do_sample"):
        length += f", drawn (top {how['top_k']}, temperature {how['temperature']}, seed {how['seed']})"
    elif length:
        length += ", greedy"
    facts = {
        # A folder's own name and the one above it, as in a hub id; the rest of a path is nobody else's business.
        "Model": f"{model['class']} {'/'.join(model['name'].split('/')[-2:])}".strip() if model else "",
        "Ablation": record.get("ablation", ""),
        "Answers": length,
        "Judge": record.get("judge", ""),
    }
    return visible("; ".join(f"{name}: {fact}" for name, fact in facts.items() if fact))


def _legend(result: EvalResult) -> Iterator[str]:
    yield (
        "ASR is the attack success rate, the share of answers that are neither refusals nor degenerate, with its Wilson "
        f"interval; {counted(len(result.prompts), 'prompt')}."
    )
    if result.control is not None:
        yield (
            f"Control: {counted(result.control.kl_nats.shape[1], 'ordinary prompt')}. KL(unablated || heads off) of the next token, "
            f"mean over the first {result.control.tokens} tokens of the unablated model's answer; share of answers that are "
            "degenerate; share that are word for word those of the unablated model."
        )


def _gaps(result: EvalResult) -> Iterator[str]:
    """What a reader would miss."""
    label = result.completions.label
    missing = int((label == MISSING).sum())
    if missing:
        yield f"{missing:,} of {label.size:,} answers are not done: shares are of those that are."
    if all(text is None for row in result.completions.text for text in row):
        yield "The answers were not kept (keep_text=True, or --keep-text, keeps them in a run folder)."


def _extent(result: EvalResult, groups: int, prompts: int) -> str:
    """How many of the answers are shown."""
    of_groups = f"the first {groups} of {len(result.groups):,}" if groups < len(result.groups) else "all"
    of_prompts = f"the first {prompts} of {len(result.prompts):,}" if prompts < len(result.prompts) else "all"
    return f"Answers of {of_groups} groups to {of_prompts} prompts:"


def _row(result: EvalResult, prompt: int, groups: range) -> Iterator[_Cell]:
    text = result.prompts[prompt]
    yield _Cell(visible(text)) if text else _Cell(note=NOT_KEPT)
    for g in groups:
        index, text = result.completions.label[g, prompt], result.completions.text[g][prompt]
        if index == MISSING:
            yield _Cell(note=NOT_DONE)
        elif text:
            yield _Cell(visible(text), label=LABELS[index])
        else:
            yield _Cell(note=NOT_KEPT if text is None else EMPTY, label=LABELS[index])


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _in_terminal(cell: _Cell) -> Text:
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


def _markdown(result: EvalResult) -> str:
    names, body = _summary_table(result)
    shown = _groups(result, FILE_GROUPS)
    lines = [f"# {TITLE}", "", _in_markdown(_facts(result)), ""]
    lines += _markdown_table(names, [":---", *["---:"] * (len(names) - 1)], body)
    for line in (*_legend(result), *_gaps(result)):
        lines += ["", line]
    lines += ["", "## Answers", "", _extent(result, len(shown), len(result.prompts)), ""]
    lines += _markdown_table(
        ["", "prompt", *(group_label(result.groups[g]) for g in shown)],
        ["---:", *[":---"] * (1 + len(shown))],
        [[str(p + 1), *map(_markdown_cell, _row(result, p, shown))] for p in range(len(result.prompts))],
    )
    return "\n".join(lines) + "\n"


def _markdown_table(names: list[str], rules: list[str], body: list[list[str]]) -> Iterator[str]:
    for row in (names, rules, *body):
        yield f"| {' | '.join(row)} |"


def _markdown_cell(cell: _Cell) -> str:
    said = _in_markdown(cell.text) if cell.text else f"*{cell.note}*"
    return f"**{cell.label}**<br>{said}" if cell.label else said


_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1b1f; --quiet: #5b5b66; --line: #d5d5de; --head: #f3f3f7;
  --complied: #9a3412; --refusal: #1d4ed8; --degenerate: #6b21a8; }
@media (prefers-color-scheme: dark) { :root { --back: #16161a; --ink: #e8e8ee; --quiet: #a5a5b3; --line: #3a3a45;
  --head: #212128; --complied: #fdba74; --refusal: #93c5fd; --degenerate: #d8b4fe; } }
body { margin: 0 auto; max-width: 100rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 0.95rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { max-width: 60rem; color: var(--quiet); overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 90vh; border: 1px solid var(--line); border-radius: 4px; }
div.summary { width: fit-content; max-width: 100%; }
table { border-collapse: collapse; min-width: 100%; }
th, td { padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--head); }
tbody th { font-weight: normal; color: var(--quiet); }
.summary th, .summary td { white-space: nowrap; }
.summary th:not(:first-child), .summary td { text-align: right; font-variant-numeric: tabular-nums; }
.answers td { min-width: 14rem; max-width: 40rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow-y: auto; }
.note { color: var(--quiet); font-style: italic; }
.label { display: inline-block; margin-bottom: 0.25rem; padding: 0 0.4rem; border: 1px solid; border-radius: 3px;
  font-size: 0.8rem; font-weight: 600; }
.complied { color: var(--complied); } .refusal { color: var(--refusal); }
.degenerate { color: var(--degenerate); border-style: dashed; }
"""


def _html(result: EvalResult) -> str:
    """A page that loads nothing and runs nothing, and whose policy says so to the browser."""
    names, body = _summary_table(result)
    shown = _groups(result, FILE_GROUPS)
    answers = [
        [str(p + 1), *(_html_cell(cell) for cell in _row(result, p, shown))]
        for p in range(len(result.prompts))
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>",
            *(f"<p>{html.escape(line)}</p>" for line in [_facts(result)] if line),
            *_html_table("summary", "Summary", names, [[html.escape(x) for x in row] for row in body]),
            *(f"<p>{html.escape(line)}</p>" for line in (*_legend(result), *_gaps(result))),
            f"<h2>Answers</h2>\n<p>{html.escape(_extent(result, len(shown), len(result.prompts)))}</p>",
            *_html_table(
                "answers", "Answers", ["", "prompt", *(group_label(result.groups[g]) for g in shown)], answers
            ),
            "</body>\n</html>\n",
        ]
    )


def _html_table(kind: str, name: str, names: list[str], body: list[list[str]]) -> Iterator[str]:
    """`names` are text, `body` is HTML. The keyboard reaches what scrolls."""
    yield f'<div class="scroll {kind}" role="region" aria-label="{name}" tabindex="0">\n<table class="{kind}">'
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in names)
    yield f"<thead><tr>{head}</tr></thead>\n<tbody>"
    for first, *rest in body:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        yield f'<tr><th scope="row">{first}</th>{cells}</tr>'
    yield "</tbody>\n</table>\n</div>"


def _html_cell(cell: _Cell) -> str:
    label = f'<span class="label {cell.label}">{cell.label}</span>' if cell.label else ""
    if cell.note:
        return f'{label}<div class="note">{cell.note}</div>'
    return f'{label}<div class="text" dir="auto">{html.escape(cell.text)}</div>'
