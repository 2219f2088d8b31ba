"""What every kind of scan does before its first row: check the input, look at the model, choose how to run, plan."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import transformers
from transformers import PreTrainedModel

from . import fused, runs
from ._version import __version__
from .ablation import Ablation, Head, HeadMask, as_ablation, check_heads, check_unit, unit_heads
from .anatomy import Anatomy, base_model, check_model, input_device, inspect_model
from .attention import ATTRIBUTE, resolve_backend
from .errors import InputError, is_out_of_memory, note
from .metrics import kl_backend
from .out_of_memory import OutOfMemory, free_memory, once_more
from .packing import PackedPrompts, pack
from .planner import Plan, even_slices, make_plan
from .prompts import to_token_ids
from .sources import mean_outputs, pair_ids, resample_outputs, source_ids, unpair
from .wavefront import Wavefront, head_precision
from .weights import coming_bytes, where_weights_are

FP32_RESIDUAL = "fused_fp32_residual"
LAYER_PATHS = ("auto", "model", "fused", FP32_RESIDUAL)


@dataclass
class Subject:
    """A model, prompts and an ablation that fit together, and how they will run."""

    model: PreTrainedModel
    anatomy: Anatomy
    token_ids: list[list[int]]
    how: Ablation
    other_ids: list[list[int]] | None  # the prompts of `mean` and `resample`
    unit: str
    num_units: int  # of a layer
    device: torch.device
    backend: str
    layers: str  # how rows pass a decoder layer: of LAYER_PATHS, but for "auto"
    record: dict  # what runs, for run.json

    @property
    def fused(self) -> bool:
        return self.layers != "model"

    @property
    def fp32_residual(self) -> bool:
        return self.layers == FP32_RESIDUAL

    def describe(self, kind: str) -> dict:
        """What makes two runs the same, for run folders."""
        ablation = {
            "kind": self.how.kind,
            "logit_scale": self.how.logit_scale,
            "output_scale": self.how.output_scale,
        }
        if self.other_ids is not None:
            ablation["prompts"] = runs.prompt_hashes(self.other_ids)
        return {
            "kind": kind,
            "fingerprint": once_more("looking at the weights", lambda: runs.fingerprint(self.model)),
            "prompts": runs.prompt_hashes(self.token_ids),
            "ablation": ablation,
            "unit": self.unit,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            # Another precision, not another way to the same numbers.
            **({"residual": "float32"} if self.fp32_residual else {}),
        }


@dataclass
class Prepared(Subject):
    """A scan that is ready to run.

    units: what is switched off together, (layer, index) pairs in ascending order: query heads, or key/value groups;
    plan: may become smaller, or another run's: see `continue_plan`; identity: what makes two scans the same, for run
    folders.
    """

    units: list[Head]
    plan: Plan
    identity: dict
    asked: dict  # parts of the plan that the caller has set
    tree_ids: list[list[int]] = field(default_factory=list)  # the prompts as they are packed
    _pairs: object = None
    _mean: list[torch.Tensor] | None = None

    def pack(self, group: Sequence[int]) -> tuple[PackedPrompts, list[torch.Tensor] | None]:
        """A group of prompts as one pack, with the vectors that replace heads' outputs, if any do."""
        tree = pack([self.tree_ids[i] for i in group])
        if self.how.kind == "resample":
            own, other = unpair(tree, self._pairs)
            return own, resample_outputs(self.model, self.anatomy, other, self.backend)
        return tree, self._mean_values()

    def dense_values(self, prompt: int) -> list[torch.Tensor] | None:
        """The same vectors for one prompt on its own."""
        if self.how.kind == "resample":
            return resample_outputs(self.model, self.anatomy, pack([self.other_ids[prompt]]), self.backend)
        return self._mean_values()

    def _mean_values(self) -> list[torch.Tensor] | None:
        if self.how.kind == "mean" and self._mean is None:
            self._mean = mean_outputs(self.model, self.anatomy, self.other_ids, self.backend)
        return self._mean

    def heads(self, units: Iterable[Head]) -> tuple[Head, ...]:
        """The query heads of these units."""
        return tuple(head for each in units for head in unit_heads(each, self.unit, self.anatomy))

    def mask(self, units: Sequence[Head], values, parent: Sequence[Head] = ()) -> HeadMask:
        """Row 0 with the units `parent` off, and one row more for each of `units` with it off as well."""
        base = self.heads(parent)
        return HeadMask((base, *(base + self.heads([each]) for each in units)), self.how, values)

    def wavefront(self, packed: PackedPrompts, tick: Callable[[int], None] | None = None) -> Wavefront:
        return Wavefront(
            self.model, self.anatomy, packed, backend=self.backend, chunk_tokens=self.plan.chunk_tokens,
            head_rows=self.plan.head_rows, tick=tick, fused=self.fused, fp32_residual=self.fp32_residual,
        )  # fmt: skip

    def continue_plan(self, folder: runs.RunFolder) -> None:
        """Cut what is left of an unfinished run as the run was cut: its scores then end bit for bit as they would have.

        Unless the caller asks for another cut now, or less memory is free than the plan needs.
        """
        before = folder.previous.get("plan")
        if not before or folder.previous.get("plan_asked") != self.asked:
            return
        plan = Plan.from_json(before, self.tree_ids, self.plan.needs)
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
        cut = (units[part] for part in even_slices(len(units), self.plan.rows_per_block))
        return [block for block in cut if not missing.isdisjoint(block)]

    def layer_passes(self, units: Sequence[Head], missing: Iterable[Head], groups: int = 1) -> int:
        """How many (row, layer) steps it takes to scan what is missing of `units`: the unit of progress."""
        layers = self.anatomy.num_layers
        blocks = self.blocks(units, missing)
        return groups * sum(layers + sum(layers - layer for layer, _ in block) for block in blocks)


