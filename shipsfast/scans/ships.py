"""Ships of every attention head: how far the next-token distribution moves when the head is off (eq. 9)."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.heads import Head
from ..engine.measurement import ScanExecution, called_with
from ..errors import InputError, UnsupportedModelError, note
from ..memory import once_more
from ..models.forward import alarm
from ..models.restore import untouched
from ..results.score_error import Rescored
from ..results.ships import MARKED, ShipsResult
from .control import of_the_control, prepare_control
from .measurements import ShipsMeasurement
from .metrics import Metric, measure_rows
from .nonfinite import check_base_logits, explain, reason
from .prepare import Prepared, prepare, run_by_prompts
from .rescoring import rescore
from .scan_bar import ScanBar
from .score_store import Measure, finished, measures_of
from .self_check import ablated_logits, longest_prompt, own_layers_hint, packing_noise_nats, plain_logits


@called_with(ShipsMeasurement, ScanExecution)
@untouched
def scan(
    model: PreTrainedModel, tokenizer, measurement: ShipsMeasurement, execution: ScanExecution
) -> ShipsResult:
    """Switch off every head, one at a time, and measure how far the next-token distribution moves.

    Ships of arXiv 2410.13708, eq. 9: for each prompt and head KL(p(base) || p(ablated)) in nats, over the
    full vocabulary, of the token that follows the prompt, or of every token of an answer that is given. All heads are measured in one growing batch
    (engine/growing_batch.py); the scores are those of one forward pass per head and prompt, up to rounding.

    Returns:
        ShipsResult with .scores (.kl) float64 [P, L, H], NaN for heads not in `heads` and for marked scores; with answers, or
        several positions of a prompt, means of .by_token; with `control`, .control is that of the control prompts.
    Raises:
        InputError: bad prompts, heads, ablation, metric, backend or folder.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    prepared = prepare(model, tokenizer, measurement, execution)
    return _scan(prepared, tokenizer, prepare_control(prepared, tokenizer), "scan", started)


def _scan(prepared: Prepared, tokenizer, control: Prepared | None, name: str, started: float) -> ShipsResult:
    """control: the scan of the control prompts, which is a part of this one; name: of the progress bar."""
    execution = prepared.execution
    measures = measures_of(prepared, tokenizer, control)
    main = measures[0]
    if main.folder is not None:
        found = finished(measures)
        if found is not None:
            return replace(found, control=_scan_control(control, tokenizer))
        for measure in measures:  # before any says that it goes on
            measure.take()
        prepared.continue_plan(main.folder)
        for measure in measures:
            measure.begin()
        known = int((~main.missing()).sum())
        if known and execution.progress:
            of = len(prepared.read_ids) * len(prepared.units)
            note(f"{main.folder.path} has {known:,} of {of:,} scores, and goes on")
    work = _Work(prepared, measures, name)
    scan_started = time.perf_counter()
    try:
        work.run()
    finally:
        work.bar.close()
    scan_seconds = seconds_since(scan_started)
    _spot_check(work)
    rescore(work)
    del work
    of_control = _scan_control(control, tokenizer)
    for measure in measures:
        measure.record |= {"scan_seconds": scan_seconds, "plan": prepared.plan.to_json()}
        measure.record["seconds"] = seconds_since(started)
    # The first one's run folder is finished last: complete, it says that all are.
    also = {measure.metric.name: measure.result() for measure in measures[1:]}
    return replace(main.result(also), control=of_control)


def _scan_control(control: Prepared | None, tokenizer) -> ShipsResult | None:
    """Of a finished run, what it left."""
    if control is None:
        return None
    try:
        return _scan(control, tokenizer, None, "control", time.perf_counter())
    except InputError as error:
        raise of_the_control(error) from error


