"""Ships of every attention head: KL(p(base) || p(head ablated)) of the next token, exhaustively and exactly."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from . import fused, runs
from ._version import __version__
from .ablation import DEFAULT_SCALE, Ablation, Head, HeadMask, as_ablation, check_heads, dense_rows
from .anatomy import Anatomy, input_device, inspect_model
from .attention import ATTRIBUTE, resolve_backend
from .errors import InputError, UnsupportedModelError
from .metrics import kl_backend, kl_rows
from .packing import pack
from .planner import Plan, even_slices, make_plan
from .prompts import to_token_ids
from .results import ShipsResult, frame
from .wavefront import Wavefront, float32_head, head_precision, last_logits_only

LAYER_PATHS = ("auto", "model", "fused")

# By how much, in nats and relative to the score, the packed unablated model and single spot-checked scores may
# differ from the model's own forward before the model is refused. These are alarms for a model that does
# something unknown, far above rounding; how exact a scan is shows in its noise floor.
ALARM_NATS = {
    torch.float64: (1e-8, 1e-6),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.1, 0.2),
    torch.float16: (0.02, 0.1),
}


def scan(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer=None,
    *,
    template: str = "none",
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    heads: Iterable[Sequence[int | None]] | None = None,
    backend: str = "auto",
    layers: str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
    max_memory: int | None = None,
    chunk_tokens: int | None = None,
    rows_per_block: int | None = None,
    prompts_per_group: int | None = None,
) -> ShipsResult:
    """Switch off every head, one at a time, and measure how far the next-token distribution moves.

    Ships of arXiv 2410.13708, eq. 9: for each prompt and head KL(p(base) || p(ablated)) in nats, over the
    full vocabulary, of the token that follows the prompt. All heads are measured in one growing batch
    (wavefront.py); the scores are those of one forward pass per head and prompt, up to rounding.

    Args:
        model: a transformers causal language model, already loaded. It is put back as it was.
        prompts: P strings (then `tokenizer` is needed) or P lists of token ids.
        template: how strings are wrapped: "none", "chat", "query-answer" or a text with {prompt}.
        ablation, scale: "undifferentiated", "uniform", "scale" or "zero" with its eps, or an `Ablation`.
        heads: (layer, head) pairs, from 0, to scan; (layer, None) for a whole layer; None for all.
        backend: attention: "auto", "triton", "torch" or "reference". Named, it runs or raises.
        layers: how rows pass a decoder layer: "model" is the layer's own forward, "fused" the faster way of
            fused.py for Llama-like models on a CPU, "auto" the second where it can. Named, it runs or raises.
        out: run folder. What is finished is kept there, and the same scan continues from it.
        progress: a progress bar on stderr.
        max_memory: bytes to use beyond the model, default from what is free.
        chunk_tokens, rows_per_block, prompts_per_group: override the memory plan.
    Returns:
        ShipsResult with .kl float64 [P, L, H], NaN for heads not in `heads`.
    Raises:
        InputError: bad prompts, heads, ablation, backend or folder.
        UnsupportedModelError: the model cannot be scanned exactly.
    """
    started = time.perf_counter()
    how = as_ablation(ablation, scale)
    token_ids = to_token_ids(prompts, tokenizer, template)
    check_model(model, token_ids)
    anatomy = inspect_model(model, max(token_ids, key=len), max(map(len, token_ids)))
    if any(ATTRIBUTE in layer.attention.__dict__ for layer in anatomy.layers):
        raise InputError("the model is inside shipsfast.ablate: leave that context before scanning")
    grid = [(layer, None) for layer in range(anatomy.num_layers)] if heads is None else heads
    chosen = check_heads(grid, anatomy.num_layers, anatomy.num_heads)
    device = input_device(model)
    resolved = resolve_backend(backend, device, model.dtype)
    use_fused = _use_fused(layers, anatomy, model.dtype, device)
    plan = make_plan(
        anatomy, token_ids, len(chosen), device=device, dtype=model.dtype, max_memory=max_memory,
        chunk_tokens=chunk_tokens, rows_per_block=rows_per_block, prompts_per_group=prompts_per_group,
    )  # fmt: skip

    shape = (len(token_ids), anatomy.num_layers, anatomy.num_heads)
    identity = {
        "kind": "ships",
        "fingerprint": runs.fingerprint(model),
        "prompts": runs.prompt_hashes(token_ids),
        "ablation": {"kind": how.kind, "logit_scale": how.logit_scale, "output_scale": how.output_scale},
        "heads": "all" if len(chosen) == shape[1] * shape[2] else [list(h) for h in chosen],
        "dtype": str(model.dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    record = describe_run(model, anatomy, device) | {
        "ablation": how.describe(),
        "template": template,
        "attention_backend": resolved,
        "layers": "fused" if use_fused else "model",
        "kl_backend": kl_backend(device),
        "head_precision": head_precision(model),
    }
    kl = np.full(shape, np.nan)
    folder = None
    checks = _Checks(model, anatomy, token_ids, how)
    if out is not None:
        folder = runs.RunFolder(out, identity)
        kl = runs.read_scores(folder.path, shape)
        if folder.previous.get("status") == "complete":
            return ShipsResult.load(folder.path)
        checks.noise_floor = folder.previous.get("noise_floor_nats") or 0.0
        folder.write_manifest(
            record | {"status": "running", "plan": plan.to_json(), "noise_floor_nats": checks.noise_floor}
        )

    work = _Work(kl, chosen, plan, anatomy, progress)
    try:
        for group in plan.prompt_groups:
            plan = _scan_group(
                model, anatomy, token_ids, group, how, resolved, use_fused, plan, work, checks, folder
            )
    finally:
        work.close()
    checks.spot(kl, chosen)
    record |= {
        "plan": plan.to_json(),
        "seconds": round(time.perf_counter() - started, 3),
        "scan_seconds": round(work.seconds, 3),
        "spot_check_max_abs_nats": checks.worst_spot,
    }
    result = ShipsResult(kl, checks.noise_floor, record, identity)
    if folder is not None:
        folder.write_manifest(record | {"status": "complete", "noise_floor_nats": checks.noise_floor})
    return result


def _use_fused(layers: str, anatomy: Anatomy, dtype: torch.dtype, device: torch.device) -> bool:
    if layers not in LAYER_PATHS:
        raise InputError(f"unknown layers {layers!r}: expected one of {', '.join(LAYER_PATHS)}")
    if layers == "model":
        return False
    problem = fused.why_not([layer.module for layer in anatomy.layers], dtype, device)
    if layers == "fused" and problem:
        raise InputError(f"layers 'fused' cannot run: {problem}; use layers='model' or 'auto'")
    return problem is None


class _Work:
    """The scores, which of them are still to be made, and the progress bar."""

    def __init__(
        self, kl: np.ndarray, heads: list[Head], plan: Plan, anatomy: Anatomy, progress: bool
    ) -> None:
        self.kl, self.heads, self.num_layers = kl, heads, anatomy.num_layers
        steps = sum(
            self.steps(block)
            for group in plan.prompt_groups
            for block in self.blocks(group, plan.rows_per_block)
        )
        self.bar = tqdm(
            total=steps, desc="scan", unit=" layer passes", unit_scale=True, disable=not progress or not steps
        )
        self.started = time.perf_counter()
        self.seconds = 0.0

    def blocks(self, group: Sequence[int], most: int) -> list[list[Head]]:
        missing = [h for h in self.heads if np.isnan(self.kl[list(group), h[0], h[1]]).any()]
        return [missing[part] for part in even_slices(len(missing), most)]

    def steps(self, block: Sequence[Head]) -> int:
        return self.num_layers + sum(self.num_layers - layer for layer, _ in block)

    def close(self) -> None:
        self.bar.close()
        self.seconds = time.perf_counter() - self.started


def _scan_group(
    model, anatomy, token_ids, group, how, backend, use_fused, plan, work, checks, folder
) -> Plan:
    """Score what is missing for one group of prompts. Returns the plan, made smaller if memory ran out."""
    packed = pack([token_ids[i] for i in group])
    while blocks := work.blocks(group, plan.rows_per_block):
        wavefront = Wavefront(
            model, anatomy, packed, backend=backend, chunk_tokens=plan.chunk_tokens,
            head_rows=plan.head_rows, tick=work.bar.update, fused=use_fused,
        )  # fmt: skip
        done = work.bar.n
        try:
            for block in blocks:
                done = work.bar.n
                with wavefront:
                    scores, base = _score(wavefront, block, how)
                checks.noise(group, base, wavefront.prompt_place)
                _check_numbers(scores, group, block, how)
                for (layer, head), column in zip(block, scores.T, strict=True):
                    work.kl[list(group), layer, head] = column
                if folder is not None:
                    part = np.full_like(work.kl, np.nan)
                    for layer, head in block:
                        part[list(group), layer, head] = work.kl[list(group), layer, head]
                    folder.write_part(frame(part))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            smaller = plan.smaller()
            if smaller is None:
                raise InputError(
                    "out of memory even with the smallest plan: free some, or shorten the longest prompt"
                ) from error
            plan = smaller
            work.bar.update(done - work.bar.n)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return plan


def _is_out_of_memory(error: BaseException) -> bool:
    """A CPU that cannot allocate says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _check_numbers(scores: np.ndarray, group: Sequence[int], block: list[Head], how: Ablation) -> None:
    """Raises InputError, naming prompt and head, if a score is not a number: it would be missing for ever."""
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        prompt, (layer, head) = group[bad[0][0]], block[bad[0][1]]
        raise InputError(
            f"the score of head {layer}-{head} on prompt {prompt} is not a number: with {how.describe()} the model "
            "overflows; use a smaller scale or a wider dtype"
        )


