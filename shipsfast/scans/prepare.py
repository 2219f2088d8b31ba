"""What every kind of scan does before its first row: check the input, look at the model, choose how to run, plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from transformers import PreTrainedModel

from ..engine.ablation import Ablation, passes_of
from ..engine.alignment import pair_ids, unpair
from ..engine.ends_batch import EndsBatch
from ..engine.growing_batch import GrowingBatch
from ..engine.head_mask import HeadMask
from ..engine.heads import Head, rows_of, unit_heads, way_of
from ..engine.measurement import ScanExecution
from ..engine.memory_plan import Held, Plan, make_plan
from ..engine.replacement_values import mean_outputs, resample_outputs
from ..engine.sequences import Sequences
from ..engine.subject import ABREAST, Subject, Texts, about_ablation, goes_abreast, layer_path, look_at
from ..engine.work_plan import Work, cut_by_work
from ..errors import note
from ..memory import OutOfMemory, out_of_memory
from ..models.anatomy import Anatomy
from ..models.output_head import head_precision
from ..ops.prefix_tree import PackedPrompts, pack
from ..ops.tree_attention import resolve_backend
from ..runs.folder import RunFolder
from .measurements import ReadOut, ScanMeasurement
from .scan_bar import ScanBar


@dataclass
class Prepared(Subject):
    """A scan that is ready to run.

    units: what is switched off together, (layer, index) pairs in ascending order: query heads, or key/value groups;
    plan: may become smaller, or another run's: see `continue_plan`; its groups are of sequences, as they are packed;
    execution: what the caller asked for; rows: the units, of several ablations once for each; read_out: what
    scores are made of.
    others: those of further ablations whose rows go through the same batches; first: of several ablations the first one's, None
    for that itself; numbers: the places of `self` and of `others` among all ablations; of_all: where it is of some of a run's prompts
    only (`part_of`), their numbers in the run.
    """

    units: list[Head]
    plan: Plan
    execution: ScanExecution
    sequences: Sequences
    read_out: ReadOut
    rows: list[Head]
    numbers: list[int]
    first: Prepared | None = None
    others: list[Prepared] = field(default_factory=list)
    of_all: list[int] | None = None
    _tokens: object = None  # of the numbers in the sequences, for resample
    _mean: list[torch.Tensor] | None = None

    def pack(self, group: Sequence[int]) -> tuple[PackedPrompts, list[torch.Tensor] | None]:
        """A group of sequences as one pack, with the vectors that replace heads' outputs, if any do."""
        tree = self.plan.needs.held.pack(self.sequences.ids, group)
        for other in self.others:
            other._mean_values()  # now, as it runs the model
        if self.how.kind == "resample":
            own = unpair(tree, self._tokens)
            return own, self._resampled(own, [self.sequences.prompt[i] for i in group])
        return tree, self._mean_values()

    def dense_values(self, read: int) -> list[torch.Tensor] | None:
        """The same vectors for one read on its own."""
        if self.how.kind == "resample":
            return self._resampled(pack([self.read_ids[read]]), [self.read_places[read][0]])
        return self._mean_values()

    @functools.cached_property
    def read_places(self) -> list[tuple[int, int]]:
        """Prompt and position of each of the M reads, prompt by prompt."""
        if self.places is None:
            return [(i, len(ids) - 1) for i, ids in enumerate(self.token_ids)]
        return [(i, place) for i, own in enumerate(self.places) for place in own]

    @functools.cached_property
    def read_ids(self) -> list[list[int]]:
        """The tokens up to each read, which is their last."""
        return [self.token_ids[prompt][: place + 1] for prompt, place in self.read_places]

    @functools.cached_property
    def read_targets(self) -> list[int] | None:
        """The answer's token that follows each read."""
        return None if self.targets is None else [token for own in self.targets for token in own]

    def read_name(self, read: int) -> str:
        """For messages."""
        prompt, place = self.read_places[read]
        name = f"prompt {self.prompt_number(read)}"
        if self.targets is not None:
            return f"{name}, token {place - self.places[prompt][0]} of its answer"
        return name + ("" if self.places is None else f" at position {place}")

    def prompt_number(self, read: int) -> int:
        """In the run."""
        prompt, _ = self.read_places[read]
        return prompt if self.of_all is None else self.of_all[prompt]

    def _resampled(self, tree: PackedPrompts, group: Sequence[int]) -> list[torch.Tensor]:
        own, others = ([ids[i] for i in group] for ids in (self.token_ids, self.other_ids))
        return resample_outputs(self.model, self.anatomy, tree, own, others, self.how.align, self.backend)

    def _mean_values(self) -> list[torch.Tensor] | None:
        if self.how.kind == "mean" and self._mean is None:
            self._mean = mean_outputs(self.model, self.anatomy, self.other_ids, self.backend)
        return self._mean

    def share_means(self, other: Prepared) -> None:
        """For ablation `mean`: the means of the other's prompts replace outputs here too."""
        self._mean = other._mean_values()

    def heads(self, units: Iterable[Head]) -> tuple[Head, ...]:
        """The query heads of these units."""
        return tuple(head for each in units for head in unit_heads(each, self.unit, self.anatomy))

    def mask(self, units: Sequence[Head], values, parent: Sequence[Head] = ()) -> HeadMask:
        """Row 0 with the units `parent` off, and one row more for each of `units` with it off as well, by the ablation of the
        row (heads.py) if there are several."""
        base = self.heads(parent)
        groups = (base, *(base + self.heads([each]) for each in units))
        if not self.others or not units:
            return HeadMask(groups, self.how, values)
        others = tuple((other.how, other._mean_values()) for other in self.others)
        return HeadMask(groups, self.how, values, others, (0, *map(way_of, units)))

    def _identity(self) -> dict:
        if self.first is not None:
            return self.first.identity | {"ablation": self._ablation_identity()}
        shape = [len(self.token_ids), self.anatomy.num_layers, self.num_units]
        every = len(self.units) == shape[1] * shape[2]
        heads = "all" if every else [list(unit) for unit in self.units]
        return super()._identity() | {"heads": heads, "shape": shape} | self.measurement.identity()

    @property
    def grid(self) -> tuple[int, int]:
        """Layers, and units of a layer."""
        return self.anatomy.num_layers, self.num_units

    def growing_batch(self, packed: PackedPrompts, tick: Callable[[int], None] | None = None) -> GrowingBatch:
        after, logits = self.read_out
        batch = EndsBatch if self.ends_alone else GrowingBatch
        return batch(self, packed, self.plan, tick=tick, after=after, logits=logits)

    @functools.cached_property
    def depth(self) -> int:
        """Layers with heads that rows pass: all, or those that what is read depends on."""
        return self.read_out.depth(self.anatomy)

    def counting(self, units: Iterable[Head]) -> list[Head]:
        """Those of `units` that can matter to what is read: others stand in later layers."""
        return [unit for unit in units if unit[0] < self.depth]

    def continue_plan(self, folder: RunFolder, name: str = "plan") -> None:
        """Cut what is left of an unfinished run as the run was cut: its scores then end bit for bit as they would have.

        Unless the caller asks for another cut now, or less memory is free than the plan needs. name: of the plan in run.json.
        """
        self.continue_with(folder.previous.get(name), folder)

    def continue_with(self, before: dict | None, folder: RunFolder) -> None:
        """The same, with a plan that the run has kept."""
        if not before or folder.previous.get("plan_asked") != self.execution.asked():
            return
        plan = Plan.from_json(before, self.sequences.ids, self.plan.needs)
        if plan.predicted_bytes <= self.plan.memory_limit_bytes:
            self.plan = plan
        elif replace(plan, memory_limit_bytes=0, predicted_bytes=0) != replace(
            self.plan, memory_limit_bytes=0, predicted_bytes=0
        ):
            note(
                f"{folder.path} was begun with more memory than is free now: it goes on in smaller blocks, and scores "
                "may differ in rounding from those of a run that was never interrupted"
            )

    def blocks(self, units: Sequence[Head], missing: Iterable[Head]) -> list[Sequence[Head]]:
        """`units` cut into blocks as planned, without those that have nothing missing. A block is always the same
        rows, however much of it is known: matrix products of other sizes would round otherwise."""
        missing = set(missing)
        some = self.counting(units)
        blocks = self.plan.blocks(some) if some else []
        return [block for block in (*blocks, units[len(some) :]) if not missing.isdisjoint(block)]

    def layer_passes(self, units: Sequence[Head], missing: Iterable[Head], groups: int = 1) -> int:
        """How many (row, layer) steps it takes to scan what is missing of `units`: the unit of progress."""
        return groups * sum(map(self.steps_of, self.blocks(units, missing)))

    def steps_of(self, block: Sequence[Head]) -> int:
        """(row, layer) steps of a block."""
        some = self.counting(block)
        return bool(some) * self.depth + sum(self.depth - layer for layer, _ in some)


