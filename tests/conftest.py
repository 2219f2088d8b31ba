"""Set-up that must happen before any test module is imported, what a machine without a GPU leaves out, and fixtures of
several rooms."""

import gc
import os
import shutil
import signal
import sys

# Tests run beside each other: one thread each, said before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

# A shell that starts the tests in the background has Ctrl-C ignored, also by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

# With SHIPSFAST_TEST_GPU=1 and a GPU the kernel tests run compiled; otherwise Triton's interpreter runs them
# on the CPU, and it must be asked for before triton is imported.
TEST_GPU = os.environ.get("SHIPSFAST_TEST_GPU") == "1" and torch.cuda.is_available()
if not TEST_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The part that tools/run_tests.sh asks for; and, without a GPU, the tests that need one are a single skipped test,
    which says how many they are."""
    part = os.environ.get("TEST_PART")
    if part in ("parallel", "serial"):
        other = [item for item in items if (item.get_closest_marker("serial") is None) == (part == "serial")]
        leave_out(config, items, other)
    if torch.cuda.is_available():
        return
    waiting = [item for item in items if item.get_closest_marker("gpu")]
    if not waiting:
        return
    reason = f"{len(waiting):,} tests need a CUDA GPU: make test-gpu runs them"
    waiting[0].add_marker(pytest.mark.skip(reason=reason), append=False)
    leave_out(config, items, waiting[1:])


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage during the tests looks at it again. At the end it may go, or
    nanobind reports all of Triton's objects as leaked."""
    if "triton.runtime.interpreter" in sys.modules:
        quick_interpreter(sys.modules["triton.runtime.interpreter"])
    gc.collect()
    gc.freeze()


def quick_interpreter(interpreter) -> None:
    """Triton's interpreter prepares its language when a kernel starts, and again at each call of a function inside of
    it, which takes a millisecond. For the functions of one module once is enough: that is never undone."""
    whole, prepared = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return whole(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def leave_out(config: pytest.Config, items: list[pytest.Item], these: list[pytest.Item]) -> None:
    numbers = set(map(id, these))
    items[:] = [item for item in items if id(item) not in numbers]
    config.hook.pytest_deselected(items=these)


@pytest.fixture(scope="module")
def one_thread():
    """Forked children have no other, and sums must be cut alike in parent and child."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model folder and prompts that the repository does not contain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from shipsfast.demo.run import MODEL
    from tests.support.models import _GQA

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        **(_GQA | dict(vocab_size=768, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder
