"""A generation that is ready to run: a model, groups x prompts rows, and how they will be decoded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..engine.heads import Group, first_layer, unit_heads
from ..engine.replacement_values import mean_outputs
from ..engine.subject import Subject, look_at
from ..errors import InputError
from ..models.weights import check_in_memory
from ..models.wrappers import base_model
from .end_tokens import find_end_tokens
from .measurements import AnswerMeasurement, DecodingExecution
from .plan import GenerationPlan, make_generation_plan
from .sampling import Sampling


@dataclass
class Generation:
    """Groups x prompts rows.

    groups: their query heads; asked: the same as they were named; end_tokens: end a text; values: the vectors of `mean`;
    tokenizer: None where texts are lists of token ids.
    """

    subject: Subject
    tokenizer: object
    groups: list[Group]
    sampling: Sampling
    max_new_tokens: int
    end_tokens: frozenset[int]
    plan: GenerationPlan
    values: list[torch.Tensor] | None = None
    asked: list[list] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Every (group, prompt)."""
        return [(g, p) for g in range(len(self.groups)) for p in range(len(self.subject.token_ids))]

    def describe(self) -> dict:
        """How texts come about, for the identity of a run."""
        drawn = vars(self.sampling) if self.sampling.do_sample else {"do_sample": False}
        return drawn | {"max_new_tokens": self.max_new_tokens, "end_tokens": sorted(self.end_tokens)}

    @functools.cached_property
    def same_prompt(self) -> list[int]:
        """For every prompt, the first one of the same tokens."""
        first: dict[tuple[int, ...], int] = {}
        return [first.setdefault(tuple(ids), p) for p, ids in enumerate(self.subject.token_ids)]

    @functools.cached_property
    def _copy(self) -> dict[tuple[int, int], int]:
        """For every row, how many rows of the same heads and prompt come before it."""
        out, seen = {}, {}
        for g, heads in enumerate(self.groups):
            for p, first in enumerate(self.same_prompt):
                key = (first, frozenset(heads))
                out[g, p] = seen[key] = seen.get(key, -1) + 1
        return out

    def row_name(self, group: int, prompt: int) -> str:
        """What a row's draws depend on beside the seed."""
        heads = sorted(set(self.groups[group]))
        return f"{self._copy[group, prompt]} {heads} {self.subject.token_ids[prompt]}"

    def fork_layer(self, group: int) -> int:
        """The first layer in which the group differs from the unablated model."""
        return first_layer(self.groups[group], self.subject.anatomy.num_layers)


def prepare_generation(
    model: PreTrainedModel, tokenizer, measurement: AnswerMeasurement, execution: DecodingExecution
) -> Generation:
    """Raises InputError or UnsupportedModelError, as `generate` does."""
    model = base_model(model)
    check_in_memory(model)
    subject = look_at(model, tokenizer, measurement, execution)
    if subject.fp32_residual and subject.backend == "triton":
        raise InputError(
            f"layers {subject.layers!r} (--layers) is for scans on a GPU: a text should be what the model itself says"
        )
    if subject.how.kind == "resample":
        raise InputError(
            "ablation resample matches positions one to one, and new text has no counterpart: use another"
        )
    asked = measurement.units(subject)
    groups = [
        tuple(head for each in units for head in unit_heads(each, subject.unit, subject.anatomy))
        for units in asked
    ]
    sampling = Sampling(measurement.do_sample, measurement.top_k, measurement.temperature, measurement.seed)
    sampling.check(subject.anatomy.vocab_size)
    values = None
    if subject.how.kind == "mean" and any(groups):
        values = mean_outputs(subject.model, subject.anatomy, subject.other_ids, subject.backend)
    plan = make_generation_plan(subject, len(groups), execution)
    end_tokens = find_end_tokens(model, tokenizer, measurement.eos_token_id, subject.anatomy.vocab_size)
    most = measurement.max_new_tokens
    return Generation(subject, tokenizer, groups, sampling, most, end_tokens, plan, values, asked)
