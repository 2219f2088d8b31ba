"""How fast a model scans on a device, how near that is to what the device can do, and what holds it back.

A sample of heads, the same number in every layer, is scanned within a given time. What a scan of all heads takes
follows from the FLOPs of both (engine/flops.py); the floor is those FLOPs at the rate of the layers' matrix products,
measured in the same run.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from ..engine.flops import gemm_flops_per_s, model_flops, scan_flops
from ..engine.heads import Head
from ..engine.measurement import ScanExecution
from ..engine.memory_plan import CPU_CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from ..errors import InputError
from ..models.restore import untouched
from ..ops.extension import REMEDY, extension_status
from ..text import counted
from .measurements import ShipsMeasurement
from .prepare import Prepared, prepare
from .rates import BUSY, busy_share
from .ships import scan

SECONDS = 20.0  # what the timed scan may take, roughly
PROMPTS, SHARED, OWN = 16, 5, 17  # random prompts where none are given
WORTH = 1.2  # times as fast, from which on another dtype is suggested
LOW_SHARE = 0.6  # of the floor, below which a reason is looked for


@dataclass(frozen=True)
class BenchResult:
    """ablations_per_s: scores, a head on a prompt; tokens_per_s: tokens that a pass for each of them would run
    through the model; all_heads_s: what a scan of all heads would take; share_of_floor: 1 where only the layers'
    matrix products and attention took time; peak_mib: beyond the model, None where it cannot be read."""

    model: str
    device: str
    dtype: str
    prompts: int
    packed_tokens: int
    heads: int
    all_heads: int
    seconds: float
    ablations_per_s: float
    tokens_per_s: float
    all_heads_s: float
    gflops_per_s: float
    gemm_gflops_per_s: float
    floor_s: float
    share_of_floor: float
    peak_mib: float | None
    predicted_mib: float
    attention_backend: str
    kl_backend: str
    layers: str
    layers_why: str | None
    suggestion: str | None
    plan: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)

    def render(self) -> str:
        peak = "not measured" if self.peak_mib is None else f"{self.peak_mib:,.0f} MiB"
        sampled = (
            "" if self.heads == self.all_heads else f" (timed: {self.heads} of them, {self.seconds:.1f} s)"
        )
        why = f" ({self.layers_why})" if self.layers_why else ""
        alone = f", matrix products alone {self.gemm_gflops_per_s:,.3g}"
        return "\n".join(
            [
                f"{self.model} in {self.dtype} on {self.device}",
                f"  {counted(self.prompts, 'prompt')}, {self.packed_tokens} tokens packed",
                f"  {self.ablations_per_s:,.1f} ablations/s, {self.tokens_per_s:,.0f} tokens/s",
                f"  all {self.all_heads} heads: {self.all_heads_s:,.1f} s{sampled}",
                f"  {self.share_of_floor:.0%} of the floor: {self.gflops_per_s:,.3g} GFLOP/s{alone}",
                f"  peak memory beyond the model: {peak}, planned {self.predicted_mib:,.0f} MiB",
                f"  attention by {self.attention_backend}, KL by {self.kl_backend}, layers by {self.layers}{why}",
                f"  to be faster: {self.suggestion}" if self.suggestion else "  nothing known holds it back",
            ]
        )


@untouched
def bench(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    tokenizer=None,
    *,
    template: str = "none",
    backend: str = "auto",
    layers: str = "auto",
    max_memory: int | None = None,
    seconds: float = SECONDS,
    progress: bool = True,
) -> BenchResult:
    """Measure how fast `model` scans.

    Args:
        prompts: as in `scan`; None for random tokens, 16 prompts of 5 shared and 17 own ones.
        seconds: what the timed scan may take; heads are sampled for it, one of every layer at least.
        All others: as in `scan`.
    Raises:
        InputError, UnsupportedModelError: as `scan` does.
    """
    if not seconds > 0:
        raise InputError(f"seconds must be positive, got {seconds}")
    if prompts is None:
        prompts, tokenizer, template = random_prompts(model), None, "none"
    # The error of scores is not asked for, and would take memory that the plan does not know.
    how = dict(template=template, backend=backend, layers=layers, max_memory=max_memory, rescored=0)
    execution = ScanExecution(backend=backend, layers=layers, max_memory=max_memory)
    prepared = prepare(model, tokenizer, ShipsMeasurement(prompts=prompts, template=template), execution)
    costs = model_flops(model, prepared.anatomy, fused=prepared.fused)
    held = prepared.plan.needs.held
    packs = [held.pack(prepared.token_ids, group) for group in prepared.plan.prompt_groups]
    tokens = max(packed.num_tokens for packed in packs)
    chunk = max(tokens, min(prepared.plan.chunk_tokens, tokens * (1 + len(prepared.units))))
    measure = lambda: gemm_flops_per_s(
        costs.products, chunk, dtype=prepared.products, device=prepared.device, repeats=2
    )
    before = measure()
    sample = sample_heads(prepared, lambda heads: scan_flops(costs, packs, heads), seconds * before)
    # Kernels are compiled, libraries loaded and caches filled before anything is timed.
    scan(model, prompts, tokenizer, heads=[sample[0], sample[-1]], progress=False, **how)
    with peak_memory(prepared.device) as peak:
        result = scan(model, prompts, tokenizer, heads=sample, progress=progress, **how)
    rate = (before + measure()) / 2
    faster = faster_dtype(costs.products, chunk, prepared.products, prepared.device)
    taken, record = result.record["scan_seconds"], result.record
    work, whole = scan_flops(costs, packs, sample), scan_flops(costs, packs, prepared.units)
    share = work / rate / max(taken, 1e-9)
    count = len(prepared.token_ids)
    length = sum(map(len, prepared.token_ids))
    return BenchResult(
        model=record["model"]["name"] or record["model"]["class"],
        device=record["device"]["name"],
        dtype=str(model.dtype).removeprefix("torch."),
        prompts=count,
        packed_tokens=sum(packed.num_tokens for packed in packs),
        heads=len(sample),
        all_heads=len(prepared.units),
        seconds=taken,
        ablations_per_s=len(sample) * count / taken,
        tokens_per_s=len(sample) * length / taken,
        all_heads_s=taken * whole / work,
        gflops_per_s=work / taken / 1e9,
        gemm_gflops_per_s=rate / 1e9,
        floor_s=whole / rate,
        share_of_floor=share,
        peak_mib=peak[0],
        predicted_mib=record["plan"]["predicted_bytes"] / 2**20,
        attention_backend=record["attention_backend"],
        kl_backend=record["kl_backend"],
        layers=record["layers"],
        layers_why=record.get("layers_why"),
        suggestion=suggest(prepared, record, tokens, share, faster),
        plan=record["plan"],
    )


def random_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Made-up prompts of random tokens, seeded, as long as the model's context allows."""
    draw, config = random.Random(0), model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or SHARED + OWN
    vocabulary = model.get_input_embeddings().weight.shape[0]
    own = max(1, min(OWN, context - SHARED))
    shared = [draw.randrange(vocabulary) for _ in range(min(SHARED, context - own))]
    return [shared + [draw.randrange(vocabulary) for _ in range(own)] for _ in range(PROMPTS)]