def prepare(
    model: PreTrainedModel, tokenizer, measurement: ScanMeasurement, execution: ScanExecution
) -> Prepared:
    """For one ablation. Raises InputError or UnsupportedModelError, as `scan` does."""
    (prepared,) = prepare_passes(model, tokenizer, measurement, execution)
    return prepared


def prepare_passes(
    model: PreTrainedModel, tokenizer, measurement: ScanMeasurement, execution: ScanExecution
) -> list[Prepared]:
    """One for each group of ablations that go through together, with the others of the group in it."""
    subject = look_at(model, tokenizer, measurement, execution)
    subject.record |= {"plan_asked": execution.asked(), "head_precision": head_precision(subject.model)}
    read_out = measurement.read_out()
    if not read_out.logits:
        subject.record["passes_end"] = (
            f"behind decoder layer {max(read_out.after)} of {len(subject.anatomy.blocks)}, counted from 0: no metric is of "
            "anything later"
        )
    record = {
        k: x
        for k, x in subject.record.items()
        if k not in about_ablation(subject.how, subject.anatomy, subject.backend)
    }
    each, other_ids = measurement.each(), [subject.other_ids, *subject.further_ids]
    found: list[Prepared] = []
    for numbers in passes_of([one.ablation for one in each]):
        lead, *others = (
            {
                "measurement": each[at],
                "other_ids": other_ids[at],
                "record": record
                | about_ablation(each[at].ablation, subject.anatomy, subject.backend)
                | ({"packs": ABREAST} if goes_abreast(each[at].ablation, subject.anatomy) else {}),
            }
            for at in numbers
        )
        prepared = _prepared(replace(subject, further_ids=[], **lead), numbers, execution)
        prepared.first = found[0] if found else None
        first = prepared.first or prepared
        prepared.others = [replace(prepared, others=[], first=first, **other) for other in others]
        found.append(prepared)
    return found