def prepare(
    kind: str,
    model: PreTrainedModel,
    prompts: Sequence,
    tokenizer,
    *,
    template: str,
    ablation: str | Ablation,
    scale: float,
    heads: Iterable[Sequence[int | None]] | None,
    unit: str,
    backend: str,
    layers: str,
    max_memory: int | None,
    chunk_tokens: int | None,
    rows_per_block: int | None,
    prompts_per_group: int | None,
    keep_hidden: bool = False,
) -> Prepared:
    """Arguments as in `scan`. keep_hidden: the hidden states of every row at every prompt will be kept.

    Raises InputError or UnsupportedModelError, as `scan` does.
    """
    subject = look_at(
        model, prompts, tokenizer, template=template, ablation=ablation, scale=scale, unit=unit, backend=backend,
        layers=layers,
    )  # fmt: skip
    model, anatomy, token_ids = subject.model, subject.anatomy, subject.token_ids
    units = scanned_units(heads, anatomy, subject.num_units, unit)
    resample = subject.how.kind == "resample"
    tree_ids, pairs = pair_ids(token_ids, subject.other_ids) if resample else (token_ids, None)
    plan = make_plan(
        anatomy, tree_ids, len(units), device=subject.device, dtype=model.dtype, max_memory=max_memory,
        chunk_tokens=chunk_tokens, rows_per_block=rows_per_block, prompts_per_group=prompts_per_group,
        coming_bytes=coming_bytes(model, [block.module for block in anatomy.blocks]),
        **kept(model, anatomy, len(token_ids), subject.device, resample, keep_hidden, subject.layers),
    )  # fmt: skip
    asked = {
        "chunk_tokens": chunk_tokens,
        "rows_per_block": rows_per_block,
        "prompts_per_group": prompts_per_group,
    }
    subject.record["plan_asked"] = asked
    shape = [len(token_ids), anatomy.num_layers, subject.num_units]
    identity = subject.describe(kind) | {
        "heads": "all" if len(units) == shape[1] * shape[2] else [list(h) for h in units],
        "shape": shape,
    }
    subject.record["head_precision"] = head_precision(model)
    return Prepared(
        **vars(subject),
        units=units,
        plan=plan,
        identity=identity,
        asked=asked,
        tree_ids=tree_ids,
        _pairs=pairs,
    )


def scanned_units(heads, anatomy: Anatomy, num_units: int, unit: str) -> list[Head]:
    """The units that `heads` of a scan names, in ascending order."""
    grid = [(layer, None) for layer in range(anatomy.num_layers)] if heads is None else heads
    return check_heads(grid, anatomy.num_layers, num_units, unit)


def kept(
    model: PreTrainedModel,
    anatomy: Anatomy,
    num_prompts: int,
    device: torch.device,
    resample: bool,
    keep_hidden: bool,
    layers: str,
) -> dict[str, int]:
    """What a scan holds beside its blocks, and in what, as `make_plan` takes it. layers: as in `Subject`."""
    # A half-precision output head on a CPU is copied to float32 while a scan runs.
    row_size = 4 if layers == FP32_RESIDUAL else model.dtype.itemsize
    wide_head = head_precision(model) == "float32" and model.dtype.itemsize < 4 and device.type == "cpu"
    return {
        "extra_rows": anatomy.num_layers * resample,
        "kept_per_row_bytes": num_prompts * anatomy.hidden_size * row_size * keep_hidden,
        "row_size": row_size,
        "kept_bytes": 4 * anatomy.vocab_size * anatomy.hidden_size * wide_head
        + (fused.loaded_bytes(anatomy.layers[0].module, device) if layers != "model" else 0),
    }