class _Work:
    """Fills in the scores that are missing, for some sequences at a time: those that are packed together.

    Scores are counted by reads: as a rule a prompt is one sequence and has one read.
    """

    def __init__(self, prepared: Prepared, measures: list[Measure], name: str) -> None:
        self.prepared, self.measures = prepared, measures
        steps = scores = 0
        for together in prepared.plan.prompt_groups:
            missing = self.missing(together)
            steps += prepared.layer_passes(prepared.units, missing)
            scores += len(missing) * len(prepared.sequences.reads(together))
        self.bar = ScanBar(name, steps, scores, prepared, prepared.execution)
        self._packed: tuple | None = None  # the sequences at hand, their pack, and values

    @property
    def sees_all_prompts(self) -> bool:
        return any(measure.metric.sees_all_prompts for measure in self.measures)

    def missing(self, together: Sequence[int]) -> list[Head]:
        """The units that some metric still wants."""
        rows = self.prepared.sequences.reads(together)
        return [
            u for u in self.prepared.units if any(m.missing()[rows, u[0], u[1]].any() for m in self.measures)
        ]

    def run(self) -> None:
        if self.sees_all_prompts and any(map(self.missing, self.prepared.plan.prompt_groups)):
            # Not in the midst of another pass.
            once_more("taking the unablated model's logits", lambda: self.all_base)
        run_by_prompts(self.prepared, self.prepared.units, self.missing, self._block, self.bar)

    def _block(self, block: list[Head], together: tuple[int, ...]) -> None:
        prepared = self.prepared
        if self._packed is None or self._packed[0] != together:
            self._packed = (together, *prepared.pack(together))
        _, packed, values = self._packed
        reads = prepared.sequences.reads(together)
        with prepared.growing_batch(packed, self.bar.update) as batch:
            found: list[list[torch.Tensor]] = []  # of every chunk, of every metric
            kept: list[torch.Tensor] = []
            place = torch.as_tensor(batch.prompt_place, device=prepared.device)

            def consume(rows: slice, logits: torch.Tensor, base: torch.Tensor) -> None:
                if not kept:
                    kept.append(base)
                found.append(self._score(logits, base, reads, place))

            batch.run(prepared.mask(block, values), consume)
        check_base_logits(prepared, reads, batch.prompt_place, kept[0])
        self._compare(reads, kept[0], batch.prompt_place)
        # [units, reads] of every metric.
        scores = [torch.cat(chunks)[1:].cpu().numpy() for chunks in zip(*found, strict=True)]
        for measure, each in zip(self.measures, scores, strict=True):
            self._check_numbers(measure, each, reads, block)
        for measure, each in zip(self.measures, scores, strict=True):
            measure.keep(each, reads, block)

    def _score(
        self, logits: torch.Tensor, base: torch.Tensor, reads: Sequence[int], place: torch.Tensor
    ) -> list[torch.Tensor]:
        """Scores float64 [rows, reads] of logits [rows, U, V], for every metric. place: where in U each read is."""
        rows, metrics = logits.shape[0], [measure.metric for measure in self.measures]
        index = torch.arange(base.shape[0], device=logits.device).repeat(rows)
        own = [metric for metric in metrics if not metric.sees_all_prompts and not metric.of_answers]
        read = iter(measure_rows(own, base, logits.flatten(0, 1), index))
        out = []
        for metric in metrics:
            if metric.sees_all_prompts:
                prompts = torch.as_tensor(reads, device=logits.device).repeat(rows)
                out.append(metric.rows(self.all_base, logits[:, place].flatten(0, 1), prompts).view(rows, -1))
            elif metric.of_answers:
                out.append(metric.tokens(base, logits, place, self._targets(reads, logits.device)))
            else:
                out.append(next(read).view(rows, -1)[:, place])
        return out

    def _targets(self, reads: Sequence[int], device: torch.device) -> torch.Tensor:
        """The answers' tokens at these reads."""
        return torch.tensor([self.prepared.read_targets[read] for read in reads], device=device)

    @functools.cached_property
    def all_base(self) -> torch.Tensor:
        """Next-token logits of the unablated model at every read, [M, V]: for metrics that see all of them."""
        out = None
        for together in self.prepared.plan.prompt_groups:
            packed, values = self.prepared.pack(together)
            with self.prepared.growing_batch(packed) as batch:
                kept: list[torch.Tensor] = []
                batch.run(
                    self.prepared.mask([], values), lambda _rows, _logits, base, kept=kept: kept.append(base)
                )
            if out is None:
                out = kept[0].new_empty(len(self.prepared.read_ids), kept[0].shape[-1])
            out[self.prepared.sequences.reads(together)] = kept[0][
                torch.as_tensor(batch.prompt_place, device=out.device)
            ]
        return out

    def _compare(self, reads: Sequence[int], base: torch.Tensor, place: np.ndarray) -> None:
        """Noise floors, once a scan: the packed against the plain unablated model on the longest of the reads."""
        if all(measure.compared for measure in self.measures):
            return
        prompt = longest_prompt(self.prepared, reads)
        packed = base[place[list(reads).index(prompt)]]
        plain = plain_logits(self.prepared, prompt, 1)[0].to(packed.device)
        nats = packing_noise_nats(self.prepared, prompt, plain, packed)
        for measure in self.measures:
            noise, metric = nats, measure.metric
            if metric.name != "kl":
                # A metric of the caller's own need not be 0 for equal logits.
                noise = abs(self.one(metric, prompt, plain, packed) - self.one(metric, prompt, plain, plain))
                if not np.isfinite(noise):
                    raise InputError(
                        f"metric {metric.name} is not finite for logits that differ by rounding only: it must be"
                    )
            measure.keep_noise(noise)

    def one(self, metric: Metric, prompt: int, base: torch.Tensor, other: torch.Tensor) -> float:
        """The metric of one pair of logits [V], at one read."""
        bases, at = base[None], 0
        if metric.of_answers:
            place = torch.zeros(1, dtype=torch.long, device=base.device)
            other = other.to(base.dtype)[None, None]
            return float(metric.tokens(bases, other, place, self._targets([prompt], base.device))[0, 0])
        if metric.sees_all_prompts:
            bases, at = self.all_base.to(base.device, base.dtype, copy=True), prompt
            bases[prompt] = base
        index = torch.full((1,), at, dtype=torch.long, device=base.device)
        return float(metric.rows(bases, other[None].to(base.dtype), index)[0])

    def _check_numbers(
        self, measure: Measure, scores: np.ndarray, reads: Sequence[int], block: list[Head]
    ) -> None:
        """Looks where a score that is not finite begins: the first of the scan where they are marked; else raises
        InputError, naming prompt, head and layer."""
        bad = np.argwhere(~np.isfinite(scores))
        if not len(bad) or (measure.mark and MARKED in measure.record):
            return
        prepared, name = self.prepared, measure.metric.name
        prompt, (layer, index) = reads[bad[0][1]], block[bad[0][0]]
        place, _ = explain(prepared, prompt, (layer, index))
        why = reason(place, name)
        if not measure.mark:
            value = "not a number" if np.isnan(scores[tuple(bad[0])]) else "infinite"
            raise InputError(
                f"the score of {prepared.unit} {layer}-{index} on {prepared.read_name(prompt)} is {value} with "
                f"{prepared.how.describe()}, metric {name}: {why}; use a smaller scale, a wider dtype or another metric, "
                "or leave such scores out with nonfinite='mark' (--nonfinite mark)"
            )
        first = {
            "prompt": prepared.read_places[prompt][0],
            "layer": int(layer),
            "head": int(index),
            "why": why,
        }
        measure.record[MARKED] = {"first": first | ({} if place is None else {"place": place.to_json()})}
        measure.keep_noise(measure.noise_floor)  # writes the record, before the first mark is