def part_of(prepared: Prepared, prompts: Sequence[int], units: Sequence[Head]) -> Prepared:
    """The same scan of some of its prompts, by their numbers, and of some of its units, which has a plan of its own."""
    if list(prompts) == list(range(len(prepared.token_ids))) and list(units) == prepared.units:
        return prepared

    def some(each: list | None) -> list | None:
        return None if each is None else [each[prompt] for prompt in prompts]

    others = some(prepared.other_ids) if prepared.how.kind == "resample" else prepared.other_ids
    own = replace(
        prepared, token_ids=some(prepared.token_ids), other_ids=others, places=some(prepared.places), targets=some(prepared.targets),
    )  # fmt: skip
    found = _prepared(own, prepared.numbers, prepared.execution, list(units))
    found.of_all = list(prompts)
    found.share_means(prepared)
    return found


def in_dtype_of(prepared: Prepared, model: PreTrainedModel, anatomy: Anatomy, copy_bytes: int) -> Prepared:
    """The same scan of a copy of its model in another dtype, of so many bytes, which passes as suits that."""
    backend = resolve_backend(
        "auto", prepared.device, model.dtype, one_head_size=anatomy.head_dim == anatomy.value_dim
    )
    layers, _ = layer_path("auto", model, anatomy, prepared.device, backend, prepared.how)
    execution, limit = prepared.execution, prepared.execution.max_memory
    if limit is not None:  # which the copy is a part of
        execution = replace(execution, max_memory=max(1, limit - copy_bytes))
    own = replace(prepared, model=model, anatomy=anatomy, backend=backend, layers=layers, _mean=None)
    return _prepared(own, prepared.numbers, execution, prepared.units)


def _prepared(
    subject: Subject, numbers: list[int], execution: ScanExecution, units: list[Head] | None = None
) -> Prepared:
    """With a plan for the rows of so many ablations. units: default those of the measurement."""
    model, anatomy, measurement = subject.model, subject.anatomy, subject.measurement
    if units is None:
        units = measurement.units(anatomy)
    rows = rows_of(units, len(numbers))
    sequences, tokens, held = laid_out(
        subject, subject.how, anatomy, subject.backend, subject.held(len(numbers))
    )
    read_out = measurement.read_out()
    work = work_of(model, anatomy, measurement, subject.device, fused=subject.fused)
    _, plan = planned(anatomy, sequences.ids, rows, execution, held, work, read_out)
    return Prepared(
        **{f.name: getattr(subject, f.name) for f in fields(Subject)}, units=units, plan=plan, execution=execution,
        sequences=sequences, read_out=read_out, rows=rows, numbers=numbers, _tokens=tokens,
    )  # fmt: skip


