"""How often a race over prompts keeps the true top k, and what it takes: rehearsed on the scores of complete scans, in many orders.

Nothing is timed. Scores of the real chat model are kept beside the rows, so that only the first run, or other prompts, take a scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import shipsfast
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.results.race import Race, rehearse
from shipsfast.results.statistics import wilson_interval

from . import provenance
from .half import MILD

STORED = "smollm2-mild.npz"
METRICS = {"kl": None, "total_variation": 1.0}  # and what each can be at most
VILLAGE, SMOLLM2 = "village", "smollm2-135m"
TITLES = {VILLAGE: "the embedded model", SMOLLM2: "SmolLM2-135M-Instruct"}
TOPS, ERRORS = (5, 7, 10, 20), (0.05, 0.01)  # SmolLM2's seventh head is made by five of the 64 prompts


def village() -> dict[str, np.ndarray]:
    """Scores float64 [P, L, H] by metric, of ordinary and taboo requests together."""
    prompts = [p for name in ("ordinary", "taboo") for p in load_prompts(PROMPTS / f"{name}.csv")]
    return _scanned(load_model(str(MODEL), dtype="float32"), load_tokenizer(str(MODEL)), prompts)


def smollm2() -> dict[str, np.ndarray]:
    """Scores [P, L, H] by metric of the mild prompts: kept, where they are of these prompts, or scanned and kept."""
    file, prompts = provenance.RESULTS / STORED, load_prompts(MILD)
    of = hashlib.sha256(MILD.read_bytes()).hexdigest()
    if file.is_file():
        with np.load(file) as kept:
            if kept["prompts"] == of:
                return {name: kept[name].astype(np.float64) for name in METRICS}
    from tools.real.fetch import smollm2 as fetched

    path = str(fetched())
    scores = _scanned(load_model(path, dtype="float32"), load_tokenizer(path), prompts)
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, prompts=of, **{name: x.astype(np.float32) for name, x in scores.items()})
    return scores


def _scanned(model, tokenizer, prompts: list) -> dict[str, np.ndarray]:
    found = shipsfast.scan(
        model, prompts, tokenizer, template="chat", metric=list(METRICS), rescored=0, progress=False
    )
    return {name: found.also.get(name, found).scores for name in METRICS}


def layers_above(layers: int, heads: int) -> np.ndarray:
    """float64 [L x H]: what a head costs, its own layer and those above."""
    return np.repeat(np.arange(layers, 0, -1.0), heads)


def rows_of(case: str, scores: dict[str, np.ndarray], orders: int, seed: int = 0) -> Iterator[dict]:
    """A row for each metric, k and error, the bound by spread; and one for a bound by the cap, which takes few orders to see."""
    for metric, x in scores.items():
        cap, (prompts, layers, heads) = METRICS[metric], x.shape
        cost, x = layers_above(layers, heads), x.reshape(prompts, -1)
        for k in (k for k in TOPS if 2 * k < x.shape[1]):
            settings = [(error, None, orders) for error in ERRORS]
            if cap is not None and k == TOPS[0]:
                settings.append((max(ERRORS), cap, min(orders, 20)))
            for error, bounded, times in settings:
                found = rehearse(x, k, error, cost, cap=bounded, orders=times, seed=seed)
                yield {
                    "bench": "race", "case": case, "metric": metric, "k": k, "error": error,
                    "bound": Race(prompts, k, error, cost, cap=bounded).bound, "prompts": prompts, "heads": x.shape[1],
                    "orders": times, "seed": seed, "whole": found.whole, "share": round(float(found.share.mean()), 4),
                    "share_most": round(float(found.share.max()), 4),
                }  # fmt: skip


def run(cases: dict, orders: int, console: Console) -> list[dict]:
    """Rehearse, append and show. cases: name -> what gives its scores."""
    rows = []
    for case, scores in cases.items():
        origin = provenance.provenance("cpu")
        made = track(rows_of(case, scores(), orders), case, console=console)
        rows += [origin | row for row in made]
        provenance.append("race", [row for row in rows if row["case"] == case])
    table = Table(
        "scores", "bound", "k", "error", "top k whole", "share of the work", "at most", title_justify="left"
    )
    for row in rows:
        table.add_row(f"{row['case']}, {row['metric']}", *cells(row), f"{row['share_most']:.0%}")
    console.print(table)
    return rows


CASES = {VILLAGE: village, SMOLLM2: smollm2}


def cells(row: dict) -> list[str]:
    low, _ = wilson_interval(round(row["whole"] * row["orders"]), row["orders"])
    whole = f"{row['whole']:.1%} of {row['orders']:,} (at least {low:.1%})"
    return [row["bound"], str(row["k"]), f"{row['error']:g}", whole, f"{row['share']:.0%}"]


def table() -> str:
    """For docs/top-heads.md: the newest row of each setting."""
    newest = {}
    for row in (row for case in CASES for row in provenance.rows_of("race", case)):
        newest[row["case"], row["metric"], row["bound"], row["k"], row["error"]] = row
    if not newest:
        return "Races over known scores: not measured.\n"
    lines = [
        "| scores | bound | k | error | top k whole | share of the work |",
        "|---|---|---:|---:|---|---:|",
    ]
    for row in newest.values():
        of = f"{TITLES[row['case']]}, {row['metric']}, {row['prompts']} prompts, {row['heads']} heads"
        lines.append(f"| {of} | {' | '.join(cells(row))} |")
    return "\n".join(lines) + "\n"
