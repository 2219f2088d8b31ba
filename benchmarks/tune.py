"""Finds launch parameters of the Triton kernels for the device at hand, and writes kernels/configs/<device>.json.

    python -m benchmarks.tune --dry-run   without a GPU: compile every candidate, and drop what spills or does not fit
    python -m benchmarks.tune             time what is left at the scan's shapes, and print the best of each
    python -m benchmarks.tune --update    and write them

Tree attention is tuned per kind of tree (kernels/tree_kind.py), with prompts that are of that kind. Every candidate is
held against the reference before it is timed, and one in use is only replaced by one that is faster by more than NOISE.
Where chips share a file (sm_90.json: H100 and H200), the last one tuned decides. After an update,
`python -m benchmarks.aot --update` records what the new code costs on the chip.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from . import aot, config_files

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128, 256)
CHIPS = aot.OWN_FILE
NOISE = 0.02
# kernel -> kind of tree -> half precision or float32 -> what is tried
GRID = {
    "tree_attention": {
        "leaves": {
            "half": dict(block_m=(16, 32, 64), block_n=(16, 32, 64), num_warps=(2, 4), num_stages=(2, 3)),
            "float32": dict(block_m=(16, 32), block_n=(16, 32), num_warps=(2, 4, 8), num_stages=(2, 3)),
        },
        "template": {
            "half": dict(block_m=(64, 128), block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
            "float32": dict(block_m=(32, 64), block_n=(16, 32, 64), num_warps=(4, 8), num_stages=(2, 3)),
        },
    },
    "decode_attention": {
        "any": {
            "half": dict(
                block_m=(16,), block_n=(16, 32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 3, 4),
                max_registers=(None, 128, 168),
            ),
            "float32": dict(
                block_m=(16,), block_n=(16, 32, 64), num_warps=(2, 4, 8), num_stages=(2, 3), max_registers=(None,)
            ),
        },
    },
}  # fmt: skip
SHARED = {"leaves": 5, "template": 140}  # tokens that the prompts of a kind have in common


@dataclass(frozen=True)
class Task:
    """An entry of a config file."""

    kernel: str
    kind: str
    dtype: str
    head_dim: int

    @property
    def id(self) -> str:
        return f"{self.kernel} {self.kind} {self.dtype} D{self.head_dim}"


def tasks(
    kernel: str | None = None, kind: str | None = None, dtype: str | None = None, head_dim: int | None = None
) -> list[Task]:
    return [
        Task(*each)
        for name, kinds in GRID.items()
        for each in itertools.product((name,), kinds, DTYPES, HEAD_DIMS)
        if all(
            wanted in (None, own) for wanted, own in zip((kernel, kind, dtype, head_dim), each, strict=True)
        )
    ]


def in_use(task: Task, sm: int):
    """The LaunchConfig that the file of a chip has for a task."""
    from shipsfast.kernels.launch_config import load_configs

    return load_configs(f"sm_{sm}")[task.kernel][task.kind][task.dtype][task.head_dim]


def candidates(task: Task) -> list:
    """Launch configurations to try, those in use for a chip first."""
    from shipsfast.kernels.launch_config import LaunchConfig

    grid = GRID[task.kernel][task.kind]["float32" if task.dtype == "float32" else "half"]
    found = [in_use(task, sm) for sm in CHIPS]
    found += [
        LaunchConfig(**dict(zip(grid, values, strict=True)), unmasked_loop=task.kind != "leaves")
        for values in itertools.product(*grid.values())
    ]
    return list(dict.fromkeys(found))


def compiled(task: Task, config, sm: int) -> dict:
    """What a candidate costs on a chip, in the smallest and the largest version of its kernel; `problem` says why it is
    out, None for one that may run."""
    worst = {"registers": 0, "local_bytes": 0, "shared_bytes": 0}
    try:
        for every in (False, True):
            case = aot.Case(
                task.kernel, f"sm_{sm}", sm, task.kind, task.dtype, task.head_dim, 4, every, every
            )
            use = aot.compile_case(case, config)
            worst = {name: max(value, use[name]) for name, value in worst.items()}
            tensor_cores = use["wgmma"] + use["mma_sync"] > 0
    except Exception as error:  # noqa: BLE001 (whatever the compiler cannot do is no candidate)
        return worst | {
            "problem": f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        }
    problem = None
    if worst["local_bytes"]:
        problem = f"spills {worst['local_bytes']} bytes a thread"
    elif worst["shared_bytes"] > aot.CHIPS[sm].shared_per_block:
        problem = f"needs {worst['shared_bytes']} bytes of shared memory"
    elif worst["registers"] > aot.REGISTER_LIMIT:
        problem = f"needs {worst['registers']} registers a thread"
    elif task.dtype != "float32" and not tensor_cores:
        problem = "uses no tensor cores"
    return worst | {"problem": problem}


def _compiled(job: tuple) -> dict:
    return compiled(*job)


def survivors(chosen: list[Task], chips: tuple[int, ...], limit: int | None, jobs: int) -> list[dict]:
    """One record per task, chip and candidate."""
    todo = [(task, config, sm) for task in chosen for sm in chips for config in candidates(task)[:limit]]
    if jobs == 1:
        costs = list(map(_compiled, todo))
    else:
        # spawn: a forked child would inherit Triton's compiler state
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            costs = list(pool.map(_compiled, todo))
    return [
        {"task": task, "sm": sm, "config": config, "wasted_products": wasted(task, config), **cost}
        for (task, config, sm), cost in zip(todo, costs, strict=True)
    ]


@functools.cache
def packed(kind: str, prompts: int = 100):
    """Prompts of a kind, packed."""
    from .gpu.shapes import Prompts

    return Prompts(prompts, SHARED[kind]).packed(32000)


def wasted(task: Task, config) -> float | None:
    """Products that a candidate's tiles compute for each that is needed, with prompts of the task's kind."""
    from shipsfast.kernels.tree_kind import wasted_products

    if task.kind not in SHARED:
        return None
    tree = packed(task.kind)
    return round(wasted_products(tree.position, tree.subtree_end, (config.block_m, config.block_n)), 2)


def measured_ms(task: Task, config, device) -> float:
    """Median time of a candidate at the scan's shapes. Raises ValueError if its numbers are off."""
    import torch

    from .gpu.clock import timed

    run, check = (_tree if task.kernel == "tree_attention" else _decode)(task, config, device)
    check(run())
    timing = timed(run, torch.device(device), budget_s=0.1)
    return 1e3 * timing.median