def laid_out(
    texts: Subject | Texts, how: Ablation, anatomy: Anatomy, backend: str, held: Held
) -> tuple[Sequences, object, Held]:
    """What is packed, of which tokens its numbers are (for `resample`), and what of that the memory plan must know.

    texts: the prompts as token ids; backend: of attention, resolved.
    """
    ids, tokens = texts.token_ids, None
    if how.kind == "resample":
        ids, tokens = pair_ids(ids, texts.other_ids, how.align)
    ends_alone = how.at == "end" and anatomy.ends_alone
    each_alone = anatomy.looks_at_end or (how.at == "end" and not ends_alone)
    sequences = Sequences.of(ids, texts.places, each_alone=each_alone)
    gathers, abreast = backend != "cpp", goes_abreast(how, anatomy)
    return (
        sequences,
        tokens,
        replace(held, reads=sequences.places, ends_alone=ends_alone, gathers=gathers, abreast=abreast),
    )


def work_of(model, anatomy: Anatomy, measurement: ScanMeasurement, device: torch.device, **how) -> Work:
    """What a scan's arithmetic costs. how: as in `Work.of`."""
    work, read_out = Work.of(model, anatomy, measurement, device, **how), measurement.read_out()
    return work if read_out.logits else replace(work, costs=work.costs.up_to(max(1, read_out.depth(anatomy))))


def planned(
    anatomy: Anatomy,
    tree_ids: Sequence[Sequence[int]],
    units: Sequence[Head],
    execution: ScanExecution,
    held: Held,
    work: Work,
    read_out: ReadOut,
) -> tuple[Plan, Plan]:
    """How a scan is cut: by memory, and then by work too. Units in layers behind what is read take neither."""
    depth = read_out.depth(anatomy)
    some = [unit for unit in units if unit[0] < depth]
    fit = make_plan(anatomy, tree_ids, max(1, len(some)), execution, replace(held, depth=depth))
    return fit, cut_by_work(fit, tree_ids, some, execution, work) if some else fit


def run_blocks(
    prepared: Prepared,
    units: Sequence[Head],
    missing: Callable[[], list[Head]],
    run: Callable[[Sequence[Head]], None],
    bar: ScanBar,
    passes: int = 1,
) -> None:
    """Run what is missing of `units`, block by block; after running out of memory, with a smaller plan.

    missing: the units still to be done; run: does a block, and keeps what was missing of it; bar: the progress bar,
    which goes back; passes: over the layers that a block takes. Raises OutOfMemory when there is no smaller plan.
    """
    while blocks := prepared.blocks(units, missing()):
        done = bar.n
        with out_of_memory() as found:
            for block in blocks:
                done = bar.n
                bar.begin(passes * prepared.steps_of(block))
                run(block)
        if not found:
            continue
        bar.update(done - bar.n)
        smaller = prepared.plan.smaller()
        if smaller is None:
            raise OutOfMemory(
                "out of memory even with the smallest plan: free some, or shorten the longest prompt"
            ) from found[0]
        prepared.plan = smaller


def run_by_prompts(
    prepared: Prepared,
    units: Sequence[Head],
    missing: Callable[[tuple[int, ...]], list[Head]],
    run: Callable[[Sequence[Head], tuple[int, ...]], None],
    bar: ScanBar,
) -> None:
    """`run_blocks` for one group of prompts after the other; where even one ablation is too much for the memory, for half of
    its prompts at a time.

    missing(together), run(block, together): as in `run_blocks`, of the prompts packed together.
    """
    left = list(prepared.plan.prompt_groups)
    while left:
        together, plan = left.pop(0), prepared.plan
        try:
            run_blocks(
                prepared,
                units,
                lambda together=together: missing(together),
                lambda block, together=together: run(block, together),
                bar,
            )
        except OutOfMemory:
            if len(together) == 1:
                raise
            left[:0] = [together[: len(together) // 2], together[len(together) // 2 :]]
            prepared.plan = plan  # half the prompts: try blocks and chunks as large as before