def look_at(
    model: PreTrainedModel,
    prompts: Sequence,
    tokenizer,
    *,
    template: str,
    ablation: str | Ablation,
    scale: float,
    unit: str,
    backend: str,
    layers: str,
    new_tokens: int = 0,
) -> Subject:
    """Arguments as in `scan`. new_tokens: how many may follow each prompt.

    Raises InputError or UnsupportedModelError, as `scan` does.
    """
    how = as_ablation(ablation, scale)
    model = base_model(model)
    token_ids = to_token_ids(prompts, tokenizer, template)
    check_model(model, token_ids, new_tokens)
    others = source_ids(how, token_ids, tokenizer, template) if how.kind in ("mean", "resample") else None
    if others is not None:
        try:
            check_model(model, others)
        except InputError as error:
            raise InputError(f"in the prompts of ablation {how.kind}: {error}") from error
    longest = max(map(len, token_ids)) + new_tokens
    if others is not None:
        longest = max(longest, *map(len, others))
    anatomy = once_more(
        "looking at the model", lambda: inspect_model(model, max(token_ids, key=len), longest)
    )
    if any(ATTRIBUTE in layer.attention.__dict__ for layer in anatomy.layers):
        raise InputError("the model is inside shipsfast.ablate: leave that context first")
    num_units = check_unit(unit, anatomy)
    device = input_device(model)
    check_sums(device, model.dtype)
    resolved = resolve_backend(
        backend, device, model.dtype, one_head_size=anatomy.head_dim == anatomy.value_dim
    )
    layers, not_fused = layer_path(layers, model, anatomy, device, resolved)
    record = describe_run(model, anatomy, device) | {
        "ablation": how.describe(),
        "template": template,
        "attention_backend": resolved,
        "layers": layers,
        "weights": where_weights_are(model),
        "kl_backend": kl_backend(device),
    }
    if anatomy.plain_sequences:
        record["packs"] = "one prompt each, not trimmed: the model looks at neighbours outside attention"
    if not_fused:
        record["layers_why"] = not_fused
    return Subject(model, anatomy, token_ids, how, others, unit, num_units, device, resolved, layers, record)


def check_sums(device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where torch is told to add up float16 products in float16: it then has none that end in float32,
    which logits need."""
    if (
        device.type == "cuda"
        and dtype == torch.float16
        and torch.backends.cuda.matmul.allow_fp16_accumulation
    ):
        raise InputError(
            "torch.backends.cuda.matmul.allow_fp16_accumulation is on: sums in float16 are too coarse for scores, turn it off"
        )


def check_layers(layers: str) -> None:
    """Raises InputError for a name that is none."""
    if layers not in LAYER_PATHS:
        raise InputError(f"unknown layers {layers!r} (--layers): expected one of {', '.join(LAYER_PATHS)}")


def layer_path(
    layers: str, model: PreTrainedModel, anatomy: Anatomy, device: torch.device, backend: str
) -> tuple[str, str | None]:
    """How rows pass the layers, and why they go through their own forward, None if they do not."""
    check_layers(layers)
    if layers == "model":
        return "model", "asked for"
    problem = fused.why_not([layer.module for layer in anatomy.layers], model.dtype, device, backend)
    if layers == FP32_RESIDUAL and not problem:
        problem = fused.why_no_fp32_residual(model.dtype, backend, head_precision(model))
    if layers != "auto" and problem:
        raise InputError(f"layers {layers!r} (--layers) cannot run: {problem}; use layers='model' or 'auto'")
    return ("model" if problem else "fused" if layers == "auto" else layers), problem


def run_blocks(
    prepared: Prepared,
    units: Sequence[Head],
    missing: Callable[[], list[Head]],
    run: Callable[[Sequence[Head]], None],
    bar,
) -> None:
    """Run what is missing of `units`, block by block; after running out of memory, with a smaller plan.

    missing: the units still to be done; run: does a block, and keeps what was missing of it; bar: the progress bar,
    which goes back. Raises OutOfMemory when there is no smaller plan.
    """
    while blocks := prepared.blocks(units, missing()):
        done = bar.n
        try:
            for block in blocks:
                done = bar.n
                run(block)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            bar.update(done - bar.n)
            free_memory()
            smaller = prepared.plan.smaller()
            if smaller is None:
                raise OutOfMemory(
                    "out of memory even with the smallest plan: free some, or shorten the longest prompt"
                ) from error
            prepared.plan = smaller


def describe_run(model: PreTrainedModel, anatomy: Anatomy, device: torch.device) -> dict:
    """What a reader of run.json needs to know to repeat the run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "model": {
            "class": type(model).__name__,
            "name": model.config._name_or_path,
            "layers": anatomy.num_layers,
            # Where some layers have no attention heads, the layers of scores are these.
            **(
                {"layer_names": [x.name for x in anatomy.layers]}
                if len(anatomy.blocks) > anatomy.num_layers
                else {}
            ),
            "heads": anatomy.num_heads,
            "kv_heads": anatomy.num_kv_heads,
            "hidden": anatomy.hidden_size,
            "vocabulary": anatomy.vocab_size,
        },
        "device": {"type": device.type, "name": name},
        "versions": {
            "shipsfast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
