"""What scans of heads measure: the descriptions of Ships, dataset-level Ships and Sahara."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

from annotated_doc import Doc

from ..engine.ablation import AT
from ..engine.heads import Head, check_heads, check_unit
from ..engine.measurement import Heads, Measurement, as_heads, as_tuple
from ..errors import InputError, whole_number
from ..prompts.reads import Reads, as_answers, as_places, at_places, with_answers
from ..prompts.tokens import as_prompts

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

POLICIES = ("raise", "mark")


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
            if self.ablation.at not in (self.at, "all"):
                raise InputError(
                    f"the ablation is at {self.ablation.at!r}, and at={self.at!r} is given as well: give one"
                )
            self._set(ablation=replace(self.ablation, at=self.at), at=None)
        elif self.at is not None:
            self._set_places()

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


@dataclass(frozen=True, kw_only=True)
class ShipsMeasurement(ScanMeasurement):
    kind = "ships"

    metric: Annotated[
        object,
        Doc("one of kl, reverse_kl, js, total_variation,"),
        Doc(
            "`logit_diff(token_a, token_b)`, `refusal_logit(tokens)`, or a callable on (base_logits [P, V], "
            "ablated_logits [N, V], prompt_index int64 [N]) -> [N]. Or a list of them, measured in one pass: the result is "
            "the first one's, and has the others in .also."
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonfinite not in POLICIES:
            raise InputError(f"unknown nonfinite {self.nonfinite!r}: expected one of {', '.join(POLICIES)}")
        self._set(metric=as_tuple(self.metric))
        if self.answers is not None:
            self._set(answers=as_answers(self.answers, len(self.prompts)))
            if self.at is not None:
                raise InputError(
                    f"answers are read at every token, and at={self.at!r} names other positions: give one of them"
                )
        if self.control is not None:
            self._set_control()

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
        own = "answers" if self.answers is not None else "at" if len(set(self.at or ())) > 1 else ""
        if own:
            raise InputError(
                f"{own} says something of each prompt, and nothing of the control prompts: scan the two sets apart, and give "
                "both to shipsfast.contrast"
            )

    def of_control(self) -> Self:
        """The same measurement of the control prompts. Means are those of the prompts, for both."""
        how, at = self.ablation, self.at
        if how.kind == "mean" and how.prompts is None:
            how = replace(how, prompts=self.prompts)
        if at is not None:  # one position for all
            at = [at[0]] * len(self.control)
        return replace(self, prompts=self.control, control=None, ablation=how, at=at)


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
