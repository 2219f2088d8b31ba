"""Results as a person reads them in a terminal, and as a program reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .errors import InputError
from .results import SaharaResult, ShipsResult, SubspaceResult
from .statistics import RankStability


def show(result, top: int, out: Path | None = None, console: Console | None = None) -> None:
    """Print the top heads, and in one line each what ran and where it lies."""
    console = console or Console(highlight=False)
    printer = {ShipsResult: _ships, SubspaceResult: _subspace, SaharaResult: _sahara}[type(result)]
    printer(result, top, console)
    record = result.record
    console.print(
        f"{record.get('attention_backend')} attention, {record.get('layers')} layers, "
        f"{result.identity.get('dtype')}, {record.get('seconds', 0):.2f} s in all",
        soft_wrap=True,
    )
    if out is not None:
        console.print(f"run folder: {out}", soft_wrap=True)


def as_json(result, top: int, out: Path | None = None) -> dict:
    """The same as an object."""
    shared = {"run_folder": None if out is None else str(out), "record": result.record}
    if isinstance(result, SaharaResult):
        return result.outcome() | {"angle_deg": result.scores, "noise_floor": result.noise_floor} | shared
    name = "angle_deg" if isinstance(result, SubspaceResult) else _score_name(result)
    found = [{"layer": s.layer, "head": s.head, name: s.score} for s in result.top(top)]
    body = {
        "top": found,
        "noise_floor": result.noise_floor,
        "concentration": result.concentration().to_json(),
    }
    if isinstance(result, ShipsResult):
        body |= {"metric": result.metric, "prompts": int(result.scores.shape[0])}
        stability, problem = _stability(result, top)
        body["stability"] = {"not_known": problem} if stability is None else stability.to_json()
    return body | shared


def _score_name(result: ShipsResult) -> str:
    return "mean_kl_nats" if result.metric["name"] == "kl" else "mean_score"


def _stability(result: ShipsResult, top: int) -> tuple[RankStability | None, str]:
    """The bootstrap over prompts; None and the reason where there is nothing to resample."""
    if result.scores.shape[0] == 1:
        return None, "one prompt: no intervals"
    try:
        return result.stability(top), ""
    except InputError as problem:  # a head scanned in part, or an infinite score
        return None, f"no intervals: {problem}"


def _grid(*names: str) -> Table:
    table = Table()
    for name in names:
        table.add_column(name, justify="right")
    return table


def _weak(result, layer: int, head: int) -> str:
    return "" if result.above_noise()[layer, head] else " (not above the noise floor)"


def _concentration(result, console: Console) -> None:
    found = result.concentration()
    shares = ", ".join(f"top {k} {share:.0%}" for k, share in found.top_share.items() if not np.isnan(share))
    if shares:
        console.print(
            f"concentration: {shares}; Gini {found.gini:.2f}, {found.effective_heads:.1f} effective {result.unit}s",
            soft_wrap=True,
        )


def _ships(result: ShipsResult, top: int, console: Console) -> None:
    mean, metric = result.mean(), result.metric
    unit = f", {metric['unit']}" if metric["unit"] else ""
    console.print(f"Ships: {metric['label']}, {result.record.get('ablation', '')}", soft_wrap=True)
    stability, problem = _stability(result, top)
    names = ["rank", f"layer-{result.unit}", f"mean{unit}"]
    if stability is not None:
        names += [f"{stability.confidence:.0%} interval", "rank interval", f"in top {stability.k}"]
    table = _grid(*names)
    for rank, (layer, head, score) in enumerate(result.top(top), 1):
        row = [str(rank), f"{layer}-{head}", f"{score:.6g}{_weak(result, layer, head)}"]
        if stability is not None:
            at = (layer, head)
            row += [
                f"{stability.low[at]:.3g} to {stability.high[at]:.3g}",
                f"{stability.rank_low[at]:.0f} to {stability.rank_high[at]:.0f}",
                f"{stability.top_k_frequency[at]:.0%}",
            ]
        table.add_row(*row)
    console.print(table)
    scanned = int((~np.isnan(mean)).sum())
    weak = scanned - int(result.above_noise().sum())
    console.print(
        f"{scanned} {result.unit}s x {result.scores.shape[0]} prompts in {result.record.get('scan_seconds', 0):.2f} s; "
        f"noise floor {result.noise_floor:.2g}{' ' * bool(metric['unit'])}{metric['unit']}, {f'{weak} heads not above it' if weak else 'all above it'}",
        soft_wrap=True,
    )
    if stability is None:
        console.print(problem, soft_wrap=True)
    else:
        console.print(
            f"resampling the prompts keeps {stability.top_k_overlap:.0%} of the top {stability.k}",
            soft_wrap=True,
        )
    _concentration(result, console)


def _subspace(result: SubspaceResult, top: int, console: Console) -> None:
    console.print(
        f"Dataset-level Ships: rank {result.identity.get('rank')}, {result.record.get('ablation', '')}",
        soft_wrap=True,
    )
    table = _grid("rank", f"layer-{result.unit}", "angle, degrees")
    for rank, (layer, head, score) in enumerate(result.top(top), 1):
        table.add_row(str(rank), f"{layer}-{head}", f"{score:.6g}{_weak(result, layer, head)}")
    console.print(table)
    console.print(f"noise floor {result.noise_floor:.2g} degrees", soft_wrap=True)
    _concentration(result, console)


def _sahara(result: SaharaResult, top: int, console: Console) -> None:
    console.print(
        f"Sahara: rank {result.identity.get('rank')}, {result.record.get('ablation', '')}", soft_wrap=True
    )
    table = _grid("step", f"layer-{result.unit}", "angle of the group, degrees", "next best")
    for step, ((layer, head), angle) in enumerate(zip(result.heads, result.scores, strict=True)):
        others = [s for s in result.top(2, step) if (s.layer, s.head) != (layer, head)][:1]
        runner_up = "".join(f"{s.layer}-{s.head} ({s.score:.4g})" for s in others)
        table.add_row(str(step + 1), f"{layer}-{head}", f"{angle:.6g}", runner_up)
    console.print(table)
    if len(result.beams) > 1:
        for group, angle in result.beams[1:]:
            console.print(f"also kept: {', '.join(f'{i}-{j}' for i, j in group)} ({angle:.6g} degrees)")
    console.print(f"noise floor {result.noise_floor:.2g} degrees", soft_wrap=True)
