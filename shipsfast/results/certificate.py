"""How sure a search for the top heads is, what that rests on, and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ..text import counted

MUCH = 0.95  # of a complete scan's arithmetic: no less to speak of


@dataclass(frozen=True)
class Certificate:
    """Of the k heads with the largest mean scores.

    k of `heads` candidates, over `prompts` prompts, by `metric`, switched off by `unit`; error: the chance that was allowed.
    dtype: of the exact scores; scored: heads with an exact score, of all prompts; left_out: heads that were marked, without a mean.
    screen: dtype of the screening copy, None without one; screen_why: why that, or why none; screen_allowed: its part of `error`;
        chance_left: the sum of the chances that a head without an exact score belongs to the top k; by_root: errors are of the roots of
        scores; errors, drawn: heads scored in both, and those of them that were drawn at random; error_mean, error_sd, error_largest
        (by size): of exact less screened; contradicted: a drawn head belongs to the top k against the screen, so that all were scored;
        extra: how many more heads were taken in, by step.
    race_allowed: the race's part of `error`, 0 without one; race_k: for how many heads it was; rounds: after how many prompts heads could be dropped; dropped: how many
        were; race_bound, race_about: by what, and what that assumes.
    work: what was done, as shares of a complete scan's arithmetic: "screen" in the screen's dtype, "exact" in the model's own.
    """

    k: int
    heads: int
    prompts: int
    metric: str
    unit: str
    error: float
    dtype: str
    scored: int
    left_out: int = 0
    screen: str | None = None
    screen_why: str = ""
    screen_allowed: float = 0.0
    chance_left: float = 0.0
    by_root: bool = False
    errors: int = 0
    drawn: int = 0
    error_mean: float | None = None
    error_sd: float | None = None
    error_largest: float | None = None
    contradicted: bool = False
    extra: tuple[int, ...] = ()
    race_allowed: float = 0.0
    race_k: int = 0
    rounds: tuple[int, ...] = ()
    dropped: int = 0
    race_bound: str = ""
    race_about: str = ""
    work: dict[str, float] = field(default_factory=dict)

    @property
    def unscored(self) -> int:
        """Heads without an exact score."""
        return self.heads - self.scored - self.left_out

    @property
    def chance(self) -> float:
        """At most so likely is a head of the true top k missing, where the assumptions hold."""
        if not self.unscored:
            return 0.0
        return self.chance_left + (self.race_allowed if self.dropped else 0.0)

    def lines(self) -> list[str]:
        """In words."""
        return [*self._of_heads(), *self._of_screen(), *self._of_race(), self._of_work()]

    def _of_heads(self) -> Iterator[str]:
        of, prompts = counted(self.heads, self.unit), counted(self.prompts, "prompt")
        yield (
            f"the {self.k} of {of} with the largest mean {self.metric} over {prompts}; their scores are exact: of every prompt, by the "
            f"model as it is, in {self.dtype}, as a complete scan in that dtype would give them up to its rounding"
        )
        if self.left_out:
            yield (
                f"{counted(self.left_out, self.unit)} left out: a score of theirs is not finite, and was marked; whether they belong to "
                f"the top {self.k} is not known"
            )
        if not self.unscored:
            others = "every other one of them" if self.left_out else f"every other {self.unit}"
            yield f"{others} has an exact score: nothing is assumed, and none of these can be missing"
        else:
            yield (
                f"{counted(self.scored, self.unit)} of {self.heads} scored exactly; the chance that one of the other {self.unscored} "
                f"belongs to the top {self.k} is estimated at {self.chance:.2g} or less, of {self.error:g} allowed"
            )

    def _of_screen(self) -> Iterator[str]:
        if self.screen is None:
            yield f"no screen: {self.screen_why}"
            return
        later = f", {sum(self.extra)} taken in later, which the screen did not rule out" if self.extra else ""
        yield (
            f"screen: a copy in {self.screen} scored the {self.unit}s first ({self.screen_why}); exact scores followed for "
            f"{counted(self.scored, self.unit)}, {self.drawn} of them drawn at random{later}"
        )
        if self.error_sd is not None:
            of = "of square roots of scores" if self.by_root else "of scores"
            yield (
                f"exact minus screened, {of}, {counted(self.errors, self.unit)}: mean {self.error_mean:.2g}, standard deviation "
                f"{self.error_sd:.2g}, largest {self.error_largest:.2g}"
            )
        if self.contradicted:
            yield f"a {self.unit} drawn at random is in the top {self.k} though the screen ruled it out: all were scored instead"
        elif self.unscored:
            yield (
                f"assumed: errors of the {self.unit}s that were not scored are drawn as those of the {self.drawn} that were drawn at "
                "random, about normally (Student's t for one more), and no larger than those of all that were scored allow; their "
                f"chances add up to {self.chance_left:.2g}, of {self.screen_allowed:g} allowed"
            )

    def _of_race(self) -> Iterator[str]:
        if len(self.rounds) < 2:
            if self.unscored or self.screen is not None:
                yield f"no race over prompts: with {counted(self.prompts, 'prompt')} of such lengths it would save nothing, or error is 0"
            return
        after = ", ".join(map(str, self.rounds[:-1]))
        yield (
            f"race for the first {self.race_k}: prompts in random order; {counted(self.dropped, self.unit)} dropped after {after} of {self.prompts}, with a chance of "
            f"{self.race_allowed:g} allowed; bound: {self.race_bound}. {self.race_about}"
        )

    def _of_work(self) -> str:
        each = (("screen", self.screen), ("exact", self.dtype))
        parts = [f"{self.work[name]:.0%} in {dtype}" for name, dtype in each if self.work.get(name)]
        saved = (
            ""
            if sum(self.work.values()) < MUCH
            else "; nothing was saved: a complete scan scores all heads for that"
        )
        return f"work, as shares of a complete scan's arithmetic: {', '.join(parts) or 'none'}{saved}"

    def text(self) -> str:
        """In words, a line for each thing."""
        return "\n".join(self.lines())

    __str__ = text

    def to_json(self) -> dict:
        return asdict(self) | {"extra": list(self.extra), "rounds": list(self.rounds), "chance": self.chance}

    @classmethod
    def from_json(cls, body: dict) -> Certificate:
        own = {name: value for name, value in body.items() if name != "chance"}
        return cls(**own | {name: tuple(own[name]) for name in ("extra", "rounds")})
