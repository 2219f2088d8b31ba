"""What is measured on: a model that was looked at, and prompts as token ids."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from transformers import PreTrainedModel

from .._version import __version__
from ..errors import InputError, note
from ..memory import once_more
from ..models.ambient import describe_matmul
from ..models.anatomy import Anatomy, check_model, check_own_dtype, inspect_model, with_ends
from ..models.checkpoint import ORIGIN
from ..models.fingerprint import fingerprint
from ..models.forward import input_device
from ..models.output_head import head_precision
from ..models.own_attention import check_own_attention
from ..models.weights import coming_bytes, where_weights_are
from ..models.wrappers import base_model
from ..ops.divergences import kl_backend
from ..ops.tree_attention import resolve_backend
from ..prompts.tokens import all_tokens
from ..runs.identity import prompt_hashes
from . import fused_layer
from .ablate import check_own_forward, is_ablated
from .ablation import SOURCED, Ablation
from .heads import check_unit
from .measurement import FP32_RESIDUAL, Execution, Measurement
from .memory_plan import Held
from .replacement_values import source_ids

# What run.json says of packs where the model looks at neighbours outside attention.
ALONE = "one prompt each, not trimmed: the model looks at neighbours outside attention"
ABREAST = "prompts of one length side by side, not trimmed: the model looks at neighbours outside attention"


@dataclass
class Subject:
    """A model and a measurement that fit together, and how it will run.

    token_ids: the prompts, with their answers if there are any; other_ids: those of `mean` and `resample`; places: the positions
    of each prompt that are read, None for its last; targets: the answers' tokens, one for each; further_ids: `other_ids` of further ablations; layers: how rows pass a decoder layer, of LAYER_PATHS
    but for "auto"; record: what runs, for run.json.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    measurement: Measurement
    token_ids: list[list[int]]
    other_ids: list[list[int]] | None
    device: torch.device
    backend: str
    layers: str
    record: dict
    places: list[tuple[int, ...]] | None
    targets: list[tuple[int, ...]] | None
    further_ids: list[list[list[int]] | None]

    @property
    def how(self) -> Ablation:
        return self.measurement.ablation

    @property
    def at_end(self) -> bool:
        """Whether heads are off at the positions that are read, and nowhere else."""
        return self.how.at == "end"

    @property
    def ends_alone(self) -> bool:
        """Whether rows are then as wide as there are reads: not where a layer looks beyond a token outside of attention."""
        return self.at_end and self.anatomy.ends_alone

    @property
    def unit(self) -> str:
        return self.measurement.unit

    @property
    def num_units(self) -> int:
        """Of a layer. Raises InputError for a unit that the model does not have."""
        return check_unit(self.unit, self.anatomy)

    @property
    def fused(self) -> bool:
        return self.layers != "model"

    @property
    def products(self) -> torch.dtype:
        """In which the layers' matrix products run."""
        return products_of(self.model, self.backend, self.layers)

    @property
    def fp32_residual(self) -> bool:
        return self.layers == FP32_RESIDUAL

    def held(self, ablations: int = 1) -> Held:
        """In what a scan of it is held, and beside what. ablations: whose rows go through together."""
        coming = coming_bytes(self.model, [block.module for block in self.anatomy.blocks])
        held = held_beside(
            self.model, self.anatomy, self.measurement, self.device, self.backend, self.layers, ablations
        )
        return replace(held, coming_bytes=coming)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights, which are read for it."""
        return once_more("looking at the weights", lambda: fingerprint(self.model))

    @functools.cached_property
    def identity(self) -> dict:
        """What makes two runs the same, for run folders."""
        return self._identity()

    def _ablation_identity(self) -> dict:
        ablation = {
            "kind": self.how.kind,
            "logit_scale": self.how.logit_scale,
            "output_scale": self.how.output_scale,
        }
        if self.other_ids is not None:
            ablation["prompts"] = prompt_hashes(self.other_ids)
        if self.how.align != "exact":
            ablation["align"] = self.how.align
        if self.how.at != "all":
            ablation["at"] = self.how.at
        return ablation

    def _identity(self) -> dict:
        return {
            "kind": self.measurement.run_kind or self.measurement.kind,
            "fingerprint": self.fingerprint,
            "prompts": prompt_hashes(self.token_ids),
            "ablation": self._ablation_identity(),
            "unit": self.unit,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            # Another precision, not another way to the same numbers.
            **({"residual": "float32"} if self.fp32_residual else {}),
            **(
                {"products": str(self.products).removeprefix("torch.")}
                if self.products != self.model.dtype
                else {}
            ),
            **self._read_identity(),
        }

    def _read_identity(self) -> dict:
        if self.targets is not None:
            return {"answer_tokens": [len(each) for each in self.targets]}
        return {} if self.places is None else {"read_at": [list(each) for each in self.places]}


@dataclass(frozen=True)
class Texts:
    """A measurement's prompts as token ids, as `Subject` has them; record: how they became tokens, for run.json."""

    token_ids: list[list[int]]
    other_ids: list[list[int]] | None
    places: list[tuple[int, ...]] | None
    targets: list[tuple[int, ...]] | None
    record: dict


