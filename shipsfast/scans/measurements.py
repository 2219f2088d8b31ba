"""What scans of heads measure: the descriptions of Ships, dataset-level Ships and Sahara."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Self

from annotated_doc import Doc

from ..engine.ablation import AT, Ablation, as_ablations
from ..engine.heads import Head, check_heads, check_unit
from ..engine.measurement import Execution, Heads, Measurement, as_heads, as_tuple
from ..errors import MOST, InputError, whole_number
from ..prompts.reads import Reads, as_answers, as_places, at_places, with_answers
from ..prompts.tokens import as_prompts

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

POLICIES = ("raise", "mark")


class ReadOut(NamedTuple):
    """What is read of a pass. after: decoder layers, counted as the model's, whose hidden states are; logits: whether they
    are."""

    after: tuple[int, ...] = ()
    logits: bool = True

    @classmethod
    def of_metrics(cls, given: Sequence) -> Self:
        """What these metrics are made of, as a caller gives them."""
        from .metrics import Metric, parse_metric  # torch comes with it

        metrics = [parse_metric(each) if isinstance(each, str) else each for each in given]
        layers = [each.layer if isinstance(each, Metric) else None for each in metrics]
        return cls(tuple(sorted({x for x in layers if x is not None})), not layers or None in layers)

    def depth(self, anatomy: Anatomy) -> int:
        """How many layers with heads have a part in it."""
        blocks = anatomy.blocks if self.logits else anatomy.blocks[: max(self.after) + 1]
        return sum(block.layer is not None for block in blocks)


@dataclass(frozen=True, kw_only=True)
class ScanMeasurement(Measurement):
    """Heads that are switched off, one at a time."""

    heads: Annotated[
        Heads | None,
        Doc("only these."),
        Doc("(Layer, head) pairs, from 0; (layer, None) for a whole layer; None for all."),
    ] = None

    at: Annotated[
        object,
        Doc('where a head is off: at "all" positions, or only at the "end", the position that is read.'),
        Doc("None for what the ablation says."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(heads=as_heads(self.heads))
        if isinstance(self.at, str) and self.at in AT:
            first, *further = (self._at(how) for how in self.ablations)
            self._set(ablation=first, at=None, **({"further": tuple(further)} if further else {}))
        elif self.at is not None:
            self._set_places()

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        return (self.ablation,)

    def _at(self, how: Ablation) -> Ablation:
        if how.at not in (self.at, "all"):
            raise InputError(f"the ablation is at {how.at!r}, and at={self.at!r} is given as well: give one")
        return replace(how, at=self.at)

    def _set_places(self) -> None:
        """Take `at` for what is read."""
        raise InputError(
            f"at={self.at!r} (--at): expected one of {', '.join(AT)}; only scans of the next token read other positions"
        )

    def units(self, anatomy: Anatomy) -> list[Head]:
        """What is scanned, in ascending order. Raises InputError for heads that the model does not have."""
        grid = [(layer, None) for layer in range(anatomy.num_layers)] if self.heads is None else self.heads
        return check_heads(grid, anatomy.num_layers, check_unit(self.unit, anatomy), self.unit)

    def identity(self) -> dict:
        """What the identity of a run says of it beside prompts, ablation and heads."""
        return {}

    def read_out(self) -> ReadOut:
        """What scores are made of."""
        return ReadOut()


@dataclass(frozen=True, kw_only=True)
class ShipsMeasurement(ScanMeasurement):
    kind = "ships"
    takes_several = True

    ablation: Annotated[
        str | Ablation | Sequence,
        Doc(
            "one of undifferentiated, uniform, scale, zero, head_mean_q, head_mean_k, head_mean_v, mean or resample."
        ),
        Doc(
            'Or an `Ablation`. "mean" averages over these prompts; for others, and for "resample", give an `Ablation` with '
            "prompts. Or a list of them, measured in one run: the result is the first one's, and .by_ablation has all."
        ),
    ] = "undifferentiated"
    metric: Annotated[
        object,
        Doc(
            "one of kl, reverse_kl, js, total_variation; with answers also log_prob, prob, log_prob_diff, prob_diff, "
            "abs_log_prob_diff and abs_prob_diff, of the answer's own token;"
        ),
        Doc(
            "`logit_diff(token_a, token_b)`, `refusal_logit(tokens)`, or a callable on (base_logits [P, V], "
            "ablated_logits [N, V], prompt_index int64 [N]) -> [N]; with answers, or several positions, everything that is read counts "
            "as a prompt there, in order. `projection(direction)` and `probe(weights, layer)` are of hidden states behind a decoder "
            "layer. Or a list of them, measured in one pass: the result is the first one's, and has the others in .also."
        ),
    ] = "kl"
    at: Annotated[
        object,
        Doc(
            'where a head is off: at "all" positions, or only at the "end", the position that is read. Or the position of the '
            "prompt that is read in place of the last: a number, from the end where negative, or a text that stands in the prompt "
            "once, of which it is the last token."
        ),
        Doc(
            "None for what the ablation says; for both, give the ablation its own. Positions may also be a list, one for each "
            "prompt, or several of them in a tuple: scores of single positions are in .by_token."
        ),
    ] = None
    answers: Annotated[
        Sequence | None,
        Doc("what follows each prompt: a text or token ids for each. Every token of it is read."),
        Doc("Scores are means over the answer's tokens, those of single tokens are in .by_token."),
    ] = None
    nonfinite: Annotated[
        str,
        Doc(
            "what becomes of a score that is NaN or infinite, because the ablated model overflows or the metric is undefined: "
            "raise ends the run and says where it begins, mark leaves it out."
        ),
        Doc(
            "Then it is NaN in the scores, true in .marked, and its head is in no ranking. An unablated model that overflows "
            "is always refused."
        ),
    ] = "raise"
    control: Annotated[
        Sequence | None,
        Doc(
            "ordinary prompts, in the same template, that are scanned too, to tell what matters more on the prompts."
        ),
        Doc("The result's .control is their scan, and its .contrast() says it."),
    ] = None
    further: tuple[Ablation, ...] = ()  # ablations beside the first; no keyword, as it has no description

    def __post_init__(self) -> None:
        if isinstance(self.ablation, (list, tuple)):
            first, *further = as_ablations(self.ablation)
            self._set(ablation=first, further=tuple(further))
        super().__post_init__()
        check_policy(self.nonfinite)
        self._set(metric=as_tuple(self.metric))
        if self.answers is not None:
            self._set(answers=as_answers(self.answers, len(self.prompts)))
            if self.at is not None:
                raise InputError(
                    "answers (--answer-column) are read at every token, and at (--at) names other positions: give one of them"
                )
        if self.control is not None:
            self._set_control()

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        return (self.ablation, *self.further)

    def each(self) -> list[Self]:
        return [replace(self, ablation=how, further=()) for how in self.ablations]

    def read_out(self) -> ReadOut:
        return ReadOut.of_metrics(self.metric if isinstance(self.metric, tuple) else (self.metric,))

    def _set_places(self) -> None:
        self._set(at=as_places(self.at, len(self.prompts)))

    def reads(self, ids: list[list[int]], tokenizer) -> Reads | None:
        if self.answers is not None:
            return with_answers(ids, self.answers, tokenizer)
        return None if self.at is None else at_places(ids, self.at, tokenizer)

    def _set_control(self) -> None:
        try:
            self._set(control=as_prompts(self.control))
        except InputError as error:
            raise InputError(f"in the control prompts: {error}") from error
        if min(len(self.prompts), len(self.control)) < 2:
            raise InputError("a control tells two sets of prompts apart: give at least two prompts of each")
        own = "answers (--answer-column) say" if self.answers is not None else ""
        own = own or ("positions of single prompts (at) say" if len(set(self.at or ())) > 1 else "")
        if own:
            raise InputError(
                f"{own} something of each prompt, and nothing of the control prompts: scan the two sets apart, and give "
                "both to shipsfast.contrast"
            )

    def of_control(self) -> Self:
        """The same measurement of the control prompts. Means are those of the prompts, for both."""
        at, own = self.at, {"prompts": self.prompts}
        hows = [
            replace(how, **own) if how.kind == "mean" and how.prompts is None else how
            for how in self.ablations
        ]
        if at is not None:  # one position for all
            at = [at[0]] * len(self.control)
        return replace(self, prompts=self.control, control=None, ablation=hows, further=(), at=at)


@dataclass(frozen=True, kw_only=True)
class SubspaceMeasurement(ScanMeasurement):
    kind = "subspace"
    keeps_hidden = True

    rank: Annotated[
        int, Doc("r, singular vectors that span the subspace; below P: with r = P every angle is 0.")
    ] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(rank=whole_number("rank", self.rank))

    def identity(self) -> dict:
        return {"rank": self.rank}

    def check(self, num_prompts: int, num_units: int, hidden_size: int) -> None:
        """Raises InputError for a rank that these prompts cannot have, in a model of that size."""
        if self.rank > num_prompts:
            raise InputError(
                f"rank {self.rank} needs at least {self.rank} prompts, and there are {num_prompts}: lower the rank or add "
                "prompts"
            )
        if self.rank > hidden_size:
            raise InputError(f"rank {self.rank} is above the model's hidden size of {hidden_size}: lower it")


@dataclass(frozen=True, kw_only=True)
class SaharaMeasurement(SubspaceMeasurement):
    kind = "sahara"

    group_size: Annotated[int, Doc("how many heads to find.")] = 3
    beam: Annotated[int, Doc("groups kept after every step; 1 is the paper's.")] = 1
    control: Annotated[
        Sequence | None,
        Doc(
            "ordinary prompts, in the same template, that the group should leave alone: a step adds the head with the largest "
            "angle less penalty x control KL, the mean KL of the next token on these prompts."
        ),
        Doc("Given as `prompts` are."),
    ] = None
    penalty: Annotated[
        float | None,
        Doc(
            "degrees that a nat of control KL costs; default 1. With 0 it is measured, and the plain search runs."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            group_size=whole_number("group_size", self.group_size), beam=whole_number("beam", self.beam)
        )
        check_penalty(self.penalty, self.control is not None)
        if self.control is not None:
            try:
                self._set(control=as_prompts(self.control))
            except InputError as error:
                raise InputError(f"in the control prompts: {error}") from error

    @property
    def degrees_per_nat(self) -> float:
        """The penalty; 0 without a control."""
        if self.control is None:
            return 0.0
        return 1.0 if self.penalty is None else float(self.penalty)

    def identity(self) -> dict:
        """The control prompts' hashes are added where their tokens are known."""
        penalty = {} if self.control is None else {"penalty": self.degrees_per_nat}
        return super().identity() | {"group_size": self.group_size, "beam": self.beam} | penalty

    def check(self, num_prompts: int, num_units: int, hidden_size: int) -> None:
        super().check(num_prompts, num_units, hidden_size)
        if self.group_size > num_units:
            raise InputError(
                f"group_size {self.group_size} is above the {num_units} {self.unit}s to choose from: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class DirectionMeasurement(Measurement):
    """Two sets of prompts, and what of them is compared: `prompts` less `others`. No head is off."""

    kind = "direction"
    prompt_sets: ClassVar = {"prompts_a": "prompts", "prompts_b": "others"}

    others: tuple
    layer: Annotated[
        int | None,
        Doc(
            "the decoder layer whose direction is used; default the one that separates held-out prompts best."
        ),
    ] = None
    position: Annotated[
        int,
        Doc(
            "the token of each prompt, template and prefix included, at which the stream is read: from the end if negative."
        ),
    ] = -1
    seed: Annotated[int, Doc("of the halves into which prompts are drawn.")] = 0
    # Without a description they are no keywords.
    ablation: str | Ablation = "undifferentiated"
    unit: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._set(others=as_prompts(self.others))
        except InputError as error:
            raise InputError(f"in prompts_b: {error}") from error
        if self.layer is not None:
            self._set(layer=whole_number("layer", self.layer, 0))
        self._set(
            position=whole_number("position", self.position, -MOST), seed=whole_number("seed", self.seed, 0)
        )


@dataclass(frozen=True, kw_only=True)
class DirectionExecution(Execution):
    """How the prompts of a direction run: through the model's own layers. Without a description `layers` is no keyword."""

    layers: str = "model"


def check_policy(nonfinite) -> None:
    """Raises InputError for what says nothing of scores that are not finite."""
    if nonfinite not in POLICIES:
        raise InputError(f"unknown nonfinite {nonfinite!r}: expected one of {', '.join(POLICIES)}")


def check_penalty(penalty: float | None, has_control: bool) -> None:
    """Raises InputError for a penalty that cannot be, or that nothing would be taken off for."""
    if penalty is None:
        return
    if not has_control:
        raise InputError(
            "penalty (--penalty) is for control prompts, and there are none: give control (--control), or leave it out"
        )
    plain = isinstance(penalty, numbers.Real) and not isinstance(penalty, bool)
    if not plain or not (math.isfinite(penalty) and penalty >= 0):
        raise InputError(
            f"penalty must be a finite number of at least 0, in degrees per nat, got {penalty!r}"
        )
