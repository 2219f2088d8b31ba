"""Conversations through a tokenizer's chat template, held against what came out.

A chat template is a program of somebody else's. It may read a content as a list of parts and drop what is a text, leave
out the system message, write today's date, or write something else each time. Each of these would give numbers about
other prompts than the ones asked for, so each is seen here: provided for, or refused.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .messages import Conversation, Message
from .wrapping import Wrapping, as_date

# Goes before a template that asks for the time. The line break is trimmed, so that the template begins a line.
_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ shipsfast_dates[format] if format in shipsfast_dates else "
    "raise_exception('it makes up a format of dates, and no date can be fixed: give date_string as template_args') }}"
    "{%- endmacro %}\n"
)
_OTHER_DATE = datetime.date(1999, 12, 31)  # in year, month, day and weekday


def parts(content: str) -> list[dict]:
    return [{"type": "text", "text": content}]


# How contents may be handed over: by name, whether that of the system message and those of the others are parts.
FORMS = {"text": (False, False), "parts": (True, True), "parts, system as text": (False, True)}


@dataclass
class Rendered:
    """texts: one for each conversation; content: the form that the template reads, of FORMS; reads_clock: it writes
    today's date."""

    texts: list[str]
    content: str = "text"
    reads_clock: bool = False


def render(tokenizer, conversations: Sequence[Conversation], wrapping: Wrapping) -> Rendered:
    """Every conversation with a generation prompt after it.

    Raises InputError for a tokenizer without a chat template, one that fails, and one that drops a message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: use --template query-answer, none or your own")
    template = _Template(tokenizer, wrapping)
    conversations = [_with_system(said, wrapping.system, i) for i, said in enumerate(conversations)]
    shapes = dict.fromkeys(tuple(m.role for m in said) for said in conversations)
    probes = {
        shape: tuple(Message(role, f"qx{n}probe{n}zk") for n, role in enumerate(shape)) for shape in shapes
    }
    form = _form(template, list(probes.values()))
    frames = {}
    for shape, probe in probes.items():
        frame = _plain(template(probe, form))
        for message in probe:
            frame = frame.replace(message.content, "\0")
        frames[shape] = frame
    out = Rendered([template(said, form) for said in conversations], form)
    for i, (said, text) in enumerate(zip(conversations, out.texts, strict=True)):
        _check_held(said, text, frames[tuple(m.role for m in said)], i)
    first = next(iter(probes.values()))
    if template(first, form) != template(first, form):
        raise InputError(
            "the tokenizer's chat template writes something else each time: use a template of your own"
        )
    out.reads_clock = template(first, form, _OTHER_DATE) != template(first, form)
    return out


class _Template:
    """The tokenizer's chat template at a fixed date."""

    def __init__(self, tokenizer, wrapping: Wrapping) -> None:
        from jinja2 import Environment  # takes longer than all of the command line that reads no template

        self.tokenizer, self.args, self.date = tokenizer, wrapping.args.to_json(), as_date(wrapping.date)
        with told():
            find = getattr(tokenizer, "get_chat_template", None)
            source = find(tools=self.args.get("tools")) if find else tokenizer.chat_template
            self.source = source if isinstance(source, str) else ""
            words = list(Environment().lex(self.source))
        self.formats = [word[1:-1] for _, kind, word in words if kind == "string" and "%" in word]
        names = {word for _, kind, word in words if kind == "name"} | {"tools", "documents"}
        unread = [name for name in self.args if self.source and name not in names]
        if unread:
            raise InputError(
                f"template_args (--template-arg): the tokenizer's chat template does not read {', '.join(unread)}"
            )
        self.asks_time = "strftime_now" in names

    def __call__(self, said: Conversation, form: str, date: datetime.date | None = None) -> str:
        system, others = FORMS[form]
        messages = [
            {"role": m.role, "content": parts(m.content) if (system if m.role == "system" else others) else m.content}
            for m in said
        ]  # fmt: skip
        how = dict(self.args)
        if self.asks_time:
            how |= {"chat_template": _CLOCK + self.source, "shipsfast_dates": self._dates(date or self.date)}
        with told():
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **how
            )
        if not isinstance(text, str):
            raise InputError(f"the tokenizer's chat template gave {type(text).__name__}: expected a text")
        return text

    def _dates(self, date: datetime.date) -> dict[str, str]:
        midnight, out = datetime.datetime.combine(date, datetime.time()), {}
        for text in self.formats:
            with contextlib.suppress(ValueError):  # a text that is no format
                out[text] = midnight.strftime(text)
        return out


@contextlib.contextmanager
def told():
    """What a template, or code that renders it, raises: in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # it is somebody else's program
        from jinja2 import TemplateError

        why = error.message if isinstance(error, TemplateError) else str(error)
        raise InputError(
            f"the tokenizer's chat template failed: {' '.join(str(why or type(error).__name__).split())}"
        ) from error


def _with_system(said: Conversation, system: str | None, i: int) -> Conversation:
    if system is None:
        return said
    if any(message.role == "system" for message in said):
        raise InputError(
            f"prompt {i} has a system message of its own, and system (--system) is given: give one"
        )
    return (Message("system", system), *said)


def _form(template: Callable, probes: Sequence[Conversation]) -> str:
    """The first way to hand over contents in which the template writes all of them."""
    problems = []
    for form in FORMS:
        try:
            texts = [template(probe, form) for probe in probes]
            lost = [
                m.role
                for probe, text in zip(probes, texts, strict=True)
                for m in probe
                # A list of parts that is written as such was not read.
                if m.content not in text or re.search(rf"""['"]text['"]:\s*['"]{m.content}""", text)
            ]
        except InputError as error:
            problems.append(error)
            continue
        if not lost:
            return form
        role = lost[0]
        problems.append(
            InputError(
                f"the tokenizer's chat template leaves out the {role} message, as text and as a list of parts: "
                + (
                    "leave the system message out, or put it into the user's"
                    if role == "system"
                    else "use --template query-answer, none or your own"
                )
            )
        )
    raise problems[0]


def _check_held(said: Conversation, text: str, frame: str, i: int) -> None:
    """Raises InputError for a conversation that is not in its rendered text, beyond what the template itself says.

    frame: the text without any content. Templates strip white space, and leave out the thoughts of earlier answers.
    """
    text = _plain(text)
    wanted: dict[str, tuple[str, int]] = {}
    for message in said:
        content = (
            message.content.rpartition("</think>")[2] if message.role == "assistant" else message.content
        )
        role, count = wanted.get(content, (message.role, 0))
        wanted[content] = (role, count + 1)
    for content, (role, count) in wanted.items():
        # Some templates write contents as JSON.
        forms = {content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]}
        forms = {_plain(form) for form in forms} - {""}
        if forms and not any(text.count(form) >= frame.count(form) + count for form in forms):
            raise InputError(
                f"the tokenizer's chat template does not write the {role} message of prompt {i} as it is: use --template "
                "query-answer, none or your own"
            )


def _plain(text: str) -> str:
    """Without the white space that templates strip."""
    return " ".join(text.split())
