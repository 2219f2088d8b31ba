"""Every committed launch configuration compiles for A100 and H100, fits, and uses the tensor cores.

No GPU is needed. The compiler runs in a process of its own (benchmarks/aot.py), because these tests share
theirs with Triton's interpreter. Figures are compared with the committed kernels/configs/aot_resources.json
where it has this Triton version: after a change that is meant, run `python -m benchmarks.aot --update`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton")

from benchmarks import aot

CASES = {case.id: case for case in aot.cases()}


@pytest.fixture(scope="module")
def compiled() -> tuple[str, dict[str, dict[str, int]]]:
    """(Triton's version, case id -> figures)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--json"]
    done = subprocess.run(command, cwd=aot.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["triton"], answer["table"]


def offenders(table: dict, wrong: Callable[[aot.Case, dict[str, int]], bool]) -> dict:
    return {key: use for key, use in table.items() if wrong(CASES[key], use)}


def test_every_configuration_was_compiled(compiled):
    assert list(compiled[1]) == list(CASES)
    assert {case.config for case in CASES.values()} == {
        path.stem for path in aot.RESOURCES.parent.glob("*.json") if path != aot.RESOURCES
    }


def test_shared_memory_fits_the_chip(compiled):
    assert not offenders(compiled[1], lambda case, use: use["shared_bytes"] > aot.SHARED_LIMIT[case.config])


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
    pairs = [(key, key.removesuffix("+replace")) for key in table if key.endswith("+replace")]
    assert {(CASES[key].kernel, CASES[key].config) for key, _ in pairs} == {
        (kernel, config) for kernel in aot.KERNELS for config in ("sm_80", "sm_90")
    }
    assert [key for key, plain in pairs if counts(table[key]) != counts(table[plain])] == []


def test_figures_are_the_committed_ones(compiled):
    version, table = compiled
    committed = json.loads(aot.RESOURCES.read_text())
    if version not in committed:
        pytest.skip(f"aot_resources.json has no table for Triton {version}")
    assert table == committed[version], (
        "after a change that is meant, run `python -m benchmarks.aot --update`"
    )
