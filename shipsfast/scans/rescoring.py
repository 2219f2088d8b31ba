"""A sample of scores computed again by plain forward passes, in a wider dtype where that can be: how exact a scan is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from ..engine.heads import Head
from ..engine.memory_plan import free_bytes
from ..memory import is_out_of_memory, out_of_memory
from ..models.anatomy import MODEL_ERRORS
from ..models.loading import first_line
from ..models.weights import where_weights_are
from ..models.wider import WIDER, copy_bytes, name_of, why_no_copy, wider_copy
from ..ops.subspaces import leading_subspace, subspace_angle_deg
from ..ops.tree_attention import resolve_backend
from ..results.head_map import ranked
from ..results.score_error import Rescored, ScoreError
from .prepare import Prepared
from .self_check import ablated_hidden, ablated_outputs

T = TypeVar("T")
SEED = 0
NOT_ASKED = "none was asked for (rescored=0)"
LEAST = 4  # scores, however few there are in all
# Of a scan of N scores one in so many is rescored: with the unablated rows they take about a twentieth of its work.
ONE_IN = 80
NAMED_FIRST = 6  # one in so many of them is of the heads that the ranking names first


def how_many(asked: int, scores: int, one_in: int = ONE_IN) -> int:
    """Of `scores` that all take as much."""
    return min(asked, max(LEAST, scores // one_in), scores)


def _named_first(count: int) -> int:
    """How many of the rescored heads are those that the ranking names first."""
    return count // NAMED_FIRST or int(count > 1)


def again(prepared: Prepared, run: Callable[[Prepared], T]) -> tuple[T | None, str, str]:
    """run() of the model in a wider dtype, or, where that cannot be, in its own; the dtype, and why it is no wider one.

    None and "" where neither can be: weights that every pass would bring in anew, or no memory.
    """
    model = prepared.model
    why = why_no_copy(model) or no_room(prepared, copy_bytes(model), name_of(WIDER[model.dtype]))
    if not why:
        name = name_of(WIDER[model.dtype])
        with out_of_memory() as found:
            try:
                return run(_wider(prepared)), name, ""
            except MODEL_ERRORS as error:  # what a model's own code raises in a dtype that it does not expect
                if is_out_of_memory(error):
                    raise
                why = f"a copy in {name} does not run: {first_line(error)}"
        if found:
            why = f"out of memory with a copy in {name}"
    if where_weights_are(model) in ("streamed", "offloaded"):
        return None, "", why
    with out_of_memory() as found:
        return run(prepared), name_of(model.dtype), why
    return None, "", why


def no_room(prepared: Prepared, needed: int, name: str) -> str:
    """Why there is no memory for a copy in the dtype of that name, which takes so many bytes; "" where there is."""
    free = free_bytes(prepared.device)
    if prepared.execution.max_memory is not None:
        free = min(free, prepared.execution.max_memory)
    if needed <= free:
        return ""
    return f"a copy in {name} takes {needed / 2**30:.2g} GiB, and {free / 2**30:.2g} GiB may be used"


def _wider(prepared: Prepared) -> Prepared:
    model, anatomy = wider_copy(prepared.model, prepared.anatomy)
    backend = resolve_backend(
        "auto", prepared.device, model.dtype, one_head_size=anatomy.head_dim == anatomy.value_dim
    )
    # What replaces heads' outputs is computed anew as well.
    return replace(prepared, model=model, anatomy=anatomy, backend=backend, layers="model", _mean=None)


def drawn(usable: np.ndarray, count: int, seed: int | None = None) -> list[tuple[int, ...]]:
    """`count` places where `usable` is true, every one with the same chance, spread over the first axis as far as they
    can be: each in turn gets as many, drawn at random."""
    generator = np.random.default_rng(SEED if seed is None else seed)
    places = generator.permutation(np.argwhere(usable))
    seen: Counter[int] = Counter()  # of each place on the first axis
    turn = []
    for first in places[:, 0].tolist():
        turn.append(seen[first])
        seen[first] += 1
    return [tuple(map(int, places[at])) for at in np.argsort(turn, kind="stable")[:count]]


def rescore(work) -> None:
    """Say in every metric's record how far its scores are off."""
    prepared, measures = work.prepared, work.measures
    asked = prepared.execution.rescored
    if all(measure.knows_error(asked) for measure in measures):
        return
    main = measures[0]
    usable = np.all([np.isfinite(measure.scores) for measure in measures], axis=0)
    usable[:, prepared.depth :] = False  # heads that cannot matter: their 0 says nothing of others
    cells: dict[tuple[int, ...], bool] = {}  # (read, layer, head), and whether it was drawn
    prompts = [prompt for prompt, _ in prepared.read_places]
    count = how_many(asked, int(usable.sum()))
    if count:
        top = ranked(main.scores.mean(0), _named_first(count), main.metric.signed)
        generator = np.random.default_rng(SEED)
        for layer, head, _ in top:
            # What one metric ranks first may be no number in another.
            reads = np.flatnonzero(usable[:, layer, head])
            if reads.size:
                cell = int(generator.choice(reads)), layer, head
                cells[cell] = usable[cell] = False
        cells |= dict.fromkeys(drawn(usable, count - len(cells)), True)
    found, against, why = {}, "", NOT_ASKED if not asked else "there is no score"
    if cells:
        found, against, why = again(prepared, lambda one: _scores(work, one, cells))
    for number, measure in enumerate(measures):
        sample = [
            Rescored(layer, head, float(measure.scores[read, layer, head]), scores[number], cells[read, layer, head], prompts[read])
            for (read, layer, head), scores in (found or {}).items()
        ]  # fmt: skip
        measure.keep_error(_error(prepared, sample, against, why, measure.noise_floor, measure.plain))


