"""Launch parameters of the Triton kernels, read from configs/<device>.json and never chosen by timing.

A file maps kernel -> kind of tree -> dtype -> largest padded head size -> parameters. The kinds are those of
tree_kind.py; a kernel that reads no tree has the one kind "any". `sm_80.json` (A100) and `sm_90.json` (H100, H200) use
the shared memory those chips have; `default.json` fits in the 99 KB of every other chip. Beside the parameters,
`built` has what they cost on the chip, for people: benchmarks/aot.py writes it, nothing reads it.
tests/kernels/test_kernels_aot.py compiles every entry and checks registers, shared memory and spills.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

CONFIG_DIR = Path(__file__).parent / "configs"
ANY_KIND = "any"


@dataclass(frozen=True)
class LaunchConfig:
    """block_m queries and block_n keys to a tile; input_precision is for float32 inputs alone:
    "ieee" (exact, no tensor cores), "tf32x3" (nearly exact) or "tf32" (10 bits of mantissa). max_registers a
    thread: with a limit, the compiler uses what it allows; without one, it may spill a few to fit in more blocks.
    unmasked_loop: fully visible blocks have a loop of their own, without a mask; not in a file, as its kind says it: trees of
    `leaves` have hardly ever such a block."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    input_precision: str = "ieee"
    max_registers: int | None = None
    unmasked_loop: bool = True


def launch_config(
    kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device | str, kind: str = ANY_KIND
) -> LaunchConfig:
    """The committed parameters for a kernel, an input dtype and a head size D on a device.

    kind: of the tree (tree_kind.py), for tree_attention.

    Raises:
        ValueError: the kernel has no such kind, or no entry holds this dtype or a head of this size.
    """
    name = device_name(torch.device(device))
    kinds = load_configs(name)[kernel]
    if kind not in kinds:
        raise ValueError(f"{kernel}: unknown kind {kind!r}: expected one of {', '.join(kinds)}")
    table = kinds[kind].get(str(dtype).removeprefix("torch."), {})
    for largest, entry in table.items():
        if head_dim <= largest:
            return entry
    sizes = f"up to {max(table)}" if table else "none"
    raise ValueError(
        f"{kernel}: no launch parameters for {dtype} with a head size of {head_dim} in configs/{name}.json "
        f"(head sizes there: {sizes}): use backend='reference', or add an entry"
    )


def device_name(device: torch.device) -> str:
    """The stem of the config file for a device: "sm_90" where there is one, otherwise "default"."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if (CONFIG_DIR / f"{name}.json").exists() else "default"


@functools.cache
def load_configs(name: str) -> dict[str, dict[str, dict[str, dict[int, LaunchConfig]]]]:
    """kernel -> kind of tree -> dtype -> largest padded head size -> LaunchConfig, head sizes ascending."""
    raw = json.loads((CONFIG_DIR / f"{name}.json").read_text())
    return {
        kernel: {
            kind: {dtype: _by_size(sizes, kind != "leaves") for dtype, sizes in dtypes.items()}
            for kind, dtypes in kinds.items()
        }
        for kernel, kinds in raw.items()
    }


def _by_size(sizes: dict[str, dict], unmasked_loop: bool) -> dict[int, LaunchConfig]:
    parameters = lambda entry: {name: value for name, value in entry.items() if name != "built"}
    return {
        int(size): LaunchConfig(**parameters(sizes[size]), unmasked_loop=unmasked_loop)
        for size in sorted(sizes, key=int)
    }
