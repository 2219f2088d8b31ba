"""Compiles every launch configuration ahead of time, without a GPU, and records what it costs on the chip.

    python -m benchmarks.aot             print registers, shared memory, spills and tensor-core use
    python -m benchmarks.aot --update    also write kernels/configs/aot_resources.json, and what an entry costs beside it

The figures belong to a Triton version (each bundles its own ptxas), so aot_resources.json keeps one table for each.
Beside an entry of sm_80.json, sm_90.json and default.json stands the worst of the newest (config_files.py).
tests/kernels/test_kernels_aot.py runs this module in a process of its own, since TRITON_INTERPRET=1, which the
other tests need, replaces triton.jit for good.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOURCES = ROOT / "kernels" / "configs" / "aot_resources.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
KERNELS = ("tree_attention", "decode_attention")

REGISTER_LIMIT = 255
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class Chip:
    """Bytes of shared memory that one thread block may use and that a multiprocessor has; the threads and the blocks that
    a multiprocessor holds."""

    shared_per_block: int
    shared_per_sm: int
    threads: int
    blocks: int


CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, 2048, 32),
    86: Chip(99 * 1024, 100 * 1024, 1536, 16),
    89: Chip(99 * 1024, 100 * 1024, 1536, 24),
    90: Chip(227 * 1024, 228 * 1024, 2048, 32),
}
# config file -> the chips it is compiled for. default.json has those with the least shared memory.
TARGETS = {"sm_80": (80,), "sm_90": (90,), "default": (86, 89)}
OWN_FILE = (80, 90)
TRITON_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# How the arguments begin that are None without replacements.
REPLACEMENT = (
    "replace",
    "q_alt",
    "k_alt",
    "out_alt",
    "stride_r",
    "stride_q_alt",
    "stride_k_alt",
    "stride_out_alt",
)


@dataclass(frozen=True)
class Case:
    """One compiled version. `kind`: of tree; `groups`: query heads to a key/value head; `features`: softcap and window
    (and query_index in tree_attention), none of them or all; `replace`: with replacement vectors; `sink`: with attention
    sinks, which no case of the table has."""

    kernel: str
    config: str
    sm: int
    kind: str
    dtype: str
    head_dim: int
    groups: int
    features: bool
    replace: bool
    sink: bool = False

    @property
    def id(self) -> str:
        shape = f"D{self.head_dim} G{self.groups}"
        kernel = self.kernel if self.kind == "any" else f"{self.kernel} {self.kind}"
        return f"{kernel} {self.config}.json sm_{self.sm} {self.dtype} {shape} {self.version}"

    @property
    def version(self) -> str:
        return ("all" if self.features else "plain") + "+replace" * self.replace

    @property
    def entry(self) -> int:
        """The head size under which its file has its parameters."""
        return next(largest for largest in self._sizes() if self.head_dim <= largest)

    def launch(self):
        """Its LaunchConfig."""
        return self._sizes()[self.entry]

    def _sizes(self) -> dict:
        from shipsfast.kernels.launch_config import load_configs

        return load_configs(self.config)[self.kernel][self.kind][self.dtype]


def cases() -> list[Case]:
    """Every entry of every file. float16, whose code is bfloat16's with other instructions, is compiled in the plain
    version alone, and default.json in the smallest and the largest, to save minutes."""
    from shipsfast.kernels.launch_config import load_configs

    return [
        Case(kernel, config, sm, kind, dtype, head_dim, groups, features, replace)
        for kernel in KERNELS
        for config, targets in TARGETS.items()
        for sm in targets
        for kind, dtypes in load_configs(config)[kernel].items()
        for dtype, sizes in dtypes.items()
        for head_dim, groups, every_version in shapes(
            kernel, list(sizes), dtype != "float16" and config != "default"
        )
        for features, replace in versions(dtype, config, every_version)
    ]


def versions(dtype: str, config: str, every: bool) -> list[tuple[bool, bool]]:
    """(features, replace)"""
    if not every or dtype == "float16":
        return [(False, False)]
    if config == "default":
        return [(False, False), (True, True)]
    return [(features, replace) for replace in (False, True) for features in (False, True)]


def shapes(kernel: str, sizes: list[int], own_chip: bool) -> list[tuple[int, int, bool]]:
    """(head size, query heads to a key/value head, whether every version is of interest) for the sizes of a
    config file. The tree kernel's tiles are of one head, the decode kernel's of a group."""
    found = [(head_dim, 4, True) for head_dim in sizes]
    if kernel == "decode_attention" and own_chip:
        found += [(head_dim, 1, True) for head_dim in sizes]
        found += [(head_dim, groups, False) for head_dim in sizes for groups in (8, 32)]
        found += [(96, groups, False) for groups in (1, 4, 8)]
    return found


def compile_case(case: Case, config=None) -> dict[str, int]:
    """Registers and local memory (spills) per thread, shared bytes per block, and what the code is made of: instructions
    of the chip in all, and in PTX those of tensor cores, asynchronous copies, float32 arithmetic.

    config: a LaunchConfig instead of the one of the case's file.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"shipsfast.kernels.{case.kernel}")
    config = config or case.launch()
    kernel = getattr(module, f"_{case.kernel}_kernel")
    dtype = TRITON_DTYPE[case.dtype]
    constants = {
        "GROUPS": case.groups,
        "D": case.head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
        "HAS_SOFTCAP": case.features,
        "HAS_WINDOW": case.features,
        "HAS_REPLACE": case.replace,
        "HAS_SINK": case.sink,
        "DOT_DTYPE": getattr(module.tl, case.dtype),
        "INPUT_PRECISION": config.input_precision,
        "stride_lh": 1,  # the launcher turns strides of 1 into constants too
        "stride_oh": 1,
    }
    if case.kernel == "decode_attention":
        constants["BLOCK_M"] = min(config.block_m, triton.next_power_of_2(case.groups))
    else:
        constants |= {"HAS_QUERY_INDEX": case.features, "UNMASKED_LOOP": config.unmasked_loop}
        if not case.features:
            constants["query_index_ptr"] = None
    if not case.sink:
        constants["sink_ptr"] = None
    if case.replace:
        constants["stride_rh"] = 1
    else:
        constants |= dict.fromkeys(n for n in kernel.arg_names if n.startswith(REPLACEMENT))
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "q_alt_ptr", "k_alt_ptr", "out_alt_ptr"):
            signature[name] = f"*{dtype}"
        elif name == "replace_ptr":
            signature[name] = "*i8"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if "scale" in name or name == "sink_ptr" else "*i32"
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
        # As at a launch with torch's allocations: pointers and strides are multiples of 16.
        if name.endswith("_ptr") or name.startswith("stride"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", case.sm, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.max_registers,
            "enable_fp_fusion": True,
        },
    )
    ptx = compiled.asm["ptx"]
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    return {
        "threads": 32 * config.num_warps,
        "registers": registers,
        "local_bytes": local_bytes,
        "shared_bytes": compiled.metadata.shared,
        "instructions": _instructions(compiled.asm["cubin"]),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma_sync": len(re.findall(r"mma\.sync", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "fp32_ops": len(re.findall(r"^\s(?:add|sub|mul|fma|div|ex2)\.\S*f32\s", ptx, re.MULTILINE)),
    }


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread. Spilled registers live in local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _instructions(cubin: bytes) -> int:
    """How many instructions, of 16 bytes each, the sections of code hold (ELF, 64 bits)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    # type, flags, file offset and size of each section; 1: bits of the program, flag 4: that run
    sections = [struct.unpack_from("<4xIQ8x8xQ", cubin, table + i * size) for i in range(count)]
    return sum(length for kind, flags, length in sections if kind == 1 and flags & 4) // 16


def blocks_per_sm(case: Case, use: dict[str, int]) -> int:
    """Thread blocks that fit a multiprocessor by registers, shared memory (1 KiB a block is reserved) and threads."""
    chip = CHIPS[case.sm]
    registers = -(-use["registers"] // 8) * 8  # the chip hands them out by the eight
    return min(
        REGISTERS_PER_SM // (registers * use["threads"]),
        chip.shared_per_sm // (use["shared_bytes"] + 1024),
        chip.threads // use["threads"],
        chip.blocks,
    )


def measure(jobs: int) -> dict[str, dict[str, int]]:
    todo = cases()
    # spawn: a forked child would inherit Triton's compiler state
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return dict(zip((c.id for c in todo), pool.map(compile_case, todo), strict=True))


def write_resources(table: dict[str, dict[str, int]], version: str) -> None:
    tables = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    tables[version] = table
    # One line for each version of the kernel, so that a change reads well in a diff.
    blocks = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(use)}" for key, use in rows.items())
        + "\n  }"
        for name, rows in sorted(tables.items())
    ]
    RESOURCES.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def replace_in_document(begin: str, end: str, part: str) -> None:
    """Put `part`, its first and last lines included, where docs/kernels.md has what lies between them."""
    head, found, rest = DOCUMENT.read_text().partition(begin)
    if not found:
        raise RuntimeError(f"{DOCUMENT} has no line {begin!r}: put it, and {end!r}, where the table belongs")
    DOCUMENT.write_text(head + part + rest.partition(end)[2])


def command_line(argv: list[str] | None, name: str, about: str) -> argparse.Namespace:
    """Options of a command that compiles kernels ahead of time."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is committed")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing, unset it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = command_line(argv, "aot", __doc__)
    import triton

    table = measure(args.jobs)
    if args.update:
        from . import config_files

        write_resources(table, triton.__version__)
        config_files.update()
    if args.json:
        print(json.dumps({"triton": triton.__version__, "table": table}))
    else:
        for key, use in table.items():
            print(f"{key:60}", " ".join(f"{name}={value}" for name, value in use.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
