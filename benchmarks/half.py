"""The exhaustive scan in half precision on the CPU, beside the same in float32 and beside what others do in half precision.

All paths have the same weights, rounded to bfloat16, and the same prompts, and run interleaved in one process. The truth
is a float64 scan of these weights. Rounding moves the square root of a KL by about as much for every head, so that is what errors
are of: root mean square over heads, of means over prompts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import shipsfast
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.prompts.tokens import to_token_ids

from . import peers
from .cases import CPU_CASES, REAL_MODEL, SMOKE_CASES
from .provenance import ROOT, append, provenance
from .timing import Paths

DTYPE = torch.bfloat16
OURS = "shipsfast"
OWN_LAYERS = "shipsfast, the model's own layers"
FLOAT32 = "shipsfast in float32"
PEERS: dict[str, Callable] = {
    "HF hooks, prompts batched": peers.hooks_batched,
    "heads x prompts as row masks": peers.row_masks,
}
MILD = ROOT / "benchmarks" / "prompts" / "mild.txt"
TOP = 10


def run(console: Console, repeats: int, smoke: bool = False) -> list[dict]:
    """Time, append and show the rows of every case; returns them."""
    rows = []
    for case in SMOKE_CASES[:1] if smoke else CPU_CASES:
        rows += run_case(case.name, case.model(), case.token_ids(), repeats, console)
    if not smoke:
        rows += run_case(REAL_MODEL, *real_model(8), repeats, console)
    return rows


def real_model(prompts: int) -> tuple[torch.nn.Module, list[list[int]]]:
    """SmolLM2-135M-Instruct, and chats of one length, as peers want them."""
    from tools.real.fetch import smollm2

    file = str(smollm2())
    ids = to_token_ids(load_prompts(MILD), load_tokenizer(file), template="chat")
    length = Counter(map(len, ids)).most_common(1)[0][0]
    return load_model(file, dtype="float32"), [each for each in ids if len(each) == length][:prompts]


def run_case(name: str, model, ids: list[list[int]], repeats: int, console: Console) -> list[dict]:
    half = model.to(DTYPE)
    single, tokens = copy.deepcopy(half).float(), torch.tensor(ids)
    truth = np.sqrt(scan(copy.deepcopy(half).double(), ids).kl.mean(0))
    ways = {
        OURS: lambda: scan(half, ids),
        OWN_LAYERS: lambda: scan(half, ids, layers="model"),
        FLOAT32: lambda: scan(single, ids),
    }
    ways |= {peer: lambda run=run: run(half, tokens).permute(2, 0, 1).numpy() for peer, run in PEERS.items()}
    found: dict[str, dict] = {}

    def look(path: str, scores) -> str | None:
        ours = isinstance(scores, shipsfast.ShipsResult)
        mean = (scores.kl if ours else scores).mean(0)
        if not np.isfinite(mean).all():
            return "scores are not finite"
        order, best = (np.argsort(-x, axis=None, kind="stable")[:TOP] for x in (mean, truth))
        found[path] = {
            "rms_error_sqrt_nats": float(np.sqrt(np.mean((np.sqrt(mean.clip(0)) - truth) ** 2))),
            "top_10_found": len(set(order.tolist()) & set(best.tolist())),
            "noise_floor_nats": scores.noise_floor if ours else None,
        }
        if ours:
            found[path] |= {
                key: scores.record.get(key) for key in ("layers", "products", "attention_backend")
            }
        return None

    scan(half, ids)  # a warm-up
    paths = Paths(OURS, list(ways)[1:])
    for _ in range(repeats):
        for path in list(ways)[1:]:
            paths.timed(OURS, ways[OURS], look)
            paths.timed(path, ways[path], look)
            paths.paired(path)
    common = provenance("cpu") | {
        "bench": "half", "case": name, "dtype": str(DTYPE).removeprefix("torch."), "prompts": len(ids), "rescored": 0,
        "scores": int(truth.size) * len(ids),
    }  # fmt: skip
    rows = [common | {"path": path} | found.get(path, {}) | paths.figures(path) for path in ways]
    append("half", rows)
    show(name, rows, console)
    return rows


def scan(model, ids: list[list[int]], **how) -> shipsfast.ShipsResult:
    return shipsfast.scan(model, ids, progress=False, rescored=0, **how)


def show(name: str, rows: list[dict], console: Console) -> None:
    table = Table(title=f"{name}: {rows[0]['scores']} scores in {rows[0]['dtype']}", title_justify="left")
    for column in (
        "path",
        "median s",
        "x shipsfast",
        "error of sqrt(KL)",
        f"of the true top {TOP}",
        "noise floor",
    ):
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["path"], "failed: " + row["failed"])
            continue
        floor = row["noise_floor_nats"]
        table.add_row(
            row["path"], f"{row['median_s']:.2f}", f"{row['times_slower_than_shipsfast']:.2f}",
            f"{row['rms_error_sqrt_nats']:.1e}", str(row["top_10_found"]), "" if floor is None else f"{floor:.1e}",
        )  # fmt: skip
    console.print(table)