def tokens_of(
    measurement: Measurement, model: PreTrainedModel, tokenizer, *, weights: bool = True, said: bool = False
) -> Texts:
    """Token ids of the prompts, and of those of `mean` and `resample`, checked against the model. What a user would not expect of
    it is said on stderr. The prompts that `resample` takes outputs from are followed by the same answers.

    weights: as in `check_model`; said: what there is to say of the prompts was said before. Raises InputError or UnsupportedModelError.
    """
    how = measurement.ablation
    about = f"in the prompts of ablation {how.kind}: "
    own, more = all_tokens(measurement.prompts, how.prompts, tokenizer, measurement.wrapping, about)
    of_others = [] if more is None else [about + each for each in more.notes if each not in own.notes]
    for each in (*([] if said else own.notes), *of_others):
        note(each)
    token_ids, others = own.ids, None if more is None else more.ids
    if how.kind in SOURCED:
        others = source_ids(how, token_ids, others)
    reads = measurement.reads(token_ids, tokenizer)
    if reads is not None:
        _check_answers(reads.targets or (), model)
        for each in reads.notes:
            note(each)
        token_ids = reads.ids
        if (
            reads.targets is not None
            and others is not None
            and (how.kind == "resample" or how.prompts is None)
        ):
            prompts = others if how.kind == "resample" else own.ids
            others = [[*ids, *answer] for ids, answer in zip(prompts, reads.targets, strict=True)]
    try:
        check_model(model, token_ids, measurement.new_tokens, weights=weights)
    except InputError as error:
        if reads is None or reads.targets is None:
            raise
        raise type(error)(f"with the answers: {error}") from error
    if others is not None:
        try:
            check_model(model, others, weights=weights)
        except InputError as error:
            raise InputError(f"{about}{error}") from error
    places, targets = (None, None) if reads is None else (reads.places, reads.targets)
    return Texts(token_ids, others, places, targets, own.record)


def _check_answers(answers: Sequence[Sequence[int]], model: PreTrainedModel) -> None:
    """Raises InputError for tokens that the model does not know: what is said of sequences names their prompts."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for i, answer in enumerate(answers):
        if not (0 <= min(answer) and max(answer) < vocabulary):
            raise InputError(f"answer {i} has token ids outside the model's vocabulary of {vocabulary}")


def held_beside(
    model: PreTrainedModel,
    anatomy: Anatomy,
    measurement: Measurement,
    device: torch.device,
    backend: str,
    layers: str,
    ablations: int = 1,
) -> Held:
    """What a scan is held in, and beside what, but for weights that come. backend, layers: as in `Subject`; ablations: how many go
    through together."""
    row_size = 4 if layers == FP32_RESIDUAL else model.dtype.itemsize
    dtype = working_dtype(model, backend, layers)
    # A half-precision output head on a CPU is copied to float32 while a scan runs.
    wide_head = head_precision(model) == "float32" and model.dtype.itemsize < 4 and device.type == "cpu"
    loaded = by_token = 0
    if layers != "model":
        products = fused_layer.dtype_of_products(model.dtype, backend)
        loaded = fused_layer.loaded_bytes(anatomy.layers[0].module, products, device)
        by_token = fused_layer.base_row_bytes(anatomy.layers[0].module, products)
        # Of each further ablation the base row's heads, all off, and what that changes.
        by_token += 2 * (ablations - 1) * anatomy.num_heads * anatomy.value_dim * dtype.itemsize
    return Held(
        device,
        dtype,
        extra_rows=anatomy.num_layers * (measurement.ablation.kind == "resample"),
        per_row_bytes=len(measurement.prompts) * anatomy.hidden_size * row_size * measurement.keeps_hidden,
        bytes=4 * anatomy.vocab_size * anatomy.hidden_size * wide_head + loaded,
        per_token_bytes=by_token,
        row_size=row_size,
    )


def products_of(model: PreTrainedModel, backend: str, layers: str) -> torch.dtype:
    """In which the layers' matrix products run. backend, layers: as in `Subject`."""
    return model.dtype if layers == "model" else fused_layer.dtype_of_products(model.dtype, backend)


