"""The k heads with the largest scores, exactly, without scoring every head on every prompt.

    screen   a copy of the model in low precision scores all heads (screen.py)
    race     over prompts in random order; after each round heads that cannot reach the top k any more are dropped (results/race.py)
    finish   the first heads of that ranking, and some drawn at random, are scored exactly on all prompts; more are taken in
             until no other head can belong to the top k, as far as the screen was seen to be off (results/screen_error.py)

Every round and every step of the finish is a scan of some prompts and some heads (`part_of`). What comes next follows from the scores
so far and the seed, so that a run that was killed goes on as it would have.
"""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.measurement import ScanExecution, called_with
from ..errors import InputError, note
from ..memory import once_more
from ..models.anatomy import MODEL_ERRORS
from ..models.loading import first_line
from ..models.restore import untouched
from ..models.wider import name_of
from ..results.certificate import Certificate
from ..results.race import Race
from ..results.score_error import ScoreError
from ..results.screen_error import ScreenError, by_root, scaled
from ..results.top_heads import TopHeads
from ..runs.kinds import SCORES, SCREEN
from .prepare import Prepared, part_of, prepare
from .rescoring import drawn, rescore
from .score_store import metrics_of
from .screen import Screen, cannot
from .ships import OneAblation, _spot_check, _Work
from .top_measurement import TopMeasurement
from .top_rounds import chosen_ends
from .top_store import SearchStore, Stage, flops_of

# Heads that the race drops are below the last one that it was for. A race of a screen is for more than k, and at least so many, so that
# this one lies well below the k-th, and errors of the screen do not reach across.
MARGIN = 5
DRAWN = 8  # heads that are scored exactly whatever the screen says of them


