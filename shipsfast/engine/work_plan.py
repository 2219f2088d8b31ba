"""How a scan is cut so that something of it is kept every half minute, beyond what memory asks for.

What a block has found is written when its last row is through. A block of all heads would end with the scan, so a plan is
also cut by work: into blocks of PART_SECONDS of floating-point operations (flops.py), at a rate that is assumed. The plan
is made from sizes, never from timings, and does not know whether there is a run folder: the same call gives the same bits,
with a folder and without, on a busy machine and on a quiet one.

Every block takes the unablated row through all layers again, and every further group of prompts their shared prefix. The
plan is cut as long as that adds at most MOST_MORE to the work, and no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..models.anatomy import Anatomy
from ..models.weights import absent_bytes
from ..ops.prefix_tree import PackedPrompts
from .flops import ModelFlops, model_flops, scan_flops
from .heads import Head, check_unit
from .measurement import Measurement, ScanExecution
from .memory_plan import Plan

PART_SECONDS = 30.0  # of work, between two parts
MOST_MORE = 0.03  # of the work, for cutting it
# FLOP/s, rather less than a quiet machine does, since a part too many costs little. Of a CPU, for each thread; half in float64.
CPU_THREAD_RATE = 50e9
CUDA_RATE = 100e12  # in half precision; wider dtypes: a tenth
# A streamed block has to compute for every byte that it reads again, or it would wait for the disk.
CPU_FLOPS_PER_BYTE, CUDA_FLOPS_PER_BYTE = 400, 400_000


@dataclass(frozen=True)
class Work:
    """What of a scan decides how far it is cut. costs: of the model; streamed_bytes: weights that every block reads, 0
    where they are in memory; at_once: all prompts pass before anything of a block is kept (their hidden states are)."""

    costs: ModelFlops
    device: torch.device
    dtype: torch.dtype
    streamed_bytes: int = 0
    at_once: bool = False

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        anatomy: Anatomy,
        measurement: Measurement,
        device: torch.device,
        *,
        fused: bool,
        stream: bool = True,
    ) -> Work:
        """Of a scan. stream: weights that are not in memory are read by every block."""
        unit_heads = anatomy.num_heads // check_unit(measurement.unit, anatomy)
        costs = model_flops(model, anatomy, fused=fused, unit_heads=unit_heads)
        away = absent_bytes([layer.module for layer in anatomy.layers]) if stream else 0
        return cls(costs, device, model.dtype, away, measurement.keeps_hidden)

    @property
    def flops_per_part(self) -> float:
        if self.device.type == "cpu":
            rate = CPU_THREAD_RATE * torch.get_num_threads() / (2 if self.dtype == torch.float64 else 1)
            per_byte = CPU_FLOPS_PER_BYTE
        else:
            rate, per_byte = CUDA_RATE / (1 if self.dtype.itemsize <= 2 else 10), CUDA_FLOPS_PER_BYTE
        return max(PART_SECONDS * rate, per_byte * self.streamed_bytes)


def cut_by_work(
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    units: Sequence[Head],
    execution: ScanExecution,
    work: Work,
) -> Plan:
    """`plan` of these prompts and units, cut further where a block would take longer than PART_SECONDS. What the caller
    has set (rows_per_block, prompts_per_group) stays as it is."""
    held, layers = plan.needs.held, len(work.costs.layers)
    forks = sum(layers - layer for layer, _ in units)  # (row, layer) steps, without the unablated row's
    forks_now = max(sum(layers - layer for layer, _ in block) for block in plan.blocks(units))

    def packed(groups: Sequence[Sequence[int]]) -> list[PackedPrompts]:
        return [held.pack(prompts, group) for group in groups]

    def tokens(packs: Sequence[PackedPrompts]) -> np.ndarray:
        """[packs, 2]: of a row that forks, and of what every block repeats."""
        if held.ends_alone:
            ends = [len(np.unique(p.read_index)) for p in packs]
            return np.array([(end, p.num_tokens + end) for end, p in zip(ends, packs, strict=True)])
        return np.array([(p.num_tokens, p.num_tokens) for p in packs])

    packs = packed(plan.prompt_groups)
    per_token = scan_flops(work.costs, packs, units, ends_alone=held.ends_alone)
    per_token /= tokens(packs).sum(0) @ (forks, layers)  # and step
    most_cost = (1 + MOST_MORE) * (tokens(packs).sum(0) @ (forks, layers))

    def cut(groups: list[tuple[int, ...]], sizes: np.ndarray) -> tuple[float, int, list]:
        """FLOPs of the largest block, and the number of blocks, of prompts in these groups."""
        own, repeated = sizes.sum(0) if work.at_once else sizes[(sizes @ (forks, layers)).argmax()]
        affordable = int((most_cost - forks * sizes[:, 0].sum()) / (layers * sizes[:, 1].sum()))
        most_forks = int((work.flops_per_part / per_token - layers * repeated) / own)
        flops = lambda steps: per_token * (own * steps + repeated * layers)
        if forks_now <= most_forks or execution.rows_per_block is not None:
            return flops(forks_now), 1, groups
        wanted = -(-forks // max(1, most_forks))
        blocks = max(1, min(wanted, affordable, len(units)))
        return flops(min(forks_now, forks / blocks)), blocks, groups

    found = cut(list(plan.prompt_groups), tokens(packs))
    per_group, order = max(map(len, plan.prompt_groups)), held.in_order(prompts)
    fixed = work.at_once or execution.prompts_per_group is not None or held.abreast
    while found[0] > work.flops_per_part and per_group > 1 and not fixed:
        per_group = (per_group + 1) // 2
        groups = held.grouped(prompts, order, per_group)
        sizes = tokens(packed(groups))
        # Products as large as before: a row fills a chunk on its own.
        if sizes.sum(0) @ (forks, layers) > most_cost or sizes[:, 0].min() < plan.chunk_tokens:
            break
        found = min(found, cut(groups, sizes), key=lambda each: each[0])
    _, blocks, groups = found
    if groups != list(plan.prompt_groups):
        plan = plan.regrouped(groups, prompts)
    if blocks == 1:
        return plan
    plan = replace(plan, steps_per_block=-(-forks // blocks) + layers)
    return plan.of_rows(max(map(len, plan.blocks(units))))