def working_dtype(model: PreTrainedModel, backend: str, layers: str) -> torch.dtype:
    """What a layer has between its products: float32 at least where fused layers are C++'s. backend, layers: as in `Subject`."""
    if layers == "model" or backend == "triton":
        return model.dtype
    return torch.promote_types(model.dtype, torch.float32)


def layer_path(
    layers: str,
    model: PreTrainedModel,
    anatomy: Anatomy,
    device: torch.device,
    backend: str,
    how: Ablation,
) -> tuple[str, str | None]:
    """How rows pass the layers, and why they go through their own forward, None if they do not."""
    if layers == "model":
        return "model", "asked for"
    problem = fused_layer.why_not([layer.module for layer in anatomy.layers], model.dtype, device, backend)
    way = layers
    if how.at == "end" and not anatomy.ends_alone:  # at one token of a whole row
        problem = (
            problem or "heads are off at the end only, and the model looks at neighbours outside attention"
        )
    if layers == "fused":
        problem = problem or fused_layer.why_no_half_residual(model.dtype, backend)
    elif layers == "auto":
        way = FP32_RESIDUAL if fused_layer.why_no_half_residual(model.dtype, backend) else "fused"
    if way == FP32_RESIDUAL and not problem:
        problem = fused_layer.why_no_fp32_residual(model.dtype, device, backend, head_precision(model))
    if layers != "auto" and problem:
        raise InputError(f"layers {layers!r} (--layers) cannot run: {problem}; use layers='model' or 'auto'")
    return ("model" if problem else way), problem


def look_at(model: PreTrainedModel, tokenizer, measurement: Measurement, execution: Execution) -> Subject:
    """Raises InputError or UnsupportedModelError where they do not fit together."""
    model = base_model(model)
    texts = tokens_of(measurement, model, tokenizer)
    token_ids, others = texts.token_ids, texts.other_ids
    further = [tokens_of(one, model, tokenizer, said=True).other_ids for one in measurement.each()[1:]]
    more = [len(ids) for each in (others, *further) for ids in each or []]
    longest = max([max(map(len, token_ids)) + measurement.new_tokens, *more])
    anatomy = once_more(
        "looking at the model", lambda: inspect_model(model, max(token_ids, key=len), longest)
    )
    if texts.places and max(map(len, texts.places)) > 1:
        anatomy = once_more(
            "looking at the model", lambda: with_ends(model, anatomy, max(token_ids, key=len))
        )
    if is_ablated(anatomy):
        raise InputError("the model is inside shipsfast.ablate: leave that context first")
    check_own_dtype(model, anatomy)
    where = where_weights_are(model)
    if where in (
        "streamed",
        "offloaded",
    ):  # two more readings of all weights: a scan's own checks will be made
        check_own_attention(model, [layer.attention for layer in anatomy.layers])
    else:
        once_more("holding the model against its own forward pass", lambda: check_own_forward(model, anatomy))
    device = input_device(model)
    backend = resolve_backend(
        execution.backend, device, model.dtype, one_head_size=anatomy.head_dim == anatomy.value_dim
    )
    layers, not_fused = layer_path(execution.layers, model, anatomy, device, backend, measurement.ablation)
    record = describe_run(model, anatomy, device) | {
        **about_ablation(measurement.ablation, anatomy, backend),
        "template": measurement.template,
        "prompting": texts.record,
        "attention_backend": backend,
        "layers": layers,
        **(
            {}
            if layers == "model"
            else {"products": str(products_of(model, backend, layers)).removeprefix("torch.")}
        ),
        "weights": where,
        "kl_backend": kl_backend(device),
        "matmul": describe_matmul(),
    }
    if execution.prompts_from:
        record["prompts_from"] = execution.prompts_from
    if anatomy.plain_sequences:
        record["packs"] = ALONE
    if not_fused:
        record["layers_why"] = not_fused
    return Subject(
        model, anatomy, measurement, token_ids, others, device, backend, layers, record, texts.places, texts.targets, further,
    )  # fmt: skip


def goes_abreast(how: Ablation, anatomy: Anatomy) -> bool:
    """Whether a scan has prompts of one length side by side, as rows of a batch: where they may share no pack. The outputs that
    `resample` puts in are each prompt's own."""
    return anatomy.plain_sequences and how.kind != "resample"


def about_ablation(how: Ablation, anatomy: Anatomy, backend: str) -> dict:
    """What the record says of an ablation. backend: of attention, resolved."""
    record = {"ablation": how.describe()}
    if how.at == "end" and anatomy.ends_alone:
        record["end_attention"] = "cpp" if backend == "cpp" else "torch"
    return record


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
            # Of a GGUF file or an adapter.
            **model.__dict__.get(ORIGIN, {}),
        },
        "device": {"type": device.type, "name": name},
        "versions": {
            "shipsfast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
