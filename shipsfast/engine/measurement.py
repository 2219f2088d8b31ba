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
import numbers
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Self, get_args, get_type_hints

from annotated_doc import Doc

from ..errors import InputError, whole_number
from ..prompts.messages import Message, is_conversation
from ..prompts.reads import Reads
from ..prompts.tokens import as_prompts
from ..prompts.wrapping import DATE, TemplateArgs, Wrapping
from .ablation import DEFAULT_SCALE, Ablation, as_ablation, as_ablations

Heads = Iterable[Sequence[int | None]]
FP32_RESIDUAL = "fused_fp32_residual"
LAYER_PATHS = ("auto", "model", "fused", FP32_RESIDUAL)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured on which prompts. Raises InputError for what can be seen to be wrong without the model.

    kind: names this description; run_kind: of the runs that are made of it (runs/kinds.py), "" for the same name;
    reads_texts: prompts must be strings, and there is a tokenizer; prompt_sets: the fields that hold prompts, by the names
    that they have as arguments; in_place: fields that may be given by their place too, after the tokenizer.
    """

    kind: ClassVar[str]
    run_kind: ClassVar[str] = ""
    reads_texts: ClassVar[bool] = False
    new_tokens: ClassVar[int] = 0  # how many may follow each prompt
    keeps_hidden: ClassVar[bool] = False  # the hidden states of every row at every prompt
    takes_several: ClassVar[bool] = False  # ablations
    prompt_sets: ClassVar[dict[str, str]] = {"prompts": "prompts"}
    in_place: ClassVar[tuple[str, ...]] = ()

    prompts: tuple
    template: Annotated[
        str, Doc('how strings are wrapped: "chat", "query-answer", "none" or a text with {prompt}.')
    ] = "none"
    system: Annotated[
        str | None,
        Doc("the system message, for template chat; default what the chat template says of its own."),
    ] = None
    prefix: Annotated[
        str,
        Doc(
            "what every answer begins with, put after the template: the token after it is measured. Answers and judges get "
            "what follows it."
        ),
    ] = ""
    template_args: Annotated[
        Mapping | None, Doc("values that the chat template reads, such as enable_thinking, by name.")
    ] = None
    template_date: Annotated[
        str, Doc("YYYY-MM-DD, what a chat template that writes today's date takes for today, on every day.")
    ] = DATE
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
    unit: Annotated[
        str,
        Doc("what is switched off together: head, or kv_group for all query heads of a key/value head."),
        Doc("Heads in arguments and scores then count key/value heads."),
    ] = "head"

    def __post_init__(self) -> None:
        self._set(
            prompts=as_prompts(self.prompts), ablation=as_ablation(self.ablation),
            template_args=TemplateArgs(self.template_args), template_date=str(self.template_date),
        )  # fmt: skip
        self._check_wrapping()

    @property
    def wrapping(self) -> Wrapping:
        """What is put around each prompt."""
        return Wrapping(self.template, self.system, self.prefix, self.template_args, self.template_date)

    def reads(self, ids: list[list[int]], tokenizer) -> Reads | None:
        """Where the prompts of these token ids are read, None for behind the last token of each."""
        return None

    def _check_wrapping(self) -> None:
        """Raises InputError for what would be put around prompts that it cannot be put around."""
        first, _ = self.prompts[0], self.wrapping
        if is_conversation(first) and self.template != "chat":
            raise InputError(
                f"prompts are chat messages, which need template 'chat' (--template chat): it is {self.template!r}"
            )
        given = {
            "system": self.system is not None,
            "prefix": self.prefix,
            "template_args": self.template_args,
        }
        idle = [name for name, value in given.items() if value]
        if idle and not isinstance(first, str) and not is_conversation(first):
            raise InputError(
                f"prompts are token ids, which are taken as they are: leave {', '.join(idle)} out, or give text"
            )

    def each(self) -> list[Self]:
        """One measurement for each ablation."""
        return [self]

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict:
        """All of it, prompts included, as JSON holds it. Raises InputError for a function of the caller's own."""
        return {"kind": self.kind} | {f.name: _to_json(f.name, getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, body: Mapping) -> Self:
        """The measurement that gave `to_json`, of this class. Raises InputError for anything else."""
        if not isinstance(body, Mapping) or body.get("kind") != cls.kind:
            raise InputError(f"this does not describe a measurement of kind {cls.kind!r}: {body!r:.200}")
        given = {name: _from_json(value) for name, value in body.items() if name != "kind"}
        try:
            further = (
                {"further": tuple(Ablation(**each) for each in given["further"])}
                if "further" in given
                else {}
            )
            return cls(**given | {"ablation": Ablation(**given["ablation"])} | further)
        except (TypeError, KeyError) as error:
            raise InputError(
                f"this does not describe a measurement of kind {cls.kind!r}, {error}: expected the fields "
                f"{', '.join(f.name for f in fields(cls))}"
            ) from error


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
            "Gemma 2, on a GPU with backend triton, or on a CPU) or, in half precision, fused_fp32_residual: the same with the "
            "residual stream in float32, as on a CPU it always is. Named, it runs or raises."
        ),
        Doc("A finished run that `out` holds is given back as it ran."),
    ] = "auto"
    max_memory: Annotated[int | None, Doc("bytes to use beyond the model; default what is free.")] = None
    progress: Annotated[bool, Doc("a progress bar on stderr.")] = True
    prompts_from: dict | None = (
        None  # of which file, for the record only; no keyword, as it has no description
    )

    def __post_init__(self) -> None:
        if self.layers not in LAYER_PATHS:
            raise InputError(
                f"unknown layers {self.layers!r} (--layers): expected one of {', '.join(LAYER_PATHS)}"
            )
        self._whole("max_memory")

    def _whole(self, *names: str) -> None:
        """Raises InputError for a field that was given and is no whole number of at least 1."""
        for name in names:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class PlannedExecution(Execution):
    """How heads that are off one at a time pass the model together."""

    out: ClassVar[str | Path | None] = None  # such a run is kept nowhere

    chunk_tokens: Annotated[
        int | None, Doc("tokens that pass a layer together; overrides the memory plan.")
    ] = None
    rows_per_block: Annotated[int | None, Doc("ablations that pass the model together; the same.")] = None
    prompts_per_group: Annotated[
        int | None, Doc("prompts of a packed sequence, or side by side; the same.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole(*self.asked())

    def asked(self) -> dict:
        """The parts of the plan that the caller has set."""
        return {name: getattr(self, name) for name in ("chunk_tokens", "rows_per_block", "prompts_per_group")}


@dataclass(frozen=True, kw_only=True)
class ScanExecution(PlannedExecution):
    """How a scan of heads runs, and where it is kept."""

    out: Annotated[
        str | Path | None,
        Doc("run folder. What is finished is kept there, and the same measurement continues from it."),
    ] = None
    rescored: Annotated[
        int,
        Doc(
            "scores that are computed again in a wider dtype, where there is memory for such a copy of the model, to tell how "
            "far scores are off: at most, as it takes a twentieth of a scan's work or four scores. 0 for none."
        ),
    ] = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rescored", whole_number("rescored", self.rescored, 0))


PROMPTS = (", P lists of token ids, which need no `tokenizer`,", "")  # with and without token ids
MODEL = "a transformers causal language model, already loaded. It is put back as it was."


class Described(NamedTuple):
    """A field: in_python is what its description says beyond what the command line can take."""

    type: object
    text: str
    in_python: str
    default: object


# Not a field, but a keyword that goes into the ablation: so no two fields can say different things.
SCALE = Described(float, "the eps of undifferentiated and scale.", "", DEFAULT_SCALE)
SCALES = Described(
    float | Sequence[float],
    SCALE.text,
    "Or a list of them, scanned in one run: .dose has the scores.",
    DEFAULT_SCALE,
)


@functools.cache
def described(cls: type) -> dict[str, Described]:
    """The keywords that have a description, the class's own first: its fields, and the scale of an ablation."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for f in fields(cls):
        docs = [x.documentation for x in getattr(hints[f.name], "__metadata__", ()) if isinstance(x, Doc)]
        if docs:
            found[f.name] = Described(get_args(hints[f.name])[0], *[*docs, ""][:2], f.default)
        if f.name == "ablation" and docs:
            found["scale"] = SCALES if cls.takes_several else SCALE
    own = [name for name in cls.__annotations__ if name in found]
    return {name: found[name] for name in (*own, *found)}


def made(cls: type, given: Mapping):
    """A description of the keywords in `given` that are its own."""
    own = {field.name: given[field.name] for field in fields(cls) if field.name in given}
    if "scale" in given and issubclass(cls, Measurement):
        own["ablation"] = as_ablations(
            *(as_tuple(x) for x in (given.get("ablation", cls.ablation), given["scale"]))
        )
    return cls(**own)


def called_with(what: type[Measurement], how: type[Execution], **about: str) -> Callable:
    """Makes a public function of `run(model, tokenizer, measurement, execution)`: (model, prompts, tokenizer=None, *, the
    keywords of both), with a docstring that describes them; `prompts` or the sets of prompts that the measurement has; a field
    without a default is an argument after the tokenizer, which then has none either. The function has .measurement, .execution
    and .run, for callers that have the two already. about: what it says of a keyword in the field's place."""
    keywords = described(what) | described(how)
    form = f"P strings{PROMPTS[what.reads_texts]} or P conversations, lists of messages with `role` and `content`, "
    about = {
        "model": MODEL,
        **{name: f"{form}for template chat." for name in what.prompt_sets},
        "tokenizer": "the model's.",
        **{name: f"{field.text} {field.in_python}" for name, field in keywords.items()},
    } | about
    parameter = inspect.Parameter
    plain = parameter.POSITIONAL_OR_KEYWORD
    prompts, tokenizer = Sequence[str] | Sequence[Sequence[Mapping]], parameter.empty
    if not what.reads_texts:
        prompts = prompts | Sequence[Sequence[int]]
        tokenizer = parameter.empty if any(f.default is MISSING for f in keywords.values()) else None

    def decorate(run: Callable) -> Callable:
        hints = get_type_hints(run)
        parameters = [
            parameter("model", plain, annotation=hints["model"]),
            *(parameter(name, plain, annotation=prompts) for name in what.prompt_sets),
            parameter("tokenizer", plain, default=tokenizer),
            *(
                parameter(name, plain, annotation=field.type)
                for name, field in keywords.items()
                if field.default is MISSING
            ),
            *(
                parameter(name, kind, default=field.default, annotation=field.type)
                for kind, in_place in ((plain, True), (parameter.KEYWORD_ONLY, False))
                for name, field in keywords.items()
                if field.default is not MISSING and (name in what.in_place) is in_place
            ),
        ]
        signature = inspect.Signature(parameters, return_annotation=hints["return"])

        @functools.wraps(run)
        def call(*args, **named):
            try:
                given = signature.bind(*args, **named).arguments
            except TypeError as error:
                raise TypeError(f"{run.__name__}() {error}") from None
            given |= {field: given[name] for name, field in what.prompt_sets.items()}
            return run(given["model"], given.get("tokenizer"), *(made(cls, given) for cls in (what, how)))

        call.__doc__ = _with_arguments(inspect.getdoc(run), about)
        call.__signature__ = signature
        annotated = {p.name: p.annotation for p in parameters if p.annotation is not parameter.empty}
        call.__annotations__ = annotated | {"return": hints["return"]}
        call.measurement, call.execution, call.run = what, how, run
        del call.__wrapped__  # its arguments are others
        return call

    return decorate


def _with_arguments(doc: str, about: dict[str, str]) -> str:
    """A docstring with a section on its arguments, before what is returned."""
    lines = [
        line
        for name, text in about.items()
        for line in textwrap.wrap(
            f"{name}: {text}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_long_words=False
        )
    ]
    before, returns, after = doc.partition("Returns:")
    return "\n".join([before + "Args:", *lines, returns + after])


def as_tuple(value):
    """A list, an iterator or an array as a tuple; anything else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, (list, Iterator)) else value


def as_heads(heads) -> object:
    """Heads as the caller gave them, in tuples of whole numbers; a HeadScore is as good as a pair. What is no list stays
    as it is."""
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        return heads
    plain = (as_tuple(each[:2] if hasattr(each, "score") else each) for each in heads)
    return tuple(tuple(map(_whole, each)) if isinstance(each, tuple) else each for each in plain)


def _whole(value):
    """An array's or tensor's number as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _to_json(name: str, value):
    if isinstance(value, (Message, TemplateArgs)):
        return value.to_json()
    if isinstance(value, Ablation):
        return {f.name: _to_json(name, getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_to_json(name, each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "__index__"):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if hasattr(value, "to_text"):
        return value.to_text()
    raise InputError(
        f"{name} {value!r} is an object of this process: only what is named by text can be sent elsewhere"
    )


def _from_json(value):
    return tuple(map(_from_json, value)) if isinstance(value, list) else value
