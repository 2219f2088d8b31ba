"""The files in kernels/configs: their layout, and what each entry costs on the chip, taken from aot_resources.json.

An entry may have `built`: the Triton version, and per chip the worst of all versions of the kernel that are compiled
for it. Only `python -m benchmarks.aot --update` writes it, for the newest Triton version that aot_resources.json has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from . import aot

FOLDER = aot.RESOURCES.parent


def render(table: dict) -> str:
    """kernel -> kind of tree -> dtype -> head size -> parameters, as the committed files are laid out."""
    return _block(table, "", 3) + "\n"


def _block(table: dict, indent: str, deeper: int) -> str:
    show = _entry if deeper == 0 else lambda value, inner: _block(value, inner, deeper - 1)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(name)}: {show(value, inner)}" for name, value in table.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _entry(entry: dict, indent: str) -> str:
    """Parameters on one line, what they cost on those below it."""
    parameters = json.dumps({name: value for name, value in entry.items() if name != "built"})
    if "built" not in entry:
        return parameters
    built = [f"{indent}    {json.dumps(name)}: {json.dumps(value)}" for name, value in entry["built"].items()]
    return parameters[:-1] + f',\n{indent}  "built": {{\n' + ",\n".join(built) + f"\n{indent}  }}}}"


def with_figures(table: dict, config: str, resources: dict[str, dict[str, dict[str, int]]]) -> dict:
    """A file's table with `built` in every entry. config: the file's stem; resources: what aot_resources.json holds."""
    triton = max(resources, key=lambda version: tuple(map(int, version.split("."))))
    costs = resources[triton]
    cases = [case for case in aot.cases() if case.config == config]
    built = {}
    for case in cases:
        built.setdefault((case.kernel, case.kind, case.dtype, case.entry), {}).setdefault(
            f"sm_{case.sm}", []
        ).append((case, costs[case.id]))
    return {
        kernel: {
            kind: {
                dtype: {
                    size: {name: value for name, value in entry.items() if name != "built"}
                    | {"built": {"triton": triton} | {
                        chip: _worst(uses) for chip, uses in built[kernel, kind, dtype, int(size)].items()
                    }}
                    for size, entry in sizes.items()
                }
                for dtype, sizes in dtypes.items()
            }
            for kind, dtypes in kinds.items()
        }
        for kernel, kinds in table.items()
    }  # fmt: skip


def _worst(uses: Iterable[tuple[aot.Case, dict[str, int]]]) -> dict:
    uses = list(uses)
    most = lambda name: max(use[name] for _, use in uses)
    cores = {"wgmma" if use["wgmma"] else "mma.sync" if use["mma_sync"] else "none" for _, use in uses}
    return {
        "registers": most("registers"),
        "spilled_bytes": most("local_bytes"),
        "shared_bytes": most("shared_bytes"),
        "blocks_per_sm": min(aot.blocks_per_sm(case, use) for case, use in uses),
        "tensor_cores": " or ".join(sorted(cores)),
    }


def update() -> None:
    """Write `built` of every file anew."""
    resources = json.loads(aot.RESOURCES.read_text())
    for config in aot.TARGETS:
        path = FOLDER / f"{config}.json"
        path.write_text(render(with_figures(json.loads(path.read_text()), config, resources)))
