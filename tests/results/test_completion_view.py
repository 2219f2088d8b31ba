"""Views of answers: what they show, what they leave out, and that no text in them is markup."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.engine.decoder import Decoded
from shipsfast.errors import InputError
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.results.completions import Completions
from shipsfast.results.evaluation import Control, EvalResult
from shipsfast.results.pages import FILE_GROUPS, TERMINAL_CHARS, TERMINAL_SUMMARY, show, show_texts, write
from shipsfast.text import visible

NASTY = {
    "script": '<script>alert(1)</script><img src=x onerror="alert(2)">',
    "attribute": "\"' onmouseover='alert(3)' style=\"x\"><b>",
    "closing": "</div></td></table></body><!-- <![CDATA[",
    "entities": "&lt;b&gt; &amp;amp; &#60; &nbsp",
    "table": "a | b || c\\| d \\\\| e |",
    "code": "`one` ``two`` ```\nthree\n```",
    "emphasis": "**bold** _em_ *em* ~~gone~~ __x__",
    "links": "[a](http://e.x) ![i](http://e.x/i.png) <http://e.x> http://e.x www.e.x a@e.x [r]: /u",
    "blocks": "# head\n- item\n+ item\n1. one\n2) two\n=====\n---\n> said\n\n    code",
    "math": "$x^2$ $$y$$ :smile:",
    "lines": "one\r\ntwo\rthree\n\n\nfour",
    "backslash": "ends in a backslash\\",
    "rich": "[bold red]red[/] [/] [link=http://e.x]x[/link] :smile: \\[bold]",
}
STEERS = "\x1b[31mred\x1b]0;title\x07\x00\x7f\x9b2J\u202eabc\u202c\u2066x\u200b\ufeff\u2028\ud800"


def built(texts, *, labels=None, control=None, groups=None, prompts=None, keep_text=True) -> EvalResult:
    """A result of these texts, [G][P]; a None is a row that is not done."""
    completions = Completions(len(texts), len(texts[0]), keep_text=keep_text)
    for g, row in enumerate(texts):
        for p, text in enumerate(row):
            if text is not None:
                label = labels[g][p] if labels else "complied"
                completions.keep(Decoded(g, p, [1, 2], True), text, label)
    groups = groups or [[], *([(0, h)] for h in range(1, len(texts)))]
    prompts = prompts or [f"prompt {p}" for p in range(len(texts[0]))]
    return EvalResult(groups, prompts, completions, control)


class Page(HTMLParser):
    """The tags of a page with their attributes, and the rows of its tables: lists of cells, lists of texts."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.seen, self.open, self.tables, self.errors = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open and not self.errors

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.open and ({"td", "th"} & set(self.open)):
            self.tables[-1][-1][-1].append(data)

    def handle_comment(self, data):
        self.errors.append(data)


