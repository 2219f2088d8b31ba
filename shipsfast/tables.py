"""Results as a person reads them in a terminal, and as a program reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .results import ShipsResult


def ranking(result: ShipsResult, top: int, out: Path | None = None, console: Console | None = None) -> None:
    """Print the top heads, and in one line each what ran and where it lies."""
    console = console or Console(highlight=False)
    record = result.record
    mean, spread = result.mean(), result.kl.std(axis=0)
    console.print(f"Ships: KL(base || head ablated), {record.get('ablation', '')}", soft_wrap=True)
    table = Table()
    for name in ("rank", "layer-head", "mean, nats", "std over prompts"):
        table.add_column(name, justify="right")
    for rank, (layer, head, score) in enumerate(result.top(top), 1):
        weak = " (not above the noise floor)" if score <= result.noise_floor else ""
        table.add_row(str(rank), f"{layer}-{head}", f"{score:.6g}{weak}", f"{spread[layer, head]:.3g}")
    console.print(table)
    scanned = int((~np.isnan(mean)).sum())
    console.print(
        f"{scanned} heads x {result.kl.shape[0]} prompts in {record.get('scan_seconds', 0):.2f} s "
        f"({record.get('attention_backend')} attention, {record.get('kl_backend')} KL, "
        f"{result.identity.get('dtype')}); noise floor {result.noise_floor:.2g} nats",
        soft_wrap=True,
    )
    if out is not None:
        console.print(f"run folder: {out}", soft_wrap=True)


def ranking_json(result: ShipsResult, top: int, out: Path | None = None) -> dict:
    """The same as an object."""
    return {
        "top": [{"layer": s.layer, "head": s.head, "mean_kl_nats": s.score} for s in result.top(top)],
        "noise_floor_nats": result.noise_floor,
        "prompts": int(result.kl.shape[0]),
        "run_folder": None if out is None else str(out),
        "record": result.record,
    }