def _close(out, expected, plain) -> None:
    error = float((out.float() - expected).abs().max())
    allowed = 2 * float((plain.float() - expected).abs().max()) + 1e-3
    if not error <= allowed:
        raise ValueError(f"differs from float32 by {error:.3g}, allowed are {allowed:.3g}")


def _tree(task: Task, config, device, prompts: int = 100, rows: int = 9, heads: int = 32):
    import torch
    from shipsfast.kernels.block_table import block_table
    from shipsfast.kernels.tree_attention import tree_attention

    from shipsfast.ops import reference

    tree = packed(task.kind, prompts)
    torch.manual_seed(0)
    dtype = getattr(torch, task.dtype)
    make = lambda: torch.randn(
        rows, tree.num_tokens, heads, task.head_dim, dtype=dtype, device=device
    ).transpose(1, 2)
    q, k, v = make(), make(), make()
    ones = torch.ones(rows, heads, device=device)
    position, end = (torch.as_tensor(x, device=device) for x in (tree.position, tree.subtree_end))
    table = block_table(
        tree.position, tree.subtree_end, block_m=config.block_m, block_n=config.block_n, device=device
    )
    scaling = task.head_dim**-0.5
    run = lambda: tree_attention(
        q, k, v, ones, ones, position, end, scaling=scaling, block_table=table, config=config
    )
    one = lambda cast: reference.tree_attention(
        *(cast(x[:1]) for x in (q, k, v)), ones[:1], ones[:1], position, end, scaling=scaling
    )
    return run, lambda out: _close(out[:1], one(torch.Tensor.float), one(lambda x: x))


