"""What a search for the k heads with the largest scores measures."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Annotated

from annotated_doc import Doc

from ..engine.measurement import as_tuple
from ..errors import InputError, whole_number
from .measurements import ReadOut, ScanMeasurement, check_policy

SCREENS = ("auto", "none", "bfloat16", "float16", "float32")
MOST_ERROR = 0.5


@dataclass(frozen=True, kw_only=True)
class TopMeasurement(ScanMeasurement):
    """Heads that are switched off, one at a time, of which the k with the largest mean scores are wanted."""

    kind = "top"
    in_place = ("k",)

    k: Annotated[int, Doc("how many heads.")] = 10
    error: Annotated[
        float,
        Doc(
            "the chance, at most, that a head of the true top k is not among them. 0 for none: then no head is dropped by statistics."
        ),
    ] = 0.01
    screen: Annotated[
        str,
        Doc(
            "the dtype of a copy of the model that says which heads are worth an exact score: auto, none, bfloat16, float16 or float32. "
            "auto takes one where it is faster here and there is memory for it. Named, it runs or raises."
        ),
        Doc("What was chosen, and why, is in .record['screen']."),
    ] = "auto"
    metric: Annotated[
        object,
        Doc("one of kl, reverse_kl, js, total_variation;"),
        Doc(
            "`logit_diff(token_a, token_b)`, `refusal_logit(tokens)`, `projection(direction)` or `probe(weights, layer)`. Those with a sign "
            "rank heads by the size of their mean."
        ),
    ] = "kl"
    nonfinite: Annotated[
        str,
        Doc(
            "what becomes of an exact score that is NaN or infinite: raise ends the run and says where it begins, mark leaves its head out."
        ),
    ] = "raise"
    seed: Annotated[
        int, Doc("of the order of the prompts, and of the heads drawn to see how far the screen is off.")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_policy(self.nonfinite)
        self._set(
            k=whole_number("k", self.k), seed=whole_number("seed", self.seed, 0), metric=as_tuple(self.metric)
        )
        check_chance(self.error, self.screen)
        self._set(error=float(self.error))
        if isinstance(self.metric, tuple):
            if len(self.metric) != 1:
                raise InputError(
                    f"a search for top heads goes by one metric, and {len(self.metric)} were given (--metric): shipsfast.scan "
                    "measures several"
                )
            self._set(metric=self.metric[0])
        name = self.metric if isinstance(self.metric, str) else getattr(self.metric, "name", "")
        if name.removeprefix("abs_").removesuffix("_diff") in ("log_prob", "prob"):
            raise InputError(
                f"metric {name} (--metric) is of an answer's own tokens, and a search for top heads reads each prompt behind its last "
                "token: shipsfast.scan with answers (scan --answer-column) measures it"
            )

    def identity(self) -> dict:
        return {"k": self.k, "error": self.error, "screen": self.screen, "seed": self.seed}

    def read_out(self) -> ReadOut:
        return ReadOut.of_metrics([self.metric])

    def check(self, num_units: int) -> None:
        """Raises InputError where there are not so many heads."""
        if self.k > num_units:
            raise InputError(f"k={self.k} is above the {num_units} {self.unit}s to choose from: lower it")


def check_chance(error: float, screen: str) -> None:
    """Raises InputError for an error and a screen that cannot be, or not together."""
    plain = isinstance(error, numbers.Real) and not isinstance(error, bool)
    if not plain or not (math.isfinite(error) and 0 <= error <= MOST_ERROR):
        raise InputError(f"error must be a chance from 0 to {MOST_ERROR}, got {error!r}")
    if screen not in SCREENS:
        raise InputError(f"unknown screen {screen!r} (--screen): expected one of {', '.join(SCREENS)}")
    if screen not in ("auto", "none") and not error:
        raise InputError(
            f"screen {screen!r} (--screen) leaves heads out by chance, and error=0 allows none: use screen='none', or a larger error"
        )