def page_of(result, tmp_path) -> Page:
    path = tmp_path / "answers.html"
    write(result.sheet(), path)
    return Page(path.read_text("utf-8"))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Its tables as text, and a failure where a cell has markup other than our own."""
    tables, row = [], None
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
    for at, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append(row := [])
        elif token.type in ("td_open", "th_open"):
            said = ""
            for child in tokens[at + 1].children:
                if child.type == "html_inline":
                    assert child.content == "<br>"
                    said += "\n"
                elif child.type == "text":
                    said += child.content
                else:
                    assert child.type in ("strong_open", "strong_close", "em_open", "em_close"), child.type
            row.append(said)
        else:
            assert token.type not in ("html_block", "fence", "code_block", "bullet_list_open"), token.type
    return tables


def markdown_of(result, tmp_path) -> list[list[list[str]]]:
    path = tmp_path / "answers.md"
    write(result.sheet(), path)
    return markdown_tables(path.read_text("utf-8"))


def printed(result, width=200, rows=4) -> str:
    file = io.StringIO()
    show(result.sheet(), Console(file=file, width=width, highlight=False, color_system=None), rows)
    return file.getvalue()


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_is_inert_in_html(text, tmp_path):
    page = page_of(built([[text], ["x"]], prompts=[text], groups=[[], [(0, 1)]]), tmp_path)
    tags = {tag for tag, _ in page.seen}
    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "table", "thead", "tbody",
        "tr", "th", "td",
    }  # fmt: skip
    attributes = {name for _, found in page.seen for name in found}
    assert attributes <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "dir", "scope", "role", "aria-label", "tabindex",
    }  # fmt: skip
    assert [["".join(cell) for cell in row] for row in page.tables[1][1:]] == [
        ["1", visible(text), f"complied{visible(text)}", "compliedx"]
    ]


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_text_is_inert_in_markdown(text, tmp_path):
    tables = markdown_of(built([[text], ["x"]], prompts=[text]), tmp_path)
    row = [cell.strip() for cell in tables[1][1]]
    assert row == ["1", visible(text).strip(), f"complied\n{visible(text)}".strip(), "complied\nx"]


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(), min_size=1, max_size=40))
def test_any_text_comes_back_from_both(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    result = built([[text]])
    assert page_of(result, folder).tables[1][1][2] == ["complied", visible(text)]
    assert markdown_of(result, folder)[1][1][2].strip() == f"complied\n{visible(text)}".strip()


def test_bare_addresses_are_no_links_in_github_markdown(tmp_path):
    write(built([["http://e.x www.e.x mailto:a@e.x :smile: $x$"]]).sheet(), tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text("utf-8")
    assert not any(found in text for found in ("://", "www.", "mailto:", "@", ":smile:", "$"))


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_nothing_steers_or_hides(suffix, tmp_path):
    result = built([[STEERS]], prompts=[STEERS])
    write(result.sheet(), tmp_path / f"a.{suffix}")
    for text in ((tmp_path / f"a.{suffix}").read_text("utf-8"), printed(result)):
        assert not set(text) & set(STEERS.replace("[31mred]0;title", "")) - set("[]0123456789;abcdehilmrtxJ")
    assert visible(STEERS).startswith(
        "[U+001B][31mred[U+001B]]0;title[U+0007][U+0000][U+007F][U+009B]2J[U+202E]abc"
    )
    assert (
        visible("\u0646\u200c\u0647 \U0001f469\u200d\U0001f52c")
        == "\u0646\u200c\u0647 \U0001f469\u200d\U0001f52c"
    )


def test_terminal_reads_no_markup():
    text = printed(built([[NASTY["rich"]]], prompts=["[red]p[/red]"]))
    assert NASTY["rich"] in text and "[red]p[/red]" in text


def test_terminal_cuts_and_says_so():
    result = built([["a" * 1000, "b", "c"]] * 5)
    text = printed(result, width=3000, rows=2)
    assert f"│ {'a' * TERMINAL_CHARS}... (600 more characters) │" in text
    assert "Answers of the first 3 of 5 groups to the first 2 of 3 prompts:" in text
    assert "prompt 1" in text and "prompt 2" not in text
    assert "Answers of" not in printed(result, rows=0)


def control_of(groups: int, done: bool = True) -> Control:
    rows = Completions(groups + 1, 2)
    kl_nats = np.full((groups, 2), 0.125)
    for g in range(groups + 1):
        for p in range(2):
            if done or (g, p) != (groups, 1):
                label = "degenerate" if (g, p) == (1, 0) else "complied"
                rows.keep(Decoded(g, p, [1], True), f"{p} {bool(g == 1 and p)}", label)
    if not done:
        kl_nats[:, 1] = np.nan
    return Control(kl_nats, rows, 8)


LABELS = [["refusal"] * 4, ["complied", "complied", "refusal", "degenerate"]]
SUMMARY = [
    ["none", "0%", "0% to 49%", "100%", "0%", "0%", "0.125", "0%", "100%"],
    ["0-1", "50%", "15% to 85%", "25%", "25%", "0%", "0.125", "50%", "50%"],
]


def test_summary_has_the_same_figures_everywhere(tmp_path):
    """Wilson's interval of 2 in 4 is 15.0 % to 85.0 %, of 0 in 4 it is 0 to 49.0 %."""
    result = built([["x"] * 4] * 2, labels=LABELS, control=control_of(2))
    names = ["heads off", "ASR", "95% interval", "refusal", "degenerate", "cut"]
    names += ["control: KL, nats", "control: degenerate", "control: same text"]
    page = [["".join(cell) for cell in row] for row in page_of(result, tmp_path).tables[0]]
    assert page == markdown_of(result, tmp_path)[0] == [names, *SUMMARY]
    text = printed(result, width=80)
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line
    ]
    for row in SUMMARY:
        assert row[:6] in lines and [row[0], *row[6:]] in lines
    assert "on 2 ordinary prompts" in text


def test_numbers_are_never_cut_in_a_narrow_terminal():
    result = built([["x"] * 4] * 2, labels=LABELS, control=control_of(2))
    text = printed(result, width=40)
    lines = [[cell.strip() for cell in x.strip("│").split("│")] for x in text.splitlines() if "│" in x]
    assert ["0-1", "50%", "15% to 85%"] in lines and all(len(x) <= 40 for x in text.splitlines() if "│" in x)
    assert "…" not in text


def test_all_answers_are_shown_whole_when_asked_for():
    from shipsfast.results.pages import show_answers

    file = io.StringIO()
    result = built([["a" * 1000, "\x1b[2J"], ["b\nc", ""]], prompts=["[b]p[/b]", "q"])
    show_answers(result.sheet(), Console(file=file, width=40, highlight=False, color_system=None))
    assert file.getvalue().splitlines() == [
        "1. [b]p[/b]", f"  none [complied]: {'a' * 1000}", "  0-1 [complied]: b", "    c",
        "2. q", "  none [complied]: [U+001B][2J", "  0-1 [complied]: (empty)",
    ]  # fmt: skip


