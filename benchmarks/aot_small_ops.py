"""Compiles the small operations of kernels/small_ops.py ahead of time for A100 and H100, at the widths of known models.

    python -m benchmarks.aot_small_ops             print registers, shared memory, spills and wide memory accesses
    python -m benchmarks.aot_small_ops --update    also write the table in docs/kernels.md

No GPU is needed. In a process of its own for the reason given in aot.py.
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from .aot import (
    REGISTERS_PER_SM,
    TRITON_DTYPE,
    _resource_usage,
    command_line,
    replace_in_document,
)

CHIPS = (80, 90)  # A100 and H100
BEGIN, END = "<!-- begin: python -m benchmarks.aot_small_ops --update -->", "<!-- end of small operations -->"
# operation, its sizes: (width, Gemma's weight) of norms, (heads, head size, normed) of rope, (width, GELU) of gated,
# (tokens, rank, width, Gemma 2's second norm and GELU) of forked_gated
SHAPES = {
    "rms_norm": [(2048, False), (4096, False), (3584, True), (5120, False), (8192, False), (16384, False)],
    "add_rms_norm_": [(3584, True), (4608, True), (4096, False)],
    "rope_": [(32, 128, False), (8, 128, False), (64, 128, False), (16, 256, False), (32, 128, True), (8, 128, True)],
    "gated": [(11008, False), (14336, False), (14336, True)],
    "forked_gated": [(1777, 128, 11008, False), (60, 128, 11008, False), (1777, 128, 14336, False), (1777, 256, 14336, True)],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    sizes: tuple
    dtype: str
    sm: int

    @property
    def id(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} sm_{self.sm}"

    @property
    def shape(self) -> str:
        *sizes, kind = self.sizes
        text = "x".join(map(str, sizes))
        return text + (
            f" {'normed' if self.op == 'rope_' else 'gelu' if 'gated' in self.op else '1 + w'}" * kind
        )


def cases() -> list[Case]:
    return [
        Case(op, sizes, dtype, sm)
        for op, shapes in SHAPES.items()
        for sizes in shapes
        for dtype in TRITON_DTYPE
        for sm in CHIPS
    ]


def launch(case: Case) -> tuple[object, dict, dict]:
    """(kernel, its constants, warps and stages) as the launchers choose them."""
    from shipsfast.kernels import small_ops

    *sizes, kind = case.sizes
    if case.op == "forked_gated":
        return _forked_launch(case)
    if case.op == "gated":
        constants = {"M": sizes[0], "GELU": kind, "BLOCK_M": small_ops.GATED_BLOCK}
        return small_ops._gated_kernel, constants, {"num_warps": small_ops.GATED_WARPS}
    if case.op == "rope_":
        block, half, warps = small_ops.rope_launch(*sizes)
        constants = {
            "H": sizes[0], "HALF": sizes[1] // 2, "HAS_NORM": kind, "BLOCK_H": block, "BLOCK_HALF": half,
        }  # fmt: skip
        return (
            small_ops._rope_kernel,
            constants | ({} if kind else {"weight_ptr": None}),
            {"num_warps": warps},
        )
    rows, block, warps = small_ops.norm_launch(sizes[0])
    constants = {
        "D": sizes[0], "PLUS_ONE": kind, "ADD": case.op == "add_rms_norm_", "ROWS": rows, "BLOCK_D": block,
    }  # fmt: skip
    return small_ops._rms_norm_kernel, constants, {"num_warps": warps}


def _forked_launch(case: Case) -> tuple[object, dict, dict]:
    import torch
    import triton.language as tl

    from shipsfast.kernels import forked_gated

    tokens, rank, width, gemma = case.sizes
    blocks, warps, stages = forked_gated.forked_launch(getattr(torch, case.dtype), tokens)
    constants = {
        "R": rank, "M": width, "HAS_OTHER": gemma, "HAS_BIAS": False, "GELU": gemma, "DOT_DTYPE": getattr(tl, case.dtype),
        "bias_ptr": None, **blocks,
    }  # fmt: skip
    missing = {} if gemma else {"drift_ptr": None, "other_ptr": None}
    how = {"num_warps": warps, "num_stages": stages}
    return forked_gated._forked_gated_kernel, constants | missing, how


def compile_case(case: Case) -> dict[str, int]:
    """Registers and local memory (spills) a thread, shared bytes a block, and loads and stores of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, how = launch(case)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = f"*{TRITON_DTYPE[case.dtype]}" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
        signature[name] = "*fp32" if name in ("factor_ptr", "scale_ptr", "drift_ptr") else kind
        # As at a launch with torch's allocations: pointers and strides are multiples of 16.
        if name.endswith("_ptr") or name.startswith("stride"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", case.sm, 32),
        options=how | {"enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    return {
        "threads": 32 * how["num_warps"],
        "registers": registers,
        "local_bytes": local_bytes,
        "shared_bytes": compiled.metadata.shared,
        "wide": len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx)),
        "tensor_cores": len(re.findall(r"wgmma\.mma_async" if case.sm >= 90 else r"mma\.sync", ptx)),
    }


def threads_per_sm(use: dict[str, int]) -> int:
    """Threads that registers leave room for on a multiprocessor, 2,048 at most."""
    registers = -(-use["registers"] // 8) * 8  # the chip hands them out by the eight
    return min(2048, REGISTERS_PER_SM // (registers * use["threads"]) * use["threads"])


def measure(jobs: int) -> dict[str, dict[str, int]]:
    todo = cases()
    # spawn: a forked child would inherit Triton's compiler state
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return dict(zip((c.id for c in todo), pool.map(compile_case, todo), strict=True))


def document(table: dict[str, dict[str, int]], version: str) -> str:
    lines = [
        BEGIN,
        f"Triton {version}, no register spilled. `wide`: loads and stores of 16 bytes in the code; `threads`: for how",
        "many registers leave room on a multiprocessor, of 2,048.",
        "",
        "| operation | sizes | dtype | chip | registers | threads | wide |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        use = table[case.id]
        lines.append(
            f"| {case.op} | {case.shape} | {case.dtype} | sm_{case.sm} | {use['registers']} | {threads_per_sm(use)} "
            f"| {use['wide']} |"
        )
    return "\n".join([*lines, END])


def main(argv: list[str] | None = None) -> int:
    args = command_line(argv, "aot_small_ops", __doc__)
    import triton

    table = measure(args.jobs)
    if args.update:
        replace_in_document(BEGIN, END, document(table, triton.__version__))
    if args.json:
        print(json.dumps(table))
    else:
        for key, use in table.items():
            print(f"{key:50}", " ".join(f"{name}={value}" for name, value in use.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
