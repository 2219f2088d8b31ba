"""What counts as running out of memory, by the words of those who say so, and what does not."""

import errno
import weakref

import numpy as np
import pytest
import torch

import shipsfast
from shipsfast.memory import is_out_of_memory, out_of_memory
from tests.support.faults import scan
from tests.support.models import build

pytestmark = pytest.mark.usefixtures("one_thread")

ASYNC = (
    "\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)
RAN_OUT = {
    "torch's allocator": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
    ),
    "told on as another error": RuntimeError(
        "CUDA out of memory. Tried to allocate 14.00 GiB (GPU 0; 24.00 GiB total"
    ),
    "runtime, or pinned host memory": torch.AcceleratorError("CUDA error: out of memory" + ASYNC),
    "runtime, before AcceleratorError": RuntimeError("CUDA error: out of memory" + ASYNC),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "ROCm": RuntimeError("HIP error: out of memory"),
    "Triton's driver": RuntimeError("Triton Error [CUDA]: out of memory"),
    "NVRTC": RuntimeError("CUDA NVRTC error: NVRTC_ERROR_OUT_OF_MEMORY"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuBLASLt": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmulAlgoGetHeuristic( ltHandle, "
        "computeDesc.descriptor(), Adesc.descriptor()`"
    ),
    "cuSOLVER": torch.linalg.LinAlgError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"
    ),
    "a handle of cuSOLVER": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"
    ),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "a CPU's allocator": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "the same elsewhere": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "mmap in another language": OSError(errno.ENOMEM, "Nicht genügend Hauptspeicher verfügbar"),
    "mmap of Rust": OSError("Cannot allocate memory (os error 12)"),
    "mmap of torch": RuntimeError(
        "unable to mmap 23802932552 bytes from file </models/model.safetensors>: Cannot allocate memory (12)"
    ),
}


def out_of_resources() -> Exception:
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376.")
    return OutOfResources(131072, 101376, "shared memory")


DID_NOT = {
    "shared memory of a block": out_of_resources(),
    "the same, told on": RuntimeError(
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes may help."
    ),
    "illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + ASYNC),
    "assert": torch.AcceleratorError("CUDA error: device-side assert triggered" + ASYNC),
    "Triton's driver": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"),
    "a matrix with NaN": torch.linalg.LinAlgError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXgesvd(handle, params)`. This error may "
        "appear if the input matrix contains NaN."
    ),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a short file": RuntimeError("model-00001.safetensors is too short: 12 bytes, and 4096 were expected"),
    "a missing file": FileNotFoundError(errno.ENOENT, "No such file or directory", "Cannot allocate memory"),
    "a size beyond all": RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
    "ours": shipsfast.InputError("out of memory even with the smallest plan: CUDA out of memory"),
    "words of another kind of error": ValueError("CUDA out of memory"),
    "shared memory of workers": RuntimeError("DataLoader worker is killed: it is out of shared memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAN_OUT)
def test_what_it_is(name):
    assert is_out_of_memory(RAN_OUT[name])
    with out_of_memory() as caught:
        raise RAN_OUT[name]
    assert caught == [RAN_OUT[name]]


@pytest.mark.parametrize("name", DID_NOT)
def test_what_it_is_not(name):
    assert not is_out_of_memory(DID_NOT[name])
    with pytest.raises(type(DID_NOT[name])), out_of_memory():
        raise DID_NOT[name]


def test_real_ones():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 50)
    assert is_out_of_memory(caught.value)


def raised(error: Exception, cause: BaseException | None) -> Exception:
    try:
        raise error from cause
    except type(error) as done:
        return done


def test_what_it_was_raised_from_counts():
    wrapped = raised(
        RuntimeError("backend='inductor' raised:"), raised(ValueError("in a hook"), MemoryError())
    )
    assert is_out_of_memory(wrapped)
    with out_of_memory() as caught:
        raise wrapped
    assert caught == [wrapped]
    assert not is_out_of_memory(raised(RuntimeError("in a hook"), KeyError("x")))
    circle = RuntimeError("of itself")
    assert not is_out_of_memory(raised(circle, circle))
    # One that says what was wrong, and what to do.
    assert not is_out_of_memory(raised(shipsfast.InputError("does not fit on cpu"), MemoryError()))


def test_what_either_of_them_held_is_free():
    alive = []

    def full():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        raise MemoryError

    def hook():
        try:
            full()
        except MemoryError as error:
            raise RuntimeError("in a hook") from error

    with out_of_memory() as caught:
        hook()
    assert isinstance(caught[0].__cause__, MemoryError) and alive[0]() is None


def test_an_error_while_another_was_dealt_with_is_its_own():
    with pytest.raises(RuntimeError, match="a bug") as caught:
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("a bug")
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize("name", [name for name in RAN_OUT if name != "Python"])
def test_the_plan_is_halved_and_the_scores_are_the_same(monkeypatch, name):
    from shipsfast.engine.growing_batch import GrowingBatch

    model = build()
    whole = scan(None, model)
    run, tries = GrowingBatch.run, []

    def full_at_first(self, *args, **how):
        tries.append(1)
        if len(tries) == 1:
            raise RAN_OUT[name]
        return run(self, *args, **how)

    monkeypatch.setattr(GrowingBatch, "run", full_at_first)
    result = scan(None, model)
    np.testing.assert_allclose(result.kl, whole.kl, rtol=0, atol=1e-11)
    halved = {key: whole.record["plan"][key] // 2 for key in ("chunk_tokens", "rows_per_block", "head_rows")}
    assert {key: result.record["plan"][key] for key in halved} == halved


def test_another_error_of_the_device_ends_the_scan(monkeypatch):
    def broken(*_, **__):
        raise DID_NOT["illegal access"]

    monkeypatch.setattr("shipsfast.engine.growing_batch.GrowingBatch.run", broken)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        scan(None, build())
