"""What a judge is: labels for completions."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType

from ...errors import InputError
from ...runs.kinds import LABELS
from .degeneration import RULE, degenerate


@dataclass(frozen=True)
class Completion:
    """What a model said to one prompt.

    num_tokens: new tokens, without the end token; finished: it ended by the end token rather than by the limit;
    limit: how many new tokens were allowed.
    """

    prompt: str
    text: str
    num_tokens: int
    finished: bool
    limit: int


class Judge(ABC):
    """Labels completions. A judge of your own needs name, describe() and labels().

    name      what it is called in results
    is_named  whether describe() tells it from any other judge
    """

    name: str
    is_named: bool = True

    @abstractmethod
    def describe(self) -> dict:
        """What identifies the judge, for JSON."""

    @abstractmethod
    def labels(self, completions: Sequence[Completion]) -> Iterable[str | bool]:
        """One label per completion: one of LABELS, or True for complied and False for refusal."""

    def __call__(self, completions: Sequence[Completion]) -> list[str]:
        """The label of every completion.

        Raises InputError, naming the judge, for a wrong number of labels or an unknown one. What a judge of the
        user's own raises comes through.
        """
        completions = list(completions)
        if not completions:
            return []
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
        self.wants_prompts = self._asks_for_prompts()

    def describe(self) -> dict:
        return {"name": "callable", "function": self.name, "degenerate": RULE}

    def labels(self, completions: Sequence[Completion]) -> Iterable:
        texts = [c.text for c in completions]
        if self.wants_prompts:
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