def _score(wavefront: Wavefront, block: list[Head], how: Ablation) -> tuple[np.ndarray, torch.Tensor]:
    """KL of every (prompt, head of the block), float64 [P, heads], and the base logits [U, V]."""
    mask = HeadMask(((), *((head,) for head in block)), how)
    columns: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def consume(rows: slice, logits: torch.Tensor, base: torch.Tensor) -> None:
        if not kept:
            kept.append(base)
        row_map = torch.arange(base.shape[0], device=base.device).repeat(logits.shape[0])
        columns.append(kl_rows(base, logits.reshape(-1, logits.shape[-1]), row_map).view(logits.shape[:2]))

    wavefront.run(mask, consume)
    scores = torch.cat(columns)[1:].cpu().numpy()  # [heads, U]
    return scores[:, wavefront.prompt_place].T, kept[0]


class _Checks:
    """The scan held against the model's own forward, one prompt at a time and unpacked."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, token_ids: list[list[int]], how: Ablation
    ) -> None:
        self.model, self.anatomy, self.token_ids, self.how = model, anatomy, token_ids, how
        self.alarm, self.relative = ALARM_NATS.get(model.dtype, ALARM_NATS[torch.float32])
        self.noise_floor = 0.0
        self.worst_spot: float | None = None
        self._compared = False

    def noise(self, group: Sequence[int], base: torch.Tensor, place: np.ndarray) -> None:
        """Noise floor: KL between the packed and the plain unablated model.

        Taken on the longest prompt of the first group; of several, on the one packed last, which packing
        moves most.
        """
        if self._compared:
            return
        self._compared = True
        at = max(range(len(group)), key=lambda i: (len(self.token_ids[group[i]]), i))
        prompt = group[at]
        plain = self._logits(prompt, 1)[0]
        noise = float(_kl(plain, base[place[at]].to(plain.device)))
        if not noise <= self.alarm:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives other answers when its prompts are packed (KL {noise:.3g} nats "
                f"on prompt {prompt}): its attention does something shipsfast does not know, or its logits are "
                "not finite"
            )
        self.noise_floor = max(self.noise_floor, noise)

    def spot(self, kl: np.ndarray, heads: list[Head]) -> None:
        """Recompute two scores of the longest prompt by a plain forward pass, its rows with a head ablated each."""
        prompt = max(range(len(self.token_ids)), key=lambda i: len(self.token_ids[i]))
        strongest = max(heads, key=lambda h: kl[prompt, h[0], h[1]])
        chosen = sorted({strongest, heads[len(heads) // 2]})
        # The base row too: transformers' eager attention rounds its softmax to float32, in float64 models as well.
        # It comes last, unlike in the scan: a model whose rows disturb each other gives other scores then.
        mask = HeadMask((*((head,) for head in chosen), ()), self.how)
        with dense_rows(self.model, self.anatomy, mask):
            *ablated, base = self._logits(prompt, len(mask))
        self.worst_spot = 0.0
        for head, logits in zip(chosen, ablated, strict=True):
            expected = float(_kl(base, logits))
            error = abs(expected - kl[prompt, head[0], head[1]])
            if not error <= self.alarm + self.relative * abs(expected):
                raise UnsupportedModelError(
                    f"the score of head {head[0]}-{head[1]} on prompt {prompt} is {kl[prompt, head[0], head[1]]:.6g}, "
                    f"a plain forward pass gives {expected:.6g}: {type(self.model).__name__} cannot be scanned exactly"
                )
            self.worst_spot = max(self.worst_spot, error)

    @torch.inference_mode()
    def _logits(self, prompt: int, rows: int) -> torch.Tensor:
        """Next-token logits [rows, V] by the model's own forward, every row the same prompt."""
        ids = torch.tensor([self.token_ids[prompt]] * rows, device=input_device(self.model))
        training = [m for m in self.model.modules() if m.training]
        try:
            for module in training:
                module.training = False
            with float32_head(self.model):
                keep = last_logits_only(self.model)
                return self.model(input_ids=ids, use_cache=False, return_dict=True, **keep).logits[:, -1]
        finally:
            for module in training:
                module.training = True


def _kl(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return kl_rows(
        base[None], other[None].to(base.dtype), torch.zeros(1, dtype=torch.long, device=base.device)
    )[0]


def check_model(model, token_ids: list[list[int]]) -> None:
    """Raises InputError for an object that is no model, and for prompts that do not fit it."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers causal language model, got {type(model).__name__}: "
            "load one with AutoModelForCausalLM.from_pretrained"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM"
        )
    devices = {p.device for p in model.parameters()}
    if (
        len(devices) > 1
        or any(d.type == "meta" for d in devices)
        or any("_hf_hook" in m.__dict__ for m in model.modules())
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over several devices or offloaded: load it onto one device to scan it"
        )
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__} shares keys and values between layers: it cannot be scanned"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for i, ids in enumerate(token_ids):
        if context is not None and len(ids) > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the model's context is {context}: shorten or remove it"
            )
        if not (0 <= min(ids) and max(ids) < vocabulary):
            raise InputError(f"prompt {i} has token ids outside the model's vocabulary of {vocabulary}")


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
