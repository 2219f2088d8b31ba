"""How many rows decode together: cache, a step's work and prefills within the memory there is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ..engine.fused_layer import base_row_bytes, joins, loaded_bytes
from ..engine.measurement import ScanExecution
from ..engine.memory_plan import Held, Plan, make_plan
from ..engine.subject import Subject, working_dtype
from ..errors import InputError
from ..models.anatomy import LOGIT_COPIES
from ..ops.kv_cache import slot_bytes
from .measurements import DecodingExecution

# Rows that decode together unless memory allows fewer: where matrix products stop getting faster.
CPU_ROWS = 128
CUDA_ROWS = 512


@dataclass
class GenerationPlan:
    """Rows at a time, of how many tokens; prefill: how prompts and groups are cut when they enter."""

    slots: int
    capacity: int
    prefill: Plan
    slot_bytes: int  # of a row: its cache, and its part of a step
    joined: bool = (
        False  # fused layers keep their weights side by side, in the dtype of products, from step to step
    )

    @property
    def predicted_bytes(self) -> int:
        return self.slots * self.slot_bytes + self.prefill.predicted_bytes

    def to_json(self) -> dict:
        return {"slots": self.slots, "capacity": self.capacity, "predicted_bytes": self.predicted_bytes} | {
            "prefill": self.prefill.to_json()
        }

    def halve(self) -> None:
        """After running out of memory."""
        self.slots = max(1, self.slots // 2)
        self.prefill = self.prefill.smaller() or self.prefill


def make_generation_plan(subject: Subject, num_groups: int, execution: DecodingExecution) -> GenerationPlan:
    """How many rows at a time. Raises InputError if not even one fits."""
    if subject.fused and joins(subject.backend):
        with contextlib.suppress(InputError):  # then each step makes a layer's weights ready anew
            return _fitted(subject, num_groups, execution, joined=True)
    return _fitted(subject, num_groups, execution, joined=False)


def _fitted(
    subject: Subject, num_groups: int, execution: DecodingExecution, *, joined: bool
) -> GenerationPlan:
    anatomy, dtype = subject.anatomy, subject.model.dtype
    capacity = max(map(len, subject.token_ids)) + subject.measurement.new_tokens
    # Of the prefill.
    by_token = base_row_bytes(anatomy.layers[0].module, subject.products) if subject.fused else 0
    working = working_dtype(subject.model, subject.backend, subject.layers)
    held = Held(subject.device, working, bytes=_loaded_bytes(subject, joined), per_token_bytes=by_token)

    def plan(max_memory: int | None) -> Plan:
        limited = ScanExecution(max_memory=max_memory)
        return make_plan(anatomy, subject.token_ids, max(1, num_groups), limited, held)

    prefill = plan(execution.max_memory)
    each = slot_bytes(anatomy.num_layers, anatomy.num_kv_heads, anatomy.head_dim, capacity, dtype.itemsize)
    # A step's logits, and what a layer holds while it runs.
    each += anatomy.vocab_size * 4 * LOGIT_COPIES + anatomy.work_width * working.itemsize
    rows = num_groups * len(subject.token_ids)
    wanted = min(rows, execution.batch_rows or (CPU_ROWS if subject.device.type == "cpu" else CUDA_ROWS))
    # Cache and prefill share the memory; prefill needs at least a row's worth, and has been given all.
    slots = min(wanted, (prefill.memory_limit_bytes - held.bytes) // 2 // each)
    if slots < 1:
        raise InputError(
            f"a row of {capacity} tokens needs {each / 2**20:,.1f} MiB beyond the model, and half of "
            f"{prefill.memory_limit_bytes / 2**20:,.1f} MiB may be used: raise max_memory "
            "(--max-memory) or lower max_new_tokens (--max-new-tokens)"
        )
    if slots * each + prefill.predicted_bytes > prefill.memory_limit_bytes:
        prefill = plan(prefill.memory_limit_bytes - slots * each)
    return GenerationPlan(int(slots), capacity, prefill, int(each), joined)


def _loaded_bytes(subject: Subject, joined: bool) -> int:
    """What fused layers hold beyond the model: their joined weights, of all layers or of the one that prefill is in."""
    if not subject.fused:
        return 0
    of_one = loaded_bytes(subject.anatomy.layers[0].module, subject.products, subject.device)
    if not joined:
        return of_one
    weights = (p for layer in subject.anatomy.layers for p in layer.module.parameters())
    of_all = sum(p.numel() * subject.products.itemsize for p in weights)
    # Weights that go into no join are not there twice, which leaves room for the layer of prefill; converted ones are.
    return of_all + (of_one if subject.products != subject.model.dtype else 0)