def _decode(
    task: Task, config, device, rows: int = 512, heads: int = 32, kv_heads: int = 8, capacity: int = 160
):
    import torch
    from shipsfast.kernels.decode_attention import decode_attention

    from shipsfast.ops import reference

    torch.manual_seed(0)
    dtype = getattr(torch, task.dtype)
    q = torch.randn(rows, heads, task.head_dim, dtype=dtype, device=device)
    k, v = (
        torch.randn(rows, kv_heads, capacity, task.head_dim, dtype=dtype, device=device) for _ in range(2)
    )
    slot = torch.arange(rows, dtype=torch.int32, device=device)
    length = torch.randint(capacity // 6, capacity, (rows,), dtype=torch.int32, device=device)
    ones = torch.ones(rows, heads, device=device)
    scaling = task.head_dim**-0.5
    run = lambda: decode_attention(q, k, v, slot, length, ones, ones, scaling=scaling, config=config)
    one = lambda cast: reference.decode_attention(
        cast(q[:2]), cast(k[:2]), cast(v[:2]), slot[:2], length[:2], ones[:2], ones[:2], scaling=scaling
    )
    return run, lambda out: _close(out[:2], one(torch.Tensor.float), one(lambda x: x))


def tune(records: list[dict], device, measure=measured_ms, budget_s: float = float("inf")) -> list[dict]:
    """Times what may run; per task the record of the best, with `ms` and `before_ms` of the one in use.

    budget_s: of all tasks together; those in use are timed first, then the others in a seeded random order.
    """
    best = []
    all_tasks = list(dict.fromkeys(record["task"] for record in records))
    for task in all_tasks:
        timed = []
        own = [record for record in records if record["task"] == task and record["problem"] is None]
        rest = own[len(CHIPS) :]
        random.Random(0).shuffle(rest)
        stop = time.perf_counter() + budget_s / len(all_tasks)
        for record in own[: len(CHIPS)] + rest:
            if time.perf_counter() < stop or not timed:
                try:
                    timed.append(record | {"ms": measure(task, record["config"], device)})
                except Exception as error:  # noqa: BLE001 (a candidate that does not run is out)
                    print(
                        f"{task.id} {shown(record['config'])}: {type(error).__name__}: {str(error)[:100]}",
                        flush=True,
                    )
        if not timed:
            continue
        used = in_use(task, timed[0]["sm"])
        now = next((record for record in timed if record["config"] == used), None)
        winner = min(timed, key=lambda record: record["ms"])
        if now is not None and winner["ms"] > (1 - NOISE) * now["ms"]:
            winner = now
        best.append(winner | {"before_ms": None if now is None else now["ms"]})
        print(
            f"{task.id}: {shown(winner['config'])} {winner['ms']:.4f} ms, in use {best[-1]['before_ms']} ms",
            flush=True,
        )
    return best


def shown(config) -> dict:
    """A configuration without its defaults, as the files have it."""
    from shipsfast.kernels.launch_config import LaunchConfig

    defaults = asdict(LaunchConfig(0, 0, 0, 0))
    return {
        name: value
        for name, value in asdict(config).items()
        if value != defaults[name] and name != "unmasked_loop"  # which the kind says
    }


def write(best: list[dict], folder: Path) -> Path:
    """Put the best into the file of their chip, and leave its other entries."""
    path = folder / f"sm_{best[0]['sm']}.json"
    table = json.loads(path.read_text())
    for record in best:
        task = record["task"]
        table[task.kernel][task.kind][task.dtype][str(task.head_dim)] = shown(record["config"])
    path.write_text(config_files.render(table))
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"compile for {' and '.join(f'sm_{sm}' for sm in CHIPS)} without a GPU, time nothing",
    )
    parser.add_argument("--update", action="store_true", help="write kernels/configs/<device>.json")
    parser.add_argument("--kernel", choices=aot.KERNELS)
    parser.add_argument("--tree", choices=tuple(SHARED), help="kind of tree, for tree_attention")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS)
    parser.add_argument("--limit", type=int, help="only the first candidates of each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument(
        "--budget-s", type=float, default=300.0, help="seconds for timing, all in all (default 300)"
    )
    parser.add_argument("--json", action="store_true", help="print records as JSON lines")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing, unset it")
    chosen = tasks(args.kernel, args.tree, args.dtype, args.head_dim)
    if not chosen:
        parser.error(f"{args.kernel} has no kinds of trees: leave out --tree")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU: --dry-run compiles every candidate without one")
    chips = CHIPS
    if not args.dry_run:
        major, minor = torch.cuda.get_device_capability()
        chips = (10 * major + minor,)
        if chips[0] not in CHIPS:
            parser.error(f"sm_{chips[0]} has no file of its own: expected one of {CHIPS}")
    records = survivors(chosen, chips, args.limit, args.jobs)
    if args.json:
        for record in records:
            task = asdict(record["task"])
            print(json.dumps(record | {"task": task, "config": shown(record["config"])}))
    good = sum(record["problem"] is None for record in records)
    print(f"{good} of {len(records)} candidates may run", file=sys.stderr)
    if args.dry_run:
        return 0 if good else 1
    best = tune(records, "cuda", budget_s=args.budget_s)
    if args.update and best:
        print(f"{write(best, aot.RESOURCES.parent)}: now run python -m benchmarks.aot --update")
    return 0


if __name__ == "__main__":
    sys.exit(main())
