"""What a judge is: labels for completions."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

from ...errors import InputError
from ...runs.kinds import LABELS
from .degeneration import RULE, degenerate
from .thought import answer_start


@dataclass(frozen=True)
class Completion:
    """What a model said to one prompt.

    prompt: None where nobody said; num_tokens: new tokens, without the end token; finished: it ended by the end token rather
    than by the limit; limit: how many new tokens were allowed.
    thinks: whether text, num_tokens and limit are those of the answer alone, behind a thought; None: not looked at, so that
    a judge looks for markers in the text. thinking: the thought has no end, and text is empty.
    """

    prompt: str | None
    text: str
    num_tokens: int
    finished: bool
    limit: int
    thinks: bool | None = field(default=None, compare=False)
    thinking: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, text: str, prompt: str | None = None) -> Completion:
        """A text that ended by itself."""
        words = len(text.split())
        return cls(prompt, text, words, True, words + 1)

    def answer(self) -> Completion:
        """The same, without the thought that its text begins with."""
        if self.thinks is not None:
            return self
        start = answer_start(self.text)
        if start == 0:
            return replace(self, thinks=False)
        if start is None:
            return replace(self, text="", thinks=True, thinking=True)
        text = self.text[start:]
        share = round(self.num_tokens * len(text) / len(self.text))  # nobody has its tokens here
        limit = self.limit - self.num_tokens + share
        return replace(self, text=text, num_tokens=share, limit=limit, thinks=True)

    @property
    def unfinished(self) -> bool:
        """Whether it ended before an answer began. An answer that the limit cut short is an answer."""
        return self.thinking or bool(self.thinks and not self.finished and not self.text.strip())


def around_unfinished(
    completions: Sequence[Completion], judge: Callable[[Sequence[Completion]], Iterable[str]]
) -> list[str]:
    """A label each: `unfinished` where there is no answer yet, which no judge is asked about, and the judge's."""
    there = [c for c in completions if not c.unfinished]
    labels = iter(judge(there) if there else [])
    return ["unfinished" if c.unfinished else next(labels) for c in completions]


class Judge(ABC):
    """Labels completions. A judge of your own needs name, describe() and labels().

    name      what it is called in results
    is_named  whether describe() tells it from any other judge
    reads_prompts  whether it looks at the prompt of a completion
    is_final  its labels stay as they are: no answer that complied becomes incoherent (results/incoherence.py)
    """

    name: str
    is_named: bool = True
    reads_prompts: bool = False
    is_final: bool = False

    @abstractmethod
    def describe(self) -> dict:
        """What identifies the judge, for JSON."""

    @abstractmethod
    def labels(self, completions: Sequence[Completion]) -> Iterable[str | bool]:
        """One label per completion: one of LABELS, or True for complied and False for refusal."""

    def __call__(
        self, completions: Iterable[Completion | str], *, prompts: Iterable[str] | None = None
    ) -> list[str]:
        """The label of every completion.

        completions  Completions, or texts, which count as ended by themselves; prompts: of the texts, for a judge that reads
                     prompts

        Judged is what follows a thought (thought.py); a completion that never came to an answer is `unfinished`, whatever
        a judge would say of it.
        Raises InputError for what is neither, and, naming the judge, for a wrong number of labels or an unknown one. What a
        judge of the user's own raises comes through.
        """
        given = [c.answer() for c in self._completions(completions, prompts)]
        return around_unfinished(given, self._judged)

    def _completions(
        self, given: Iterable[Completion | str], prompts: Iterable[str] | None
    ) -> list[Completion]:
        kinds = "a list of texts or Completions"
        if isinstance(given, (str, bytes, Completion, dict)) or not isinstance(given, Iterable):
            raise InputError(f"judge {self.name}: expected {kinds}, got {type(given).__name__}")
        given = list(given)
        asked = [None] * len(given) if prompts is None else list(prompts)
        if len(asked) != len(given):
            raise InputError(
                f"judge {self.name}: expected {len(given)} prompts, one for each text, got {len(asked)}"
            )
        out = []
        for i, (each, prompt) in enumerate(zip(given, asked, strict=True)):
            if isinstance(each, str):
                each = Completion.of(each, prompt)
            elif not isinstance(each, Completion):
                raise InputError(
                    f"judge {self.name}: expected {kinds}, got {type(each).__name__} as number {i}"
                )
            elif prompt is not None:
                raise InputError(
                    f"judge {self.name}: number {i} is a Completion, which has its prompt: leave prompts away"
                )
            if self.reads_prompts and each.prompt is None:
                raise InputError(
                    f"judge {self.name} reads prompts, and text {i} has none: give prompts, one for each text"
                )
            out.append(each)
        return out

    def _judged(self, completions: Sequence[Completion]) -> list[str]:
        labels = self._listed(self.labels(completions), len(completions))
        return [self._label(i, *pair) for i, pair in enumerate(zip(labels, completions, strict=True))]

    def _listed(self, labels, count: int) -> list:
        if hasattr(labels, "tolist"):  # arrays, tensors, columns
            labels = labels.tolist()
        wanted = f"judge {self.name}: expected {count} labels, one per completion"
        if isinstance(labels, (str, bytes, dict)) or not isinstance(labels, Iterable):
            raise InputError(f"{wanted}, got {type(labels).__name__}: return a list")
        labels = list(labels)
        if len(labels) != count:
            raise InputError(f"{wanted}, got {len(labels)}")
        return labels

    def _label(self, i: int, label, completion: Completion) -> str:
        if isinstance(label, str) and label in LABELS:
            return str(label)
        if getattr(label, "ndim", None) == 0:  # a tensor or an array of one value
            label = label.item()
        if not isinstance(label, bool):
            raise InputError(
                f"judge {self.name}: label {label!r} of completion {i} is unknown: expected {', '.join(LABELS)}, or "
                "True for complied and False for refusal"
            )
        if degenerate(completion.text, completion.num_tokens, completion.limit):
            return "degenerate"
        return "complied" if label else "refusal"


class _CallableJudge(Judge):
    """A function of texts; it sees the prompts only if it has a parameter of that name."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        core = function
        while isinstance(core, functools.partial):
            core = core.func
        self.is_named = isinstance(function, FunctionType) and "<" not in function.__qualname__
        if not hasattr(core, "__qualname__"):  # an object with __call__
            core = type(core)
        self.name = f"{core.__module__}.{core.__qualname__}"
        self.reads_prompts = self._asks_for_prompts()

    def describe(self) -> dict:
        return {"name": "callable", "function": self.name, "degenerate": RULE}

    def labels(self, completions: Sequence[Completion]) -> Iterable:
        texts = [c.text for c in completions]
        if self.reads_prompts:
            return self.function(texts, prompts=[c.prompt for c in completions])
        return self.function(texts)

    def _asks_for_prompts(self) -> bool:
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have none
            return False
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        asked = [p for p in parameters if p.name == "prompts" and p.kind in by_name]
        if asked and asked[0] is parameters[0] and asked[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise InputError(
                f"judge {self.name}: its first parameter gets the completions, and it is named prompts: rename it"
            )
        return bool(asked)