def _spot_check(work: _Work) -> None:
    """Recompute two heads on the longest prompt by plain forward passes; record each metric's larger difference.

    Raises UnsupportedModelError if one is off by more than rounding can explain.
    """
    prepared, main = work.prepared, work.measures[0]
    prompt = longest_prompt(prepared, range(len(prepared.read_ids)))
    units = [u for u in prepared.units if not any(m.marked[prompt, *u] for m in work.measures)]
    if not units:
        return
    strongest = max(units, key=lambda u: abs(main.scores[prompt, u[0], u[1]]))
    chosen = sorted({strongest, units[len(units) // 2]})
    what = "checking two scores by plain forward passes"
    *ablated, base = once_more(
        what,
        lambda: ablated_logits(prepared, prompt, chosen),
        lambda: _one_by_one(prepared, prompt, chosen),
    )
    for measure in work.measures:
        metric, scores = measure.metric, measure.scores
        absolute, relative = alarm(prepared.model)
        if metric.sees_all_prompts:  # a metric of the caller's own, of unknown size
            absolute *= max(1.0, float(np.nanmax(np.abs(scores[prompt]))))
        for (layer, index), logits in zip(chosen, ablated, strict=True):
            got = scores[prompt, layer, index]
            expected = once_more(what, functools.partial(work.one, metric, prompt, base, logits))
            error = 0.0 if got == expected else abs(expected - got)
            if not error <= absolute + relative * abs(expected):
                raise UnsupportedModelError(
                    f"the score of {prepared.unit} {layer}-{index} on {prepared.read_name(prompt)} is {got:.6g}, a plain forward "
                    f"pass gives {expected:.6g}: {type(prepared.model).__name__} cannot be scanned exactly"
                    f"{own_layers_hint(prepared)}"
                )
            drawn = (layer, index) != strongest or len(chosen) == 1
            measure.plain.append(
                Rescored(layer, index, float(got), expected, drawn, prepared.read_places[prompt][0])
            )
        measure.record["spot_check_max_abs"] = max(each.error for each in measure.plain)


def _one_by_one(prepared: Prepared, prompt: int, chosen: Sequence[Head]) -> list[torch.Tensor]:
    """What `ablated_logits` gives, in half the memory or less."""
    found = [ablated_logits(prepared, prompt, [unit]) for unit in chosen]
    return [*(logits[0] for logits in found), found[-1][-1]]
