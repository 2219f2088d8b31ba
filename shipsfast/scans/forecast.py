"""What a scan would take: the plan, its memory and its time, from the model's config and the prompts. Nothing is run.

time    FLOPs of all passes (engine/flops.py) / the rate of matrix products, measured several times in about a second: at the
        best of them, and at their median; of a streamed pass the larger of that and reading the layers; what lies between the
        products is not counted
memory  the model's weights + prompts' ends + the larger of rows with a layer at work and the head + what is kept
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..clock import in_words
from ..engine.ablation import passes_of
from ..engine.flops import scan_flops
from ..engine.heads import Head, rows_of
from ..engine.measurement import ScanExecution
from ..engine.memory_plan import Held, Plan, block_parts, free_bytes, peak_bytes
from ..engine.subject import Texts, held_beside, layer_path, products_of, tokens_of
from ..engine.work_plan import PART_SECONDS, Work
from ..errors import InputError
from ..models.anatomy import Anatomy, inspect_model
from ..models.attention_hook import LONG
from ..models.loading import as_device, first_line
from ..models.wider import WIDER, copy_bytes
from ..ops.prefix_tree import pack
from ..ops.tree_attention import BACKENDS, resolve_backend
from ..results.direction import check_layer
from ..text import counted
from .control import of_the_control
from .measurements import SaharaMeasurement, ScanMeasurement, SubspaceMeasurement
from .metrics import as_metrics
from .prepare import laid_out, planned, work_of
from .rates import Rates, measure_rates
from .top_measurement import TopMeasurement

COMMANDS = {"ships": "scan", "top": "top", "subspace": "scan-dataset", "sahara": "sahara"}
OF_A_SEARCH = (
    "search: this is the complete scan, the most that exact scores can take; a screening copy of the model, and its passes, come on top, "
    "and what both leave out is not known before"
)
READ_BYTES = 256 << 20  # of a checkpoint are read to see how fast it can be
# Rows of the longest prompt that pass the model as it is: one for the noise floor, three for the spot check.
CHECK_ROWS = 4


@dataclass(frozen=True)
class Forecast:
    """A scan that has not been run.

    memory: bytes by part ("model", "ends", "rows", "chunk", "head", "kept"), of which rows with chunk and head take turns; passes: over the
    layers, checks included; blocks: of heads, for each group of prompts; flops_per_s, read_bytes_per_s: rates measured now
    (of `rates` the median), None where they cannot be, or nothing is streamed; seconds, best_seconds: at the median and at the
    best rate, None where a rate is wanting; plan, blocks and memory are those of the pass that takes most, where several ablations take
    more than one; limits: why it is not one block; copy_bytes: of the wider copy that scores are
    held against after the scan, if so much is free then, 0 where none is made.
    """

    kind: str
    model: dict
    device: str
    dtype: str
    stream: bool
    prompts: int
    tokens: int  # of the longest pack
    units: int
    plan: Plan
    memory: dict[str, int]
    passes: int
    checks: int  # of the passes
    flops: float
    flops_per_s: float | None
    read_bytes_per_s: float | None
    seconds: float | None
    limits: list[str]
    blocks: int
    rates: Rates | None
    best_seconds: float | None
    copy_bytes: int
    ablations: int = 1
    control: Forecast | None = None  # of the control prompts, which are scanned as well

    @property
    def total_bytes(self) -> int:
        return self.memory["model"] + peak_bytes(self.memory) + self.memory["kept"]

    def to_json(self) -> dict:
        rates = self.rates and vars(self.rates)
        control = self.control and self.control.to_json()
        more = {"total_bytes": self.total_bytes, "rates": rates, "control": control}
        return vars(self) | {"plan": self.plan.to_json()} | more

    def render(self) -> str:
        plan, parts, of = self.plan, self.memory, self.model
        groups, blocks = len(plan.prompt_groups), self.blocks
        several = f" x {self.ablations} ablations" if self.ablations > 1 else ""
        how = "streamed" if self.stream else "in memory"
        if self.seconds is not None:
            first, second = in_words(self.best_seconds), in_words(self.seconds)
            seconds = first if first == second else f"{first} to {second}"
        elif self.flops_per_s:
            seconds = "not predicted here: there are no weights to see how fast they are read"
        else:
            seconds = f"not predicted here: there is no {self.device} to measure the rate of"
        rate = "" if self.rates is None else f" at {_in_words(self.rates)}"
        if self.read_bytes_per_s:
            rate += f"; layers read at {self.read_bytes_per_s / 1e9:.1f} GB/s, measured now"
        lines = [
            f"{self.kind} of {of['name']} ({of['class']}, {self.dtype}, {how}, {self.device}), nothing was run",
            (
                f"work    {self.units:,} {of['unit']}s of {of['layers']} layers{several}, {self.prompts:,} prompts, longest pack "
                f"{self.tokens:,} tokens; {self.flops:.3g} FLOPs"
            ),
            (
                f"plan    {counted(groups, 'group')} of prompts x {counted(blocks, 'block')} of at most "
                f"{plan.rows_per_block:,} {'rows' if several else of['unit'] + 's'}; {plan.chunk_tokens:,} tokens pass a layer at a time"
            ),
            f"passes  {self.passes:,} over the layers, {self.checks} of them checks",
            (
                f"memory  {_gib(self.total_bytes)} = model {_gib(parts['model'])} + prompts' ends {_gib(parts['ends'])} + the "
                f"larger of rows {_gib(parts['rows'])} with a layer at work {_gib(parts['chunk'])} and the head "
                f"{_gib(parts['head'])} + kept {_gib(parts['kept'])}; "
                f"{_gib(plan.memory_limit_bytes)} may be used beyond the model"
            ),
            *(
                [
                    f"error   afterwards a wider copy of the model, {_gib(self.copy_bytes)}, if so much may be used then"
                ]
                * bool(self.copy_bytes)
            ),
            f"time    {seconds}{rate}",
            *(f"busy    {warning}" for warning in [self.rates and self.rates.warning] if warning),
            *(f"limit   {limit}" for limit in self.limits),
            *([] if self.control is None else ["", "and then the control prompts:", self.control.render()]),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Elsewhere:
    """Where a scan would run, which need not be here. stream: layers read from the checkpoint; device_memory: bytes that
    the device has in all, default what is free on it."""

    device: str | torch.device | None = None
    device_memory: int | None = None
    stream: bool = False


def forecast(
    model: PreTrainedModel,
    tokenizer,
    measurement: ScanMeasurement,
    execution: ScanExecution,
    where: Elsewhere,
) -> Forecast:
    """What a scan of `model`, with or without weights, would take.

    Raises InputError or UnsupportedModelError as the scan would, and where the model does not fit.
    """
    if isinstance(measurement, SaharaMeasurement) and measurement.control is not None:
        raise InputError(
            "--plan does not count control prompts: leave --control and --penalty away; with them every step is a scan of "
            "these prompts as well"
        )
    found = _forecast(model, tokenizer, measurement, execution, where)
    if getattr(measurement, "control", None) is None:
        return found
    try:
        control = _forecast(model, tokenizer, measurement.of_control(), execution, where)
    except InputError as error:
        raise of_the_control(error) from error
    return replace(found, control=control)


def _forecast(
    model: PreTrainedModel,
    tokenizer,
    measurement: ScanMeasurement,
    execution: ScanExecution,
    where: Elsewhere,
) -> Forecast:
    texts, each = tokens_of(measurement, model, tokenizer, weights=False), measurement.each()
    further = [tokens_of(one, model, tokenizer, weights=False, said=True).other_ids for one in each[1:]]
    token_ids, others = texts.token_ids, [texts.other_ids, *further]
    longest = max(len(ids) for some in (token_ids, *others) for ids in some or [])
    anatomy = inspect_model(model, max(token_ids, key=len), longest)
    stream, device = where.stream, as_device(where.device)
    here = device.type == "cpu" or torch.cuda.is_available()
    units = measurement.units(anatomy)
    backend = execution.backend
    attention = "triton" if backend == "auto" else backend  # of a device elsewhere, if it has what it needs
    if here or backend not in BACKENDS:  # what a device elsewhere can run is not known here
        alike = anatomy.head_dim == anatomy.value_dim
        attention = resolve_backend(backend, device, model.dtype, one_head_size=alike)
    if isinstance(measurement, SubspaceMeasurement):
        measurement.check(len(token_ids), len(units), anatomy.hidden_size)
    else:
        metrics = as_metrics(measurement.metric, tokenizer, anatomy.vocab_size)
        for metric in metrics:
            if metric.layer is not None:
                check_layer(metric.layer, len(anatomy.blocks))
    held = _model_bytes(model, anatomy, stream)
    limit = _limit(execution.max_memory, where.device_memory, held, device, here)
    layers, _ = layer_path(execution.layers, model, anatomy, device, attention, measurement.ablation)
    products = products_of(model, attention, layers)
    limited = replace(execution, max_memory=limit)
    steps, beam = getattr(measurement, "group_size", 1), getattr(measurement, "beam", 1)
    work = work_of(model, anatomy, measurement, device, fused=layers != "model", stream=stream)
    costs, rounds = work.costs, 1 + (steps - 1) * beam
    found = [
        _pass(
            replace(texts, other_ids=others[numbers[0]]), each[numbers[0]], rows_of(units, len(numbers)), limited, work,
            held_beside(model, anatomy, each[numbers[0]], device, attention, layers, len(numbers)), anatomy, attention,
        )
        for numbers in passes_of([one.ablation for one in each])
    ]  # fmt: skip
    flops = rounds * sum(one.flops for one in found)
    flops += CHECK_ROWS * len(each) * scan_flops(costs, [pack([max(token_ids, key=len)])], [])
    checks = _check_passes(longest) * len(each)
    passes = rounds * sum(one.passes for one in found) + checks
    largest = max(found, key=lambda one: peak_bytes(one.memory) + one.memory["kept"])
    plan, tokens = largest.plan, max(one.tokens for one in found)
    rates = measure_rates(costs.products, max(plan.chunk_tokens, tokens), products, device) if here else None
    took = functools.partial(_seconds, flops, layer_bytes=_layer_bytes(anatomy), passes=passes, checks=checks)
    reading = _read_rate(model.config._name_or_path) if stream else None
    return Forecast(
        kind=COMMANDS[measurement.kind],
        model={
            "name": model.config._name_or_path or type(model).__name__, "class": type(model).__name__, "unit": measurement.unit,
            "layers": anatomy.num_layers, "heads": anatomy.num_heads,
        },
        device=str(device), dtype=str(model.dtype).removeprefix("torch."), stream=stream, prompts=len(token_ids),
        tokens=tokens, units=len(units), ablations=len(each), plan=plan, memory={"model": held, **largest.memory},
        passes=passes, checks=checks, flops=flops,
        flops_per_s=rates and rates.median,
        read_bytes_per_s=reading,
        seconds=took(rates and rates.median, reading=reading, stream=stream),
        best_seconds=took(rates and rates.best, reading=reading, stream=stream),
        blocks=largest.blocks, rates=rates,
        copy_bytes=0 if stream or not execution.rescored or model.dtype not in WIDER else copy_bytes(model),
        limits=_limits(plan, largest.fit, largest.rows, len(token_ids), largest.passes, device)
        + [OF_A_SEARCH] * isinstance(measurement, TopMeasurement),
    )  # fmt: skip


@dataclass(frozen=True)
class _Pass:
    """Of the ablations that go through together. fit: the plan before it was cut by work; blocks: of one group of prompts;
    passes: over the layers."""

    plan: Plan
    fit: Plan
    rows: int
    tokens: int
    blocks: int
    passes: int
    flops: int
    memory: dict[str, int]


def _pass(
    texts: Texts,
    measurement: ScanMeasurement,
    units: Sequence[Head],
    execution: ScanExecution,
    work: Work,
    beside: Held,
    anatomy: Anatomy,
    backend: str,
) -> _Pass:
    """units: the rows of all ablations; execution: with the memory that there is; backend: of attention."""
    sequences, _, beside = laid_out(texts, measurement.ablation, anatomy, backend, beside)
    tree_ids = sequences.ids
    read_out = measurement.read_out()
    fit, plan = planned(anatomy, tree_ids, units, execution, beside, work, read_out)
    some = [unit for unit in units if unit[0] < read_out.depth(anatomy)]
    packs = [beside.pack(tree_ids, group) for group in plan.prompt_groups]
    tokens, ends = max(p.num_tokens for p in packs), max(len(set(p.read_index.tolist())) for p in packs)
    rows = plan.rows_per_block + 1
    # The plan's room for the head is a bound; no more pairs than there are go through.
    pairs = min(plan.head_rows, rows * ends)
    parts = block_parts(
        anatomy, rows + beside.extra_rows, tokens, ends, plan.chunk_tokens, pairs, beside.dtype.itemsize, beside.row_size,
        beside.ends_alone, plan.needs.longest,
    )  # fmt: skip
    kept = rows * beside.per_row_bytes + tokens * beside.per_token_bytes + beside.bytes
    cut = plan.blocks(some)
    flops = scan_flops(work.costs, packs, some, blocks=cut, ends_alone=beside.ends_alone) if some else 0
    return _Pass(plan, fit, len(some), tokens, len(cut), len(packs) * len(cut), flops, parts | {"kept": kept})


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _layer_bytes(anatomy: Anatomy) -> list[int]:
    return [_bytes(layer.module) for layer in anatomy.layers]


def _model_bytes(model: PreTrainedModel, anatomy: Anatomy, stream: bool) -> int:
    """Of weights held at a time: all, or what is outside the layers and two of them."""
    layers = _layer_bytes(anatomy)
    return _bytes(model) - (sum(layers) - 2 * max(layers)) * stream


def _limit(
    max_memory: int | None, device_memory: int | None, held: int, where: torch.device, here: bool
) -> int:
    """Bytes that may be used beyond the model."""
    if max_memory is not None:
        return max_memory
    if device_memory is None and not here:
        raise InputError(
            f"there is no {where.type} here to ask for its memory: say how much it has, --device-memory 80GiB"
        )
    whole = free_bytes(where) if device_memory is None else int(0.9 * device_memory)
    if held >= whole:
        raise InputError(
            f"the model's weights take {_gib(held)}, and {_gib(whole)} may be used on {where}: use --stream, a smaller "
            "--dtype or another device"
        )
    return whole - held


def _read_rate(folder: str) -> float | None:
    """Bytes a second at which the first layers of a checkpoint can be read here, None if there are no weights."""
    into = bytearray(16 << 20)  # as models/layer_bytes.py reads: into memory in use
    done, began = 0, time.perf_counter()
    for file in sorted(Path(folder).glob("*.safetensors")) if folder else []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"cannot read the weights in {file}: {first_line(error)}") from error
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(into):
                done += count
                if done > READ_BYTES:
                    return done / (time.perf_counter() - began)
    return done / (time.perf_counter() - began) if done else None


def _check_passes(longest: int) -> int:
    """The first look at the model, the unablated model, and three rows of the longest prompt: together, or one by one."""
    return 3 if longest < LONG else 5


def _in_words(rates: Rates) -> str:
    best, median = (f"{rate / 1e9:,.0f}" for rate in (rates.best, rates.median))
    return f"{best} GFLOP/s, the best of {rates.count} short measurements now, to {median}, their median"


def _seconds(
    flops, rate, *, layer_bytes: list[int], reading, passes: int, checks: int, stream: bool
) -> float | None:
    if rate is None or stream and reading is None:
        return None
    computing = flops / rate
    if not stream:
        return computing
    load, first = sum(layer_bytes) / reading, max(layer_bytes) / reading
    return max(computing, (passes - checks) * load) + passes * first + checks * load


def _limits(plan: Plan, fit: Plan, units: int, prompts: int, blocks: int, where: torch.device) -> list[str]:
    """fit: the plan by memory alone."""
    out = []
    if fit.rows_per_block < units:
        out.append(
            f"memory: {fit.rows_per_block:,} of {units:,} rows fit at a time, and each of {blocks:,} blocks begins anew at "
            "the first layer"
        )
    if plan != fit:
        out.append(
            f"parts: {blocks:,} blocks, so that a part can be kept about every {PART_SECONDS:.0f} s of work; each begins anew at "
            "the first layer"
        )
    if len(fit.prompt_groups) > 1:
        why = "the chunks that suit a CPU's cache" if where.type == "cpu" else "memory"
        out.append(f"{why}: {prompts:,} prompts go through in {len(plan.prompt_groups):,} groups")
    return out or ["none: all heads and prompts go through in one pass"]


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
