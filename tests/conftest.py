"""Set-up that must happen before any test module is imported, and what a machine without a GPU leaves out."""

import os

# Tests run beside each other: one thread each, said before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

import pytest
import torch

# With SHIPSFAST_TEST_GPU=1 and a GPU the kernel tests run compiled; otherwise Triton's interpreter runs them
# on the CPU, and it must be asked for before triton is imported.
TEST_GPU = os.environ.get("SHIPSFAST_TEST_GPU") == "1" and torch.cuda.is_available()
if not TEST_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from tests.support.command_line import model_folder  # noqa: F401 (a fixture of many folders)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, the tests that need one are a single skipped test, which says how many they are."""
    if torch.cuda.is_available():
        return
    waiting = [item for item in items if item.get_closest_marker("gpu")]
    if not waiting:
        return
    reason = f"{len(waiting):,} tests need a CUDA GPU: make test-gpu runs them"
    waiting[0].add_marker(pytest.mark.skip(reason=reason), append=False)
    left_out = set(map(id, waiting[1:]))
    items[:] = [item for item in items if id(item) not in left_out]
    config.hook.pytest_deselected(items=waiting[1:])