def _error(
    prepared: Prepared,
    sample: list[Rescored],
    against: str,
    why: str,
    packing: float,
    plain: Sequence[Rescored],
) -> ScoreError:
    """plain: what plain passes in the model's own dtype gave; where there is nothing else, they are the sample."""
    own = name_of(prepared.model.dtype)
    if not all(np.isfinite(each.expected) for each in sample):
        sample, why = [], f"scores of a copy in {against} are not finite"
    if not sample:
        sample, against = list(plain), own if plain else ""
    worst = max((each.error for each in plain), default=None)
    return ScoreError(tuple(sample), against, why, packing, worst, own)


def rescore_angles(
    store, angles: np.ndarray, rank: int, packing: float, chosen: Sequence[Head] = ()
) -> ScoreError:
    """How far angles are off. store: the AngleStore of these angles, float64 [steps, L, H].

    chosen: of a search, the heads in the order chosen. What is rescored are then gains: a head's angle less that of the group
    before.
    """
    prepared, before, asked = store.prepared, store.before.get("error"), store.prepared.execution.rescored
    if before is not None and store.folder.same_environment and ScoreError.from_json(before).settles(asked):
        return ScoreError.from_json(before)
    usable = np.isfinite(angles)
    count = how_many(asked, int(usable.sum()), ONE_IN // 2)
    cells: dict[tuple[int, ...], bool] = {}  # (step, layer, head), and whether it was drawn
    if chosen:
        named = [(step, *head) for step, head in enumerate(chosen)] * bool(count)
    else:
        named = [(0, each.layer, each.head) for each in ranked(angles[0], _named_first(count))]
    for cell in named:
        usable[cell] = False
        cells[cell] = False
    # A search always has its own heads in it, and says nothing of others without some of these.
    cells |= dict.fromkeys(drawn(usable, min(asked, max(LEAST - 1, count - len(named)))), True)
    groups = [(*chosen[:step], (layer, head)) for step, layer, head in cells]
    found, against, why = None, "", NOT_ASKED
    if groups:
        found, against, why = again(prepared, lambda one: _angles(one, groups, rank))
    sample, expected = [], {} if found is None else dict(zip(cells, found, strict=True))
    for (step, layer, head), other in expected.items():
        score = angles[step, layer, head]
        if step:
            last = (step - 1, *chosen[step - 1])
            score, other = score - angles[last], other - expected[last]
        where = (None, step) if chosen else ()
        sample.append(Rescored(layer, head, float(score), float(other), cells[step, layer, head], *where))
    return _error(prepared, sample, against, why, packing, ())


def _angles(prepared: Prepared, groups: Sequence[Sequence[Head]], rank: int) -> np.ndarray:
    """float64 [groups], degrees, of all prompts, by plain passes of the model of `prepared`."""
    rows = [ablated_hidden(prepared, prompt, groups) for prompt in range(len(prepared.token_ids))]
    *off, base = torch.stack(rows, 1)  # [groups + 1, P, hidden]
    basis = leading_subspace(base[None], rank)[0]
    return subspace_angle_deg(basis, torch.stack(off)).cpu().numpy()


def _scores(work, prepared: Prepared, cells: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[float]]:
    """By (read, layer, head): of every metric, by plain passes of the model of `prepared`."""
    by_read: dict[int, list[Head]] = {}
    for read, layer, head in cells:
        by_read.setdefault(read, []).append((layer, head))
    found = {}
    for read, units in by_read.items():
        outputs = ablated_outputs(prepared, read, units)
        for number, unit in enumerate(units):
            pairs = [(m.metric, outputs[m.metric.layer]) for m in work.measures]
            found[read, *unit] = [work.one(metric, read, out[-1], out[number]) for metric, out in pairs]
    return found
