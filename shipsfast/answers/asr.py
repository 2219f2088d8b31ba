"""The exhaustive full-generation scan: the attack success rate of every single head.

It is the experiment that arXiv 2410.13708 prices at about 850 GPU-hours (table 2) and scores heads by the next token
instead to avoid. Here it is a generation like any other, with one group per head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..clock import seconds_since
from ..engine.ablation import DEFAULT_SCALE, Ablation
from ..engine.heads import Head, check_heads
from ..engine.subject import Subject
from ..models.restore import untouched
from ..results.completions import MISSING, Completions
from ..results.ships import ShipsResult, column
from ..runs.folder import RunFolder
from ..runs.kinds import LABELS
from ..runs.tables import score_frame
from .evaluate import check_texts, describe_generation, fill
from .generate import NEW_TOKENS, prepare_generation
from .judges.choose import as_judge
from .judges.judge import Judge
from .sampling import TOP_K, Sampling

METRIC = {
    "name": "asr",
    "unit": "",
    "signed": False,
    "title": "Attack success rate",
    "label": "attack success rate with the head off",
    "floor": "the unablated model's rate",
}
NAMES = ("prompt", "layer", "head")


@untouched
def scan_asr(
    model: PreTrainedModel,
    prompts: Sequence[str],
    tokenizer,
    *,
    judge: str | Judge | Callable = "keywords",
    heads: Iterable[Sequence[int | None]] | None = None,
    max_new_tokens: int = NEW_TOKENS,
    do_sample: bool = False,
    top_k: int = TOP_K,
    temperature: float = 1.0,
    seed: int = 0,
    template: str = "none",
    ablation: str | Ablation = "undifferentiated",
    scale: float = DEFAULT_SCALE,
    unit: str = "head",
    eos_token_id: int | Sequence[int] | None = None,
    backend: str = "auto",
    layers: str = "auto",
    out: str | Path | None = None,
    keep_text: bool = False,
    max_memory: int | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> ShipsResult:
    """Answer every prompt with every head off, one at a time, and judge the answers.

    Arguments as in `evaluate` and, for heads and unit, as in `scan`.
    Returns:
        ShipsResult of the metric "asr": .scores float64 [P, L, H] are 1 for an answer that complied and 0 for one that
        did not, .mean() is each head's attack success rate, .noise_floor that of the unablated model. .record has
        its share of refusals and degenerate answers as well, and, beside the scores, mean shares of "degenerate" by
        head are in .record["degenerate"], [L][H].
    Raises:
        As `evaluate` does.
    """
    started = time.perf_counter()
    judge = as_judge(judge)
    check_texts(tokenizer, prompts, judge, out)
    units: list[Head] = []

    def groups(subject: Subject) -> list[list[Head]]:
        number = subject.anatomy.num_layers
        grid = [(layer, None) for layer in range(number)] if heads is None else heads
        units.extend(check_heads(grid, number, subject.num_units, unit))
        return [[], *([each] for each in units)]

    generation = prepare_generation(
        model, prompts, tokenizer, groups=groups, max_new_tokens=max_new_tokens,
        sampling=Sampling(do_sample, top_k, temperature, seed), template=template, ablation=ablation, scale=scale,
        unit=unit, eos_token_id=eos_token_id, backend=backend, layers=layers, max_memory=max_memory,
        batch_rows=batch_rows,
    )  # fmt: skip
    subject = generation.subject
    shape = [len(prompts), subject.anatomy.num_layers, subject.num_units]
    identity = subject.describe("ships") | {
        "metric": {
            "name": "asr",
            "judge": judge.describe(),
            "generation": describe_generation(generation),
        },
        "heads": "all" if len(units) == shape[1] * shape[2] else [list(u) for u in units],
        "shape": shape,
        "keep_text": keep_text,
    }
    folder = None if out is None else RunFolder(out, identity, subject.record)
    found = folder and folder.finished(ShipsResult.load)
    if found is not None:
        return found
    record = subject.record | {"metric": METRIC, "plan": generation.plan.to_json(), "judge": judge.name}
    completions = Completions(1 + len(units), len(prompts), keep_text=keep_text)
    if folder is not None:
        completions.read(folder.path)
        folder.write_manifest(record | {"status": "running"})
    scan_started = time.perf_counter()
    record["spot_check_max_deficit"] = fill(
        generation, completions, prompts, tokenizer, judge, folder, progress
    )
    record |= {
        "plan": generation.plan.to_json(),
        "scan_seconds": seconds_since(scan_started),
        "unablated": {label: float(completions.share(label)[0]) for label in LABELS},
        "degenerate": _by_head(completions, units, shape),
    }
    result = ShipsResult(
        _scores(completions, units, shape), float(completions.share("complied")[0]), record, identity
    )
    record["concentration"] = result.concentration().to_json()
    record["seconds"] = seconds_since(started)
    if folder is not None:
        kept = ShipsResult.read(folder.path, tuple(shape), METRIC)
        new = np.where(np.isnan(kept), result.scores, np.nan)  # none twice
        folder.write_part(score_frame(new, NAMES, column(METRIC)))
        folder.write_manifest(record | {"status": "complete", "noise_floor": result.noise_floor})
    return result


def _scores(completions: Completions, units: list[Head], shape: list[int]) -> np.ndarray:
    scores = np.full(shape, np.nan)
    for (layer, index), label in zip(units, completions.label[1:], strict=True):
        scores[:, layer, index] = np.where(label == MISSING, np.nan, label == LABELS.index("complied"))
    return scores


def _by_head(completions: Completions, units: list[Head], shape: list[int]) -> list[list[float | None]]:
    out: list[list[float | None]] = [[None] * shape[2] for _ in range(shape[1])]
    for (layer, index), share in zip(units, completions.share("degenerate")[1:], strict=True):
        out[layer][index] = float(share)
    return out
