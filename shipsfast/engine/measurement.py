"""What is measured, and how it runs: the two descriptions that every call of this package is made of.

A `Measurement` says what: prompts and how they become tokens, the ablation, what is switched off together. It decides
the numbers, so a run's identity is made of it, and `to_json` carries it to another process. An `Execution` says how:
backend, layers, memory. It decides no number, beyond rounding. Each kind of measurement adds its own fields.

Every field is typed and described here, once. `called_with` makes the keywords and the docstring of a public function of
them, and the command line its options.
"""

from __future__ import annotations

import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Self, get_args, get_type_hints

from annotated_doc import Doc

from ..errors import InputError
from ..prompts.tokens import as_prompts
from .ablation import DEFAULT_SCALE, Ablation, as_ablation

Heads = Iterable[Sequence[int | None]]
FP32_RESIDUAL = "fused_fp32_residual"
LAYER_PATHS = ("auto", "model", "fused", FP32_RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured on which prompts. Raises InputError for what can be seen to be wrong without the model."""

    kind: ClassVar[str]
    new_tokens: ClassVar[int] = 0  # how many may follow each prompt
    keeps_hidden: ClassVar[bool] = False  # the hidden states of every row at every prompt

    prompts: tuple
    template: Annotated[
        str, Doc('how strings are wrapped: "chat", "query-answer", "none" or a text with {prompt}.')
    ] = "none"
    ablation: Annotated[
        str | Ablation,
        Doc(
            "one of undifferentiated, uniform, scale, zero, head_mean_q, head_mean_k, head_mean_v, mean or resample."
        ),
        Doc(
            'Or an `Ablation`. "mean" averages over these prompts; for others, and for "resample", give an `Ablation` with '
            "prompts."
        ),
    ] = "undifferentiated"
    scale: Annotated[float, Doc("the eps of undifferentiated and scale.")] = DEFAULT_SCALE
    unit: Annotated[
        str,
        Doc("what is switched off together: head, or kv_group for all query heads of a key/value head."),
        Doc("Heads in arguments and scores then count key/value heads."),
    ] = "head"

    def __post_init__(self) -> None:
        how = as_ablation(self.ablation, self.scale)
        self._set(prompts=as_prompts(self.prompts), ablation=how, scale=how.scale)

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict:
        """All of it, prompts included, as JSON holds it. Raises InputError for a function of the caller's own."""
        return {"kind": self.kind} | {
            f.name: _to_json(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "scale"
        }

    @classmethod
    def from_json(cls, body: Mapping) -> Self:
        """The measurement that gave `to_json`, of this class. Raises InputError for another kind or unknown fields."""
        given = {name: _from_json(value) for name, value in body.items() if name != "kind"}
        if body.get("kind") != cls.kind or not given.keys() <= {f.name for f in fields(cls)}:
            raise InputError(f"this does not describe a measurement of kind {cls.kind!r}: {', '.join(body)}")
        return cls(**given | {"ablation": Ablation(**given["ablation"])})


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a measurement runs here. What really ran is in the record of its result."""

    backend: Annotated[
        str,
        Doc("attention: auto, triton, cpp, torch or reference. Named, it runs or raises."),
    ] = "auto"
    layers: Annotated[
        str,
        Doc(
            "how rows pass a decoder layer: auto, model (its own forward), fused (faster; Llama, Mistral, Qwen 2, Qwen 3 and "
            "Gemma 2, on a GPU with backend triton, or on a CPU in float32 and float64) or, for scans in half precision "
            "through Triton, fused_fp32_residual. Named, it runs or raises."
        ),
    ] = "auto"
    max_memory: Annotated[int | None, Doc("bytes to use beyond the model; default what is free.")] = None
    progress: Annotated[bool, Doc("a progress bar on stderr.")] = True

    def __post_init__(self) -> None:
        if self.layers not in LAYER_PATHS:
            raise InputError(
                f"unknown layers {self.layers!r} (--layers): expected one of {', '.join(LAYER_PATHS)}"
            )


@dataclass(frozen=True, kw_only=True)
class ScanExecution(Execution):
    """How a scan of heads runs, and where it is kept."""

    out: Annotated[
        str | Path | None,
        Doc("run folder. What is finished is kept there, and the same measurement continues from it."),
    ] = None
    chunk_tokens: Annotated[
        int | None, Doc("tokens that pass a layer together; overrides the memory plan.")
    ] = None
    rows_per_block: Annotated[int | None, Doc("ablations that pass the model together; the same.")] = None
    prompts_per_group: Annotated[int | None, Doc("prompts of a packed sequence; the same.")] = None

    def asked(self) -> dict:
        """The parts of the plan that the caller has set."""
        return {name: getattr(self, name) for name in ("chunk_tokens", "rows_per_block", "prompts_per_group")}


ABOUT = {
    "model": "a transformers causal language model, already loaded. It is put back as it was.",
    "prompts": "P strings (then `tokenizer` is needed), or P lists of token ids.",
    "tokenizer": "the model's.",
}


class Described(NamedTuple):
    """A field: in_python is what its description says beyond what the command line can take."""

    type: object
    text: str
    in_python: str
    default: object


def described(cls: type) -> dict[str, Described]:
    """The fields that have a description, the class's own first."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for f in fields(cls):
        docs = [x.documentation for x in getattr(hints[f.name], "__metadata__", ()) if isinstance(x, Doc)]
        if docs:
            found[f.name] = Described(get_args(hints[f.name])[0], *[*docs, ""][:2], f.default)
    own = [name for name in cls.__annotations__ if name in found]
    return {name: found[name] for name in (*own, *found)}


def called_with(what: type[Measurement], how: type[Execution]) -> Callable:
    """Makes a public function of `run(model, tokenizer, measurement, execution)`: (model, prompts, tokenizer=None, *, the
    fields of both), with a docstring that describes them. The function has .measurement, .execution and .run, for callers
    that have the two already."""
    keywords = described(what) | described(how)
    parameter = inspect.Parameter
    parameters = [
        *(parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("model", "prompts")),
        parameter("tokenizer", parameter.POSITIONAL_OR_KEYWORD, default=None),
        *(
            parameter(name, parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, field in keywords.items()
        ),
    ]

    def decorate(run: Callable) -> Callable:
        signature = inspect.Signature(parameters, return_annotation=inspect.signature(run).return_annotation)

        @functools.wraps(run)
        def call(*args, **named):
            try:
                given = signature.bind(*args, **named).arguments
            except TypeError as error:
                raise TypeError(f"{run.__name__}() {error}") from None
            return run(given["model"], given.get("tokenizer"), *(_made(cls, given) for cls in (what, how)))

        call.__doc__ = _with_arguments(inspect.getdoc(run), keywords)
        call.__signature__ = signature
        call.measurement, call.execution, call.run = what, how, run
        del call.__wrapped__  # its arguments are others
        return call

    return decorate


def _made(cls: type, given: Mapping):
    return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def _with_arguments(doc: str, keywords: dict[str, Described]) -> str:
    """A docstring with a section on its arguments, before what is returned."""
    about = ABOUT | {name: f"{field.text} {field.in_python}" for name, field in keywords.items()}
    lines = [
        line
        for name, text in about.items()
        for line in textwrap.wrap(
            f"{name}: {text}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_long_words=False
        )
    ]
    before, returns, after = doc.partition("Returns:")
    return "\n".join([before + "Args:", *lines, returns + after])


def as_heads(heads) -> object:
    """Heads as the caller gave them, in tuples; a HeadScore is as good as a pair. What is no list stays as it is."""
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        return heads
    plain = (each[:2] if hasattr(each, "score") else each for each in heads)
    return tuple(
        tuple(each) if isinstance(each, Sequence) and not isinstance(each, str) else each for each in plain
    )


def _to_json(name: str, value):
    if isinstance(value, Ablation):
        return {"kind": value.kind, "scale": value.scale, "prompts": _to_json(name, value.prompts)}
    if isinstance(value, (list, tuple)):
        return [_to_json(name, each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "__index__"):
        return operator.index(value)
    if hasattr(value, "to_text"):
        return value.to_text()
    raise InputError(
        f"{name} {value!r} is an object of this process: only what is named by text can be sent elsewhere"
    )


def _from_json(value):
    return tuple(map(_from_json, value)) if isinstance(value, list) else value