def sample_heads(prepared: Prepared, cost, budget_flops: float) -> list[Head]:
    """As many heads of every layer, evenly spread, as cost no more than the budget; one of each at least."""
    heads, layers = prepared.anatomy.num_heads, prepared.anatomy.num_layers
    most = 1
    while most < heads and cost(_spread(layers, heads, most + 1)) <= budget_flops:
        most += 1
    return _spread(layers, heads, most)


def _spread(layers: int, heads: int, each: int) -> list[Head]:
    return [(layer, heads * i // each) for layer in range(layers) for i in range(each)]


@contextlib.contextmanager
def peak_memory(device: torch.device):
    """A list that holds, afterwards, how far memory rose at its peak, in MiB; None where that cannot be read."""
    found: list[float | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    before, counted = psutil.Process().memory_info().rss, False
    with contextlib.suppress(OSError):  # Linux: the kernel's own peak counts from here
        Path("/proc/self/clear_refs").write_text("5")
        counted = True
    yield found
    found.append(_peak_rss() - before / 2**20 if counted else None)


def _peak_rss() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def faster_dtype(
    products: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Whether the layers' matrix products are faster in another dtype here, by their rates now, in words; None if not."""
    others = [other for other in (torch.float32, torch.bfloat16) if other != dtype]
    rates: dict[torch.dtype, list[float]] = {}
    for each in (dtype, *others) * 3:  # in turns: a busy machine is so for all of them
        found = gemm_flops_per_s(products, tokens, dtype=each, device=device, repeats=1)
        rates.setdefault(each, []).append(found)
    best = max(others, key=lambda each: max(rates[each]))
    gain = max(rates[best]) / max(rates[dtype])
    if gain < WORTH:
        return None
    name, own = (str(each).removeprefix("torch.") for each in (best, dtype))
    cost = ", if it fits" if best.itemsize > dtype.itemsize else ", where its rounding does no harm"
    return f"matrix products are {gain:.1f} times as fast in {name} as in {own} here, measured now: try --dtype {name}{cost}"


def suggest(
    prepared: Prepared, record: dict, tokens: int, share: float, faster: str | None = None
) -> str | None:
    """The one thing that would help most, None if nothing is known to hold the scan back.

    tokens: of the largest pack; share: of the floor; faster: what `faster_dtype` says.
    """
    device, plan = prepared.device, prepared.plan
    loaded, why = extension_status()
    on_gpu = device.type == "cuda"
    if not loaded:
        return why
    if on_gpu and record["attention_backend"] != "triton":
        return f"attention runs by {record['attention_backend']}: install triton (pip install triton), backend auto"
    if on_gpu and record["kl_backend"] != "cpp":
        return f"the extension was built without CUDA: {REMEDY}, a CUDA build of torch and nvcc"
    if faster is not None:
        return faster
    if not on_gpu and record["attention_backend"] in ("torch", "reference"):
        return f"attention runs by {record['attention_backend']}: leave the backend on auto"
    wanted = CUDA_CHUNK_TOKENS if on_gpu else CPU_CHUNK_TOKENS
    blocks = len(plan.blocks(prepared.units)) if plan.steps_per_block is None else 1
    if plan.chunk_tokens < wanted or blocks > 4:
        return (
            f"memory is short: chunks of {plan.chunk_tokens} tokens, {counted(blocks, 'block')} of heads within "
            f"{plan.memory_limit_bytes / 2**30:.2g} GiB; raise --max-memory"
        )
    if tokens * (1 + len(prepared.units)) < wanted:
        return f"there is little to do at a time: {tokens} tokens a row; give more prompts"
    if not on_gpu and share < LOW_SHARE and (busy := busy_share()) > BUSY:
        return f"others keep {busy:.0%} of this machine's cores busy: measure when they do not"
    if not on_gpu and record["layers"] == "model" and share < 0.8:
        return f"layers run by the model's own code ({record['layers_why']}), where fused layers are faster"
    return None
