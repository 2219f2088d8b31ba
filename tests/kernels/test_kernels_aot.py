"""Every committed launch configuration compiles for its chips, fits, spills nothing, and uses the tensor cores.

No GPU is needed. The compiler runs in a process of its own (benchmarks/aot.py), because these tests share
theirs with Triton's interpreter. Figures are compared with the committed kernels/configs/aot_resources.json
where it has this Triton version, and what stands beside the entries with that file: after a change that is meant, run
`python -m benchmarks.aot --update`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton")

from shipsfast.kernels.tree_kind import KINDS

from benchmarks import aot, aot_small_ops, config_files

CASES = {case.id: case for case in aot.cases()}
UPDATE = "after a change that is meant, run `python -m benchmarks.aot --update`"


def run(module: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, "--json"]
    done = subprocess.run(command, cwd=aot.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> tuple[str, dict[str, dict[str, int]]]:
    """(Triton's version, case id -> figures)."""
    answer = run("benchmarks.aot")
    return answer["triton"], answer["table"]


@pytest.fixture(scope="module")
def small_ops() -> dict[str, dict[str, int]]:
    return run("benchmarks.aot_small_ops")


def offenders(table: dict, wrong: Callable[[aot.Case, dict[str, int]], bool]) -> dict:
    return {key: use for key, use in table.items() if wrong(CASES[key], use)}


def test_every_configuration_was_compiled(compiled):
    assert list(compiled[1]) == list(CASES)
    files = {path.stem for path in aot.RESOURCES.parent.glob("*.json") if path != aot.RESOURCES}
    assert {case.config for case in CASES.values()} == files
    compiled_for = {(case.config, case.sm, case.kernel, case.kind, case.dtype) for case in CASES.values()}
    assert compiled_for == {
        (name, sm, kernel, kind, dtype)
        for name, chips in aot.TARGETS.items()
        for sm in chips
        for kernel, kinds in (("tree_attention", KINDS), ("decode_attention", ("any",)))
        for kind in kinds
        for dtype in aot.TRITON_DTYPE
    }
    own = {f"sm_{sm}": (sm,) for sm in aot.OWN_FILE}
    assert {name: chips for name, chips in aot.TARGETS.items() if name != "default"} == own


def test_occupancy_counts_registers_shared_memory_threads_and_blocks():
    case = lambda sm: aot.Case("tree_attention", "default", sm, "leaves", "float32", 64, 4, False, False)
    use = lambda threads, registers, shared: {
        "threads": threads, "registers": registers, "shared_bytes": shared
    }  # fmt: skip
    assert aot.blocks_per_sm(case(90), use(128, 177, 1024)) == 65536 // (184 * 128) == 2
    assert aot.blocks_per_sm(case(86), use(64, 32, 32 * 1024)) == 3
    assert [aot.blocks_per_sm(case(sm), use(512, 24, 1024)) for sm in (80, 86, 89, 90)] == [4, 3, 3, 4]
    assert [aot.blocks_per_sm(case(sm), use(32, 24, 1024)) for sm in (80, 86, 89, 90)] == [32, 16, 24, 32]


def test_shared_memory_fits_the_chip(compiled):
    assert not offenders(
        compiled[1], lambda case, use: use["shared_bytes"] > aot.CHIPS[case.sm].shared_per_block
    )


def test_no_registers_are_spilled(compiled):
    assert not offenders(compiled[1], lambda case, use: use["local_bytes"] > 0)
    assert not offenders(compiled[1], lambda case, use: use["registers"] > aot.REGISTER_LIMIT)


def test_at_least_one_block_fits_a_multiprocessor(compiled):
    assert not offenders(compiled[1], lambda case, use: aot.blocks_per_sm(case, use) < 1)


def test_half_precision_uses_the_tensor_cores_of_the_chip(compiled):
    half = {key: use for key, use in compiled[1].items() if CASES[key].dtype != "float32"}
    # wgmma takes 64 rows or more. One query of some heads is not that many, and waits for memory anyway.
    wgmma = lambda case: case.sm == 90 and case.kernel == "tree_attention"
    assert not offenders(half, lambda case, use: wgmma(case) and use["wgmma"] == 0)
    assert not offenders(half, lambda case, use: not wgmma(case) and use["mma_sync"] == 0)


def test_float32_stays_exact(compiled):
    exact = {key: use for key, use in compiled[1].items() if CASES[key].dtype == "float32"}
    assert not offenders(exact, lambda case, use: use["wgmma"] + use["mma_sync"] > 0)


def test_keys_and_values_are_fetched_ahead(compiled):
    assert not offenders(compiled[1], lambda case, use: use["cp_async"] == 0)


def test_replacements_change_no_arithmetic(compiled):
    """A head without flags has the bits of a call without replacements, also as the compiler fuses them."""
    _, table = compiled
    counts = lambda use: [use[name] for name in ("fp32_ops", "wgmma", "mma_sync", "cp_async")]
    pairs = [
        (key, plain) for key in table if (plain := key.replace("+replace", "")) != key and plain in table
    ]
    assert {(CASES[key].kernel, CASES[key].kind, CASES[key].config) for key, _ in pairs} == {
        (kernel, kind, config)
        for kernel, kinds in (("tree_attention", KINDS), ("decode_attention", ("any",)))
        for kind in kinds
        for config in ("sm_80", "sm_90")
    }
    assert [key for key, plain in pairs if counts(table[key]) != counts(table[plain])] == []


def test_figures_are_the_committed_ones(compiled):
    version, table = compiled
    committed = json.loads(aot.RESOURCES.read_text())
    if version not in committed:
        pytest.skip(f"aot_resources.json has no table for Triton {version}")
    assert table == committed[version], UPDATE


@pytest.mark.parametrize("config", list(aot.TARGETS))
def test_what_stands_beside_an_entry_is_the_worst_of_its_versions(config):
    table = json.loads((config_files.FOLDER / f"{config}.json").read_text())
    resources = json.loads(aot.RESOURCES.read_text())
    assert config_files.with_figures(table, config, resources) == table, UPDATE
    for kernel, kinds in table.items():
        for kind, dtypes in kinds.items():
            for entry in (entry for sizes in dtypes.values() for entry in sizes.values()):
                triton, chips = entry["built"]["triton"], list(entry["built"])[1:]
                assert chips == [f"sm_{sm}" for sm in aot.TARGETS[config]], (kernel, kind)
                assert triton in resources


def test_the_worst_is_taken():
    case = next(case for case in CASES.values() if case.kind == "leaves" and case.sm == 90)
    use = lambda registers, shared, wgmma: {
        "threads": 128, "registers": registers, "local_bytes": 0, "shared_bytes": shared, "wgmma": wgmma, "mma_sync": 1,
    }  # fmt: skip
    assert config_files._worst([(case, use(100, 2048, 1)), (case, use(168, 1024, 0))]) == {
        "registers": 168, "spilled_bytes": 0, "shared_bytes": 2048, "blocks_per_sm": 3, "tensor_cores": "mma.sync or wgmma",
    }  # fmt: skip


def test_every_small_operation_was_compiled_for_both_chips(small_ops):
    assert list(small_ops) == [case.id for case in aot_small_ops.cases()]
    assert {(case.op, case.dtype, case.sm) for case in aot_small_ops.cases()} == {
        (op, dtype, sm) for op in aot_small_ops.SHAPES for dtype in aot.TRITON_DTYPE for sm in (80, 90)
    }


def test_small_operations_spill_nothing_and_leave_room(small_ops):
    assert not {key: use for key, use in small_ops.items() if use["local_bytes"] > 0}
    # Half of the threads a multiprocessor can hold hide the waits for memory; float32 rows of 16,384 have a fourth.
    # Tiles of matrix products hide them otherwise.
    room = lambda key: (
        256 if key.startswith("forked") else 512 if key.startswith("rms_norm 16384 float32") else 1024
    )
    assert not {key: use for key, use in small_ops.items() if aot_small_ops.threads_per_sm(use) < room(key)}


def test_products_of_forks_use_the_tensor_cores(small_ops):
    """Those of float32 would round to TF32."""
    for key, use in small_ops.items():
        assert (use["tensor_cores"] > 0) == (key.startswith("forked") and "float32" not in key), key


def test_small_operations_load_and_store_16_bytes_at_a_time(small_ops):
    assert not {key: use for key, use in small_ops.items() if use["wide"] == 0}