@called_with(
    TopMeasurement,
    ScanExecution,
    heads="the candidates: (layer, head) pairs, from 0; (layer, None) for a whole layer; None for all.",
)
@untouched
def top_heads(
    model: PreTrainedModel, tokenizer, measurement: TopMeasurement, execution: ScanExecution
) -> TopHeads:
    """Find the k heads whose mean scores are the largest, in a part of a scan's work; their scores are exact.

    The heads are those of `scan(...).top(k)`, but for a chance of at most `error` that one is missing. A copy of the model in low
    precision may score all heads first, and heads may be dropped while prompts come in; the first ones are then scored as in a scan, by
    the model as it is, until no other can be among them. `backend` and `layers` are of the exact scores; the copy's are chosen for it.

    Returns:
        TopHeads: .heads in order, .per_prompt (.kl) float64 [P, L, H], NaN for heads without an exact score, .upper float64 [L, H] bounds
        on the others, and .certificate, which says what was assumed and how much was done.
    Raises:
        InputError: as `scan`, and for a k, error, screen or metric that cannot be.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    measurement.check(len(prepared.units))
    (metric,) = metrics_of(prepared, tokenizer)
    if metric.sees_all_prompts:
        raise InputError(
            f"metric {metric.name} sees all prompts at once, and a search takes them one after the other: use shipsfast.scan"
        )
    store = SearchStore(prepared, metric)
    found = store.finished()
    if found is not None:
        return found
    store.begin()
    search = _Search(prepared, store)
    search.run()
    packing = search.check()
    floor = max(packing, ScoreError.from_json(store.record["error"]).floor)
    store.record["seconds"] = seconds_since(started)
    return store.result(search.certificate(), search.upper(), floor)


class _Search:
    """Heads by their numbers among the candidates, [N]."""

    def __init__(self, prepared: Prepared, store: SearchStore) -> None:
        self.prepared, self.store, self.metric = prepared, store, store.metric
        measurement = prepared.measurement
        self.k, self.units = measurement.k, prepared.units
        self.at = tuple(np.array(self.units).T)  # in [L, H]
        self.counts = np.array([layer < prepared.depth for layer, _ in self.units])  # others score 0
        self.root, self.signed = by_root(self.metric.name), self.metric.signed
        rng = np.random.default_rng(measurement.seed)
        self.order = rng.permutation(len(prepared.token_ids))
        self.complete = store.record.setdefault("scan_flops", flops_of(prepared))  # a whole scan's work
        self.screened = False
        self.race: Race | None = None
        self.ends, self.race_allowed, self.screen_allowed = [len(self.order)], 0.0, 0.0
        self.dropped = np.zeros(len(self.units), dtype=bool)
        self.scored = np.zeros(len(self.units), dtype=bool)  # exactly, on all prompts
        self.random = np.zeros(len(self.units), dtype=bool)
        self.extra: list[int] = []
        self.contradicted, self.chances = False, np.zeros(len(self.units))
        self.at_most = np.full(len(self.units), np.nan)  # bounds of the race on their means

    def run(self) -> None:
        screen = self._screen()
        self.screened = screen.dtype is not None and self._screen_all(screen)
        if self.screened:
            return self._finish()
        self._split(screened=False)
        self._rounds(self.prepared, SCORES, "top")
        self.scored = ~(self.dropped | self._wild(SCORES))

    def _screen(self) -> Screen:
        screen = Screen.of(self.prepared, self.k + self._more() + DRAWN, self.store.record.get("screen"))
        self._chose(screen)
        return screen

    def _chose(self, screen: Screen) -> None:
        own = {"dtype": None if screen.dtype is None else name_of(screen.dtype), "why": screen.why}
        self.store.record["screen"] = self.store.record.get("screen", {}) | own
        self.store.write()

    def _more(self) -> int:
        """How many heads beyond the first k are scored exactly in any case."""
        return max(2, self.k // 5)

    def _screen_all(self, screen: Screen) -> bool:
        """Whether the screening copy has scored the heads: what auto has chosen may turn out not to run."""
        problem = ""
        try:
            copy = once_more(
                f"copying the model in {name_of(screen.dtype)}", lambda: screen.copy(self.prepared)
            )
            self.store.record["screen"] |= {
                "attention_backend": copy.backend, "layers": copy.layers, "products": name_of(copy.products),
            }  # fmt: skip
            self._split(screened=True)
            self._rounds(copy, SCREEN, "screen")
        # What a model's own code raises in a dtype that it does not expect, what is refused, and no memory.
        except (*MODEL_ERRORS, MemoryError) as error:
            problem = first_line(error)
            if self.prepared.measurement.screen != "auto":
                raise cannot(name_of(screen.dtype), problem) from error
        if not problem:
            return True
        note(f"no screen: the copy in {name_of(screen.dtype)} does not run: {problem}")
        self.store.forget_screen(f"a copy in {name_of(screen.dtype)} does not run: {problem}")
        self.dropped[:] = False
        return False

    def _split(self, *, screened: bool) -> None:
        """How the chance of an error is divided, and whether heads race."""
        error, record, every = self.prepared.measurement.error, self.store.record, [len(self.order)]
        self.race, self.race_k = None, self.k + screened * max(MARGIN, self.k)
        if "round_ends" not in record:
            may = error > 0 and self.race_k < len(self.units)
            record["round_ends"] = chosen_ends(self.prepared, self.race_k, self.order) if may else every
            self.store.write()
        self.ends = record["round_ends"]
        races = len(self.ends) > 1
        self.race_allowed = races * error / (2 if screened else 1)
        self.screen_allowed = screened * error / (2 if races else 1)
        if races:
            cost = np.array([max(1, self.prepared.depth - layer) for layer, _ in self.units], np.float64)
            # By the spread of scores, of metrics with a cap too: bounds by the cap alone drop nothing (docs/top-heads.md).
            how = {"signed": self.signed, "ends": list(self.ends)}
            # Once that the first heads survive, and once that the bounds on the others hold.
            self.race = Race(len(self.order), self.race_k, self.race_allowed / 2, cost, **how)

    def _rounds(self, prepared: Prepared, room: str, name: str) -> None:
        """Score the heads that may still be among the first, a round of prompts at a time."""
        rounds = list(pairwise([0, *self.ends]))
        for number, (start, end) in enumerate(rounds):
            gone = self.dropped | self._wild(room, start)
            alive = [unit for unit, out in zip(self.units, gone, strict=True) if not out]
            if not alive:
                break
            title = name if len(rounds) == 1 else f"{name}, {end} of {rounds[-1][1]} prompts"
            self.store.run(prepared, room, number, sorted(self.order[start:end].tolist()), alive, title)
            if end < len(self.order):
                self.dropped |= ~self.race.alive(self._seen(room, end)) & ~self._wild(room, end)
        if self.race is not None:
            self.at_most = np.where(self.dropped, self.race.upper(self._seen(room)), np.nan)

    def _wild(self, room: str, end: int | None = None) -> np.ndarray:
        """Heads with a score that is not finite: they do not race. end: of the prompts of the first rounds only, as a run that goes on
        knows later ones too."""
        return self.store.marked[room][:, *self.at][self.order[:end]].any(0)

    def _seen(self, room: str, end: int | None = None) -> np.ndarray:
        """Scores [n, N] in the order of the race, as it takes them: NaN from where a head was dropped on, 0 for heads that do not race."""
        seen = self.store.scores[room][:, *self.at][self.order[:end]]
        if not self.signed:
            seen = np.maximum(seen, 0)  # rounding may put a score of 0 below it
        return np.where(self._wild(room, end), 0.0, seen)

    def _means(self, room: str) -> np.ndarray:
        """[N] over the prompts that were seen; NaN where there are none."""
        scores = self.store.scores[room][:, *self.at]
        count = (~np.isnan(scores)).sum(0)
        return np.where(count > 0, np.nansum(scores, 0) / np.maximum(count, 1), np.nan)

    def _size(self, means: np.ndarray) -> np.ndarray:
        return np.abs(means) if self.signed else means

    def _finish(self) -> None:
        """Exact scores of the first heads, and of more until no other can be among the first k."""
        wild, screened = self._wild(SCREEN), self._means(SCREEN)
        self.at_most = np.where(self.dropped, self.at_most, self._size(screened))
        order = np.argsort(np.where(self.dropped | wild, np.inf, -self._size(screened)), kind="stable")
        first = order[: self.k + self._more()]
        take = wild | ~self.counts  # heads whose score is 0 take no work
        take[first] = True
        usable = np.zeros(self.prepared.grid, dtype=bool)
        usable[self.at] = ~take
        places = {place: number for number, place in enumerate(self.units)}
        self.random[[places[at] for at in drawn(usable, DRAWN, self.prepared.measurement.seed)]] = True
        take |= self.random
        block, step = max(4, self.k // 2), 0
        while take.any():
            self.scored |= take
            chosen = [unit for unit, own in zip(self.units, take, strict=True) if own]
            name = "exact" if not step else f"exact, {int(take.sum())} more"
            self.store.run(self.prepared, SCORES, step, range(len(self.order)), chosen, name)
            self.extra += [int(take.sum())] * bool(step)
            take = self._next(block)
            block, step = 2 * block, step + 1

    def _next(self, most: int) -> np.ndarray:
        """bool [N]: heads to be scored next, the likeliest first; none where the chances of all others are small enough."""
        take, left = np.zeros(len(self.units), dtype=bool), np.flatnonzero(~self.scored)
        known, kth = self._errors(), self._kth()
        self.chances[:] = 0
        self.chances[left] = known.chances(kth, self.at_most[left])
        self.contradicted |= self._contradicts(kth)
        if self.contradicted:
            take[left] = True
            return take
        order = left[np.argsort(-self.chances[left], kind="stable")]
        rest = self.chances[order][::-1].cumsum()[::-1]  # what is left where those before are scored
        wanted = int((rest > self.screen_allowed).sum())
        take[order[: min(wanted, most)]] = True
        return take

    def _kth(self) -> float:
        """The k-th exact score, NaN where there are fewer."""
        exact = self._size(self._exact())
        exact = np.sort(exact[np.isfinite(exact)])[::-1]
        return float(exact[self.k - 1]) if len(exact) >= self.k else np.nan

    def _exact(self) -> np.ndarray:
        """[N] exact means of the heads scored so far; NaN for others, and where a score was marked."""
        exact = self.store.scores[SCORES][:, *self.at].mean(0)
        return np.where(self.scored, exact, np.nan)

    def _error_of(self) -> np.ndarray:
        """[N] errors of the screen on the prompts that it saw, NaN where they are not known."""
        exact, screened = (self.store.scores[room][:, *self.at] for room in (SCORES, SCREEN))
        both = ~np.isnan(screened)
        count = np.maximum(both.sum(0), 1)
        means = [np.where(both, each, 0).sum(0) / count for each in (exact, screened)]
        error = scaled(means[0], self.root) - scaled(means[1], self.root)
        return np.where(self.scored & both.any(0) & self.counts & ~self._wild(SCREEN), error, np.nan)

    def _errors(self, without: int | None = None) -> ScreenError:
        """without: a head that is left out of them."""
        errors = self._error_of()
        some = ~np.isnan(errors)
        if without is not None:
            some[without] = False
        return ScreenError(errors[some], errors[some & self.random], self.root, self.signed)

    def _contradicts(self, kth: float) -> bool:
        """Whether a head that was drawn at random is among the first k, though the errors of the others had ruled it out."""
        exact = self._size(self._exact())
        for number in np.flatnonzero(self.random & (exact >= kth)):
            chance = self._errors(number).chances(kth, self.at_most[[number]])
            if chance[0] <= self.screen_allowed:
                return True
        return False

    def check(self) -> float:
        """Hold exact scores against plain passes, as a scan does. Returns what packing does."""
        scored = [unit for unit, own in zip(self.units, self.scored, strict=True) if own]
        own = part_of(self.prepared, range(len(self.order)), scored)
        stage = Stage(self.store, own, SCORES, "check")
        others = np.ones(self.prepared.grid, dtype=bool)
        others[tuple(np.array(scored).T)] = False
        stage.scores[:, others] = np.nan  # heads that were dropped on the way
        work = _Work(own, [[stage]], "check")
        work.bar.close()
        one = OneAblation(own, [stage], work.one)
        _spot_check(one)
        rescore(one)
        return stage.noise_floor

    def upper(self) -> np.ndarray:
        """float64 [L, H]: bounds on the means of heads without an exact score."""
        found, left = np.full(self.prepared.grid, np.nan), ~self.scored
        bounds = self.at_most[left]
        if left.any() and self.screened:
            bounds = self._errors().bounds(bounds, self.screen_allowed / left.sum())
        at = tuple(each[left] for each in self.at)
        found[at] = np.where(np.isfinite(bounds), bounds, np.nan)
        return found

    def certificate(self) -> Certificate:
        measurement, screen = self.prepared.measurement, self.store.record["screen"]
        left_out = self._wild(SCORES)
        own, races = {}, self.race is not None
        if self.screened:
            errors = self._errors().errors
            spread = {} if len(errors) < 2 else {
                "error_mean": float(errors.mean()), "error_sd": float(errors.std(ddof=1)),
                "error_largest": float(np.abs(errors).max()),
            }  # fmt: skip
            own = {
                "screen_allowed": self.screen_allowed, "chance_left": float(self.chances[~self.scored].sum()), "by_root": self.root,
                "errors": len(errors), "drawn": int(self.random.sum()), "contradicted": self.contradicted, "extra": tuple(self.extra),
            } | spread  # fmt: skip
        if races:
            own |= {
                "race_allowed": self.race_allowed, "race_k": self.race_k, "rounds": tuple(self.ends), "dropped": int(self.dropped.sum()),
                "race_bound": self.race.bound, "race_about": self.race.about,
            }  # fmt: skip
        flops = self.store.flops
        return Certificate(
            k=self.k, heads=len(self.units), prompts=len(self.order), metric=self.metric.name, unit=self.prepared.unit,
            error=measurement.error, dtype=name_of(self.prepared.model.dtype), scored=int((self.scored & ~left_out).sum()),
            left_out=int(left_out.sum()), screen=screen["dtype"], screen_why=screen["why"],
            work={"screen": flops[SCREEN] / self.complete, "exact": flops[SCORES] / self.complete}, **own,
        )  # fmt: skip
