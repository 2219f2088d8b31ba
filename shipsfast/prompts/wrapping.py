"""What is put around a prompt before it becomes tokens.

Templates: `chat` is the tokenizer's own chat template with one user turn, or the messages of the prompt; `query-answer`
is the wrapper of the paper's Ships (arXiv 2410.13708, appendix B.1); `none` takes the prompt as it is; any other string
must contain {prompt}.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import InputError

TEMPLATES = {"query-answer": "## Query:{prompt} \n## Answer:", "none": "{prompt}"}
# One date for all days, so that a run goes on tomorrow. Llama's templates fall back on it too.
DATE = "2024-07-26"
# Of the call that renders, not of the template.
RESERVED = (
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now",
)  # fmt: skip


class TemplateArgs(Mapping):
    """Values that a chat template reads, by name. Immutable: it holds them as JSON."""

    def __init__(self, given: Mapping | None = None) -> None:
        """Raises InputError for what is no JSON, and for names that mean something to the call that renders."""
        if not isinstance(given or {}, Mapping):
            raise InputError(
                f"template_args must be a mapping of names to values, got {type(given).__name__}"
            )
        given = dict(given or {})
        for name in given:
            if not isinstance(name, str) or not name.isidentifier():
                raise InputError(f"template_args: {name!r} is no name that a template could read")
            if name in RESERVED:
                raise InputError(f"template_args: {name} is not the template's to read: leave it out")
        try:
            self._json = json.dumps(given, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"template_args must be JSON: {error}") from error

    @classmethod
    def parse(cls, given: list[str] | None) -> TemplateArgs:
        """Of texts NAME=VALUE; a value is JSON where it reads as such, else text."""
        found = {}
        for each in given or []:
            name, equals, value = each.partition("=")
            if not equals or name in found:
                problem = "is given twice" if equals else "has no ="
                raise InputError(
                    f"--template-arg {each} {problem}: expected NAME=VALUE, such as enable_thinking=false"
                )
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        return cls(found)

    def to_json(self) -> dict:
        return json.loads(self._json)

    def __getitem__(self, name: str):
        return self.to_json()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())

    def __hash__(self) -> int:
        return hash(self._json)

    def __eq__(self, other) -> bool:
        return self._json == other._json if isinstance(other, TemplateArgs) else self.to_json() == other

    def __repr__(self) -> str:
        return repr(self.to_json())


@dataclass(frozen=True)
class Wrapping:
    """template: as above; system: the system message, None for the template's own; prefix: what every answer begins with,
    after all else; args, date: what a chat template reads, and takes for today, as YYYY-MM-DD.

    Raises InputError for what does not fit together.
    """

    template: str = "none"
    system: str | None = None
    prefix: str = ""
    args: TemplateArgs = field(default_factory=TemplateArgs)
    date: str = DATE

    def __post_init__(self) -> None:
        for name, text in (
            ("template", self.template),
            ("prefix", self.prefix),
            ("system", self.system),
        ):
            if not isinstance(text, str) and (name, text) != ("system", None):
                raise InputError(f"{name} must be a text, got {type(text).__name__}")
        if self.template != "chat":
            for name, option, given in (
                ("system", "--system", self.system is not None),
                ("template_args", "--template-arg", len(self.args) > 0),
            ):
                if given:
                    raise InputError(
                        f"{name} ({option}) is for chat templates, and the template is {self.template!r}: put it into a "
                        "template of your own with {prompt}, or leave it out"
                    )
            if "{prompt}" not in self.text:
                raise InputError(
                    f"unknown template {self.template!r}: expected chat, query-answer, none, or a text with {{prompt}}"
                )
        as_date(self.date)

    @property
    def text(self) -> str:
        """Of a template that is no chat template."""
        return TEMPLATES.get(self.template, self.template)

    def to_json(self) -> dict:
        return {
            "template": self.template, "system": self.system, "prefix": self.prefix, "template_args": self.args.to_json(),
        }  # fmt: skip


def as_wrapping(template: str | Wrapping) -> Wrapping:
    return template if isinstance(template, Wrapping) else Wrapping(template)


def as_date(date) -> datetime.date:
    """Raises InputError for anything but YYYY-MM-DD."""
    try:
        found = datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        found = None
    if found is None or found.isoformat() != date:  # a date has one name, which runs are compared by
        raise InputError(f"template_date (--template-date) must be a date such as {DATE}, got {date!r}")
    return found
