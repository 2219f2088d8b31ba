"""What is measured of whole answers: the descriptions of generation, of its evaluation, and of the scan by attack success."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_doc import Doc

from ..engine.heads import Head, check_groups, check_heads
from ..engine.measurement import Execution, Heads, Measurement, as_heads, as_tuple
from ..errors import InputError, whole_number
from ..prompts.tokens import as_prompts
from .judges.judge import Judge

if TYPE_CHECKING:
    from ..engine.subject import Subject

NEW_TOKENS, TOP_K = 128, 5  # arXiv 2410.13708, appendix B.2
CONTROL_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class AnswerMeasurement(Measurement):
    """Groups of heads x prompts, each answered."""

    max_new_tokens: Annotated[
        int, Doc("a text ends there, or at an end-of-sequence token, which is not part of it.")
    ] = NEW_TOKENS
    do_sample: Annotated[
        bool, Doc("draw from the softmax of logits / temperature over the top_k largest; False is greedy.")
    ] = False
    top_k: Annotated[int, Doc("tokens to draw from; 0: all.")] = TOP_K
    temperature: Annotated[float, Doc("of the draws.")] = 1.0
    seed: Annotated[
        int,
        Doc("of the draws."),
        Doc(
            "What a row draws depends on seed, prompt, heads and, for equal rows, their number; not on the other rows."
        ),
    ] = 0
    eos_token_id: Annotated[
        int | Sequence[int] | None,
        Doc("tokens that end a text; default: all that model, tokenizer and chat template name."),
        Doc("[] for none."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ablation.at != "all":
            raise InputError(
                f"ablation {self.ablation.describe()}: in answers a head is off at every token; only scans of the next token take "
                "at='end'"
            )
        whole_number("max_new_tokens", self.max_new_tokens)
        self._set(eos_token_id=as_tuple(self.eos_token_id))

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    def units(self, subject: Subject) -> list[list[Head]]:
        """The groups as they were named, in units. Raises InputError for heads that the model does not have."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GenerationMeasurement(AnswerMeasurement):
    kind = "generate"

    groups: Annotated[
        Iterable[Heads],
        Doc(
            "G groups of (layer, head) pairs, from 0; (layer, None) is a whole layer, and [] the unablated model."
        ),
    ] = ((),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.groups, Iterable) and not isinstance(self.groups, (str, bytes)):
            self._set(groups=tuple(map(as_heads, self.groups)))

    def units(self, subject: Subject) -> list[list[Head]]:
        return check_groups(self.groups, subject)


@dataclass(frozen=True, kw_only=True)
class EvaluationMeasurement(GenerationMeasurement):
    kind = "evaluate"
    reads_texts = True

    judge: Annotated[
        str | Judge | Callable,
        Doc(
            "one of keywords (refusal phrases in normalised text), paper (the published rule with its defects, for comparison), "
            "classifier:PATH:LABEL or chat:PATH (a model on disk)."
        ),
        Doc(
            "Or a `Judge`, or a function that takes a list of answers (and `prompts`, if it has a parameter of that name) and "
            "returns a label or boolean each. It is called for some answers at a time, as they are finished."
        ),
    ] = "keywords"
    control: Annotated[
        Sequence[str] | None,
        Doc(
            "ordinary prompts, in the same template, which the same groups answer too: how far does each ablation break the "
            "model?"
        ),
        Doc("The result's .control says it."),
    ] = None
    control_tokens: Annotated[
        int,
        Doc(
            "how many tokens of the unablated model's answer the control's KL is taken along, at most max_new_tokens."
        ),
    ] = CONTROL_TOKENS
    keep_text: Annotated[
        bool,
        Doc("keep the answers in the run folder; else their labels, lengths and hashes only."),
        Doc("The result at hand has those that were decoded for it in either case."),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control is not None:
            try:
                self._set(control=as_prompts(self.control))
            except InputError as error:
                raise InputError(f"in the control prompts: {error}") from error


@dataclass(frozen=True, kw_only=True)
class AsrMeasurement(AnswerMeasurement):
    kind, run_kind = "asr", "ships"  # its scores are of that kind, with the metric "asr"
    reads_texts = True

    judge: Annotated[str | Judge | Callable, Doc("as in `evaluate`.")] = "keywords"
    heads: Annotated[Heads | None, Doc("only these, as in `scan`; None for all.")] = None
    keep_text: Annotated[bool, Doc("as in `evaluate`.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(heads=as_heads(self.heads))

    def units(self, subject: Subject) -> list[list[Head]]:
        """The unablated model, and every head on its own."""
        number = subject.anatomy.num_layers
        grid = [(layer, None) for layer in range(number)] if self.heads is None else self.heads
        return [[], *([each] for each in check_heads(grid, number, subject.num_units, self.unit))]


@dataclass(frozen=True, kw_only=True)
class DecodingExecution(Execution):
    """How rows decode."""

    batch_rows: Annotated[
        int | None,
        Doc("rows that decode together; default 128 on a CPU, 512 on CUDA, fewer where memory is short."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("batch_rows")


@dataclass(frozen=True, kw_only=True)
class EngineExecution(DecodingExecution):
    """How rows decode, and by whose loop."""

    engine: Annotated[
        str,
        Doc(
            "continuous decodes all rows in one batch that is refilled as rows end; transformers calls the model's own "
            "`generate` inside `ablate`, a group at a time. auto is the first, unless there are `generate_kwargs`."
        ),
    ] = "auto"
    generate_kwargs: Annotated[
        dict | None,
        Doc(
            "for the model's own `generate`: logits_processor, stopping_criteria, assistant_model, ... Settings that the model "
            "comes with (such as a repetition penalty) count in neither engine."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JudgedExecution(DecodingExecution):
    """How rows decode, and where what is judged is kept."""

    out: Annotated[
        str | Path | None,
        Doc("run folder. What is finished is kept there, and the same measurement continues from it."),
    ] = None