def test_small_shares_of_many_prompts_show(tmp_path):
    labels = [["complied", *["refusal"] * 499]]
    assert "| none | 0.2% | 0.0% to 1.1% | 99.8% | 0.0% | 0.0% |" in (
        write(built([["x"] * 500], labels=labels).sheet(), tmp_path / "a.md")
        or (tmp_path / "a.md").read_text("utf-8")
    )


def test_what_is_missing_is_said(tmp_path):
    result = built([["", "x"], [None, None]], prompts=["", "p"], control=control_of(2, done=False))
    result.completions.text[0][1] = None
    for rows in ([["".join(c) for c in row] for row in page_of(result, tmp_path).tables[1]],
                 markdown_of(result, tmp_path)[1]):  # fmt: skip
        cells = [[cell.replace("\n", "") for cell in row] for row in rows[1:]]
        assert cells == [
            ["1", "(not kept)", "complied(empty)", "(not done)"],
            ["2", "p", "complied(not kept)", "(not done)"],
        ]
    for text in ((tmp_path / "answers.md").read_text("utf-8"), printed(result)):
        assert "2 of 4 answers are not done" in text and "(not done)" in text and "nan" not in text.lower()
    result.completions.text[0][0] = None
    assert "The answers were not kept" in printed(result)


def test_what_a_model_says_is_no_note_of_ours(tmp_path):
    page = page_of(built([["(not kept)", ""]]), tmp_path)
    notes = [found for tag, found in page.seen if tag == "div" and found.get("class") == "note"]
    assert len(notes) == 1


def test_many_groups_stay_readable(tmp_path):
    groups = [[], *([(layer, head)] for layer in range(27) for head in range(37))]
    result = built([["x", "y"]] * len(groups), groups=groups)
    page, tables = page_of(result, tmp_path), markdown_of(result, tmp_path)
    for summary, answers in (page.tables, tables):
        assert len(summary) == 1 + 1000 and len(answers[0]) == 2 + FILE_GROUPS
    said = f"Answers of the first {FILE_GROUPS} of 1,000 groups to all prompts:"
    assert said in (tmp_path / "answers.md").read_text() and said in (tmp_path / "answers.html").read_text()
    text = printed(result)
    assert f"The first {TERMINAL_SUMMARY} of 1,000 groups." in text and len(text.splitlines()) < 60


def test_large_groups_are_named_by_their_first_heads(tmp_path):
    result = built([["x"]], groups=[[(3, head) for head in range(32)]])
    assert markdown_of(result, tmp_path)[0][1][0] == "3-0+3-1+3-2+3-3+3-4+3-5+... (32)"


@pytest.mark.parametrize("name", ["answers.pdf", "answers", "answers.md.txt"])
def test_other_suffixes_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"expected a name ending in \.md or \.html"):
        write(built([["x"]]).sheet(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_page_needs_nothing_and_runs_nothing(tmp_path):
    write(built([["x"]]).sheet(), tmp_path / "a.HTML")
    text = (tmp_path / "a.HTML").read_text("utf-8")
    assert "default-src 'none'" in text and "color-scheme: light dark" in text
    assert not any(
        word in text for word in ("http://", "https://", "url(", "@import", "javascript", "<script", "src=")
    )


def test_texts_below_their_prompts():
    file = io.StringIO()
    console = Console(file=file, width=40, highlight=False, color_system=None)
    show_texts(
        [[], [(0, 2), (1, None)]], ["[b]p[/b]", "q"], [["one two " * 12, ""], ["a\nb", "\x1b[2J"]], console
    )
    assert file.getvalue().splitlines() == [
        "1. [b]p[/b]", "  none: " + ("one two " * 12).strip(), "  0-2+1: a", "    b",
        "2. q", "  none: (empty)", "  0-2+1: [U+001B][2J",
    ]  # fmt: skip


def test_views_of_an_evaluation_and_of_its_folder(tmp_path):
    model, tokenizer = load_model(str(MODEL), device="cpu"), load_tokenizer(str(MODEL))
    result = shipsfast.evaluate(
        model, load_prompts(PROMPTS / "taboo.csv")[:2], tokenizer, groups=[[], [(0, 2)]], template="chat",
        max_new_tokens=20, out=tmp_path / "run", progress=False,
    )  # fmt: skip
    (_, first, _), summary = markdown_of(result, tmp_path)[1], markdown_of(result, tmp_path)[0]
    assert first[2].startswith("refusal\nI am sorry") and first[3].startswith("complied\n")
    text = (tmp_path / "answers.md").read_text("utf-8")
    assert (
        "demo/village" in text
        and "Answers: up to 20 new tokens, greedy" in text
        and "Judge: keywords" in text
    )
    loaded = shipsfast.load(tmp_path / "run")
    again = markdown_of(loaded, tmp_path)
    assert again[0] == summary and again[1][1] == [
        "1",
        "(not kept)",
        "refusal\n(not kept)",
        "complied\n(not kept)",
    ]
