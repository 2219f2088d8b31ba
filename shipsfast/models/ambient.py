"""What a process has set around a call that would change its numbers: autocast, the precision of matrix products, a default
device, torch.compile.

Scores are of the model in its own dtype. Autocast asks for another, so it is refused. The others permit or place, and ask for
nothing: they are set aside while a call runs, and put back. torch has them once for a process, so other threads see that too;
of calls in several threads the first sets them aside and the last puts them back.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Iterator

import torch

from ..errors import InputError

# By their names in torch.backends. Products of float32 are float32's own ("ieee"), not of TF32 or bfloat16, and half-precision
# products are added up in float32 to the end. Of torch's two ways to say the first only the newer is used: it reads and
# writes whatever the caller used, the older one (allow_tf32, set_float32_matmul_precision) raises after the newer.
PINNED = {
    "cuda.matmul.fp32_precision": "ieee",
    "cudnn.conv.fp32_precision": "ieee",
    "mkldnn.matmul.fp32_precision": "ieee",
    "mkldnn.conv.fp32_precision": "ieee",
    "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "cuda.matmul.allow_fp16_accumulation": False,
}

AUTOCAST = ("cuda", "cpu", "xpu", "mps", "hpu", "mtia")  # devices that torch.autocast may be on for
EVERYWHERE, ON_CUDA = "fp32_precision", "cudnn.fp32_precision"

_changing = threading.Lock()
_calls: set[object] = set()  # at work, in all threads
_before: dict[str, object] = {}  # what was set when the first of them began
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """The model's own arithmetic inside, what was set afterwards. May be nested."""
    me = object()
    try:
        with _changing:
            _calls.add(me)
            if not _before:
                _pin()
        # Factories without a device would fill other devices, or none, with what is meant for a CPU.
        elsewhere = torch.get_default_device().type != "cpu"
        with torch.device("cpu") if elsewhere else contextlib.nullcontext():
            yield
    finally:
        with _changing:
            _calls.discard(me)
            if not _calls:
                try:
                    _undo.close()
                finally:  # or no later call would set anything aside
                    _before.clear()


def _pin() -> None:
    before = matmul_settings()
    for name, value in before.items():
        _undo.callback(_set, name, "none" if _inherited(name) else value, _split_k(name))
    _before.update(before)
    for name, value in PINNED.items():
        _set(name, value, _split_k(name))
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and this would import it
        # Compiled code would have the hooks of a scan, or of none, in it.
        try:
            _undo.enter_context(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise InputError(
                "this is a function that torch.compile runs, and a scan cannot be compiled: call shipsfast outside of it"
            ) from error


def _inherited(name: str) -> bool:
    """Whether a precision is that of all products, or all of CUDA, so that it would follow when those are set anew. torch
    tells only what is in force."""
    if not name.endswith("fp32_precision") or _get(name) == "none":
        return False
    return _follows(name, EVERYWHERE) or (
        name.startswith("cud") and not _follows(ON_CUDA, EVERYWHERE) and _follows(name, ON_CUDA)
    )


def _follows(name: str, parent: str) -> bool:
    """parent: one whose value in force is its own."""
    before = _get(parent)
    if before != _get(name):
        return False
    try:
        _set(parent, "ieee" if before == "tf32" else "tf32")
        return _get(name) != before
    finally:
        _set(parent, before)


def _split_k(name: str) -> bool | None:
    """What goes with a permission to round partial sums: whether there may be partial sums at all."""
    return _get(name + "_split_k") if name.endswith("_reduction") else None


def _get(name: str):
    return operator.attrgetter(name)(torch.backends)


def _set(name: str, value, split_k: bool | None = None) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(
        _get(owner) if owner else torch.backends, attribute, value if split_k is None else (value, split_k)
    )


def matmul_settings() -> dict[str, object]:
    """How torch multiplies matrices now, by the names of `PINNED`."""
    return {name: _get(name) for name in PINNED}


def describe_matmul() -> dict[str, dict]:
    """For the record of a run: what its products run with, and what was set before the call."""
    now = matmul_settings()
    return {"ran": now, "before": dict(_before) or now}


def autocast() -> str | None:
    """Where torch.autocast is on in this thread, in words; None where it is off."""
    for device in AUTOCAST:
        if torch.is_autocast_enabled(device):
            return f"for {device}, to {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
    return None


def refuse_surroundings() -> None:
    """Raises InputError inside of what would ask for other numbers: torch.autocast, a transform of torch.func."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "a transform of torch.func (grad, vmap, ...) is at work, and scores are no function it can transform: call "
            "shipsfast outside of it"
        )
    where = autocast()
    if where is not None:
        raise InputError(
            f"torch.autocast is on ({where}), and scores are of the model in its own dtype: leave that context, or load the "
            "model in the dtype that is wanted"
        )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """For what is done inside of somebody else's autocast and is no part of their calls."""
    with contextlib.ExitStack() as stack:
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
