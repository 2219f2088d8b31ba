"""What the tests of divergences share: rows of logits, KL in float64, and the backends and dtypes of the ops."""

import math

import pytest
import torch

from shipsfast.ops.divergences import DIVERGENCES, divergence_rows, kl_rows
from shipsfast.ops.extension import extension_status

KL_ATOL = 1e-13
KL_RTOL = 1e-6  # of the CUDA kernel, for logits other than float64
BUILT, WHY_NOT = extension_status()
needs_extension = pytest.mark.skipif(not BUILT, reason=WHY_NOT)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BACKENDS = [
    pytest.param("reference", "cpu", id="reference-cpu"),
    pytest.param("cpp", "cpu", id="cpp-cpu", marks=needs_extension),
    pytest.param("reference", "cuda", id="reference-cuda", marks=on_gpu),
    pytest.param("cpp", "cuda", id="cpp-cuda", marks=[*on_gpu, needs_extension]),
]
each_backend = pytest.mark.parametrize("backend, device", BACKENDS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
P, N = 3, 7
INF, NAN = math.inf, math.nan


def draw(vocab, dtype=torch.float32, *, num_base=P, num_ablated=N, spread=4.0, change=0.5, seed=0):
    """base [P, V], ablated [N, V] and row_map [N], the logits drawn in their dtype."""
    generator = torch.Generator().manual_seed(seed)
    row_map = torch.randint(num_base, (num_ablated,), generator=generator)
    base = (spread * torch.randn(num_base, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    noise = change * torch.randn(num_ablated, vocab, generator=generator, dtype=torch.float64)
    return base, (base[row_map].double() + noise).to(dtype), row_map


def kl_atol(expected, logits, backend, device, floor=KL_ATOL):
    """What kl_rows of these logits may be off. The CUDA kernel's terms are float32; all else is float64."""
    in_float32 = backend == "cpp" and device == "cuda" and logits.dtype != torch.float64
    return floor + (KL_RTOL if in_float32 else 0.0) * expected


def oracle(base, ablated, row_map):
    """sum_v p_b (log p_b - log p_a) as it is written, in float64; 0 log 0 = 0."""
    log_b = torch.log_softmax(base.double(), dim=-1)[row_map]
    log_a = torch.log_softmax(ablated.double(), dim=-1)
    return torch.where(log_b == -torch.inf, 0.0, log_b.exp() * (log_b - log_a)).sum(dim=-1)


def run(base, ablated, row_map, backend, device):
    result = kl_rows(base.to(device), ablated.to(device), row_map.to(device), backend=backend)
    assert result.dtype == torch.float64 and result.device.type == device
    return result.cpu()


def run_divergences(base, ablated, row_map, backend, device, names=DIVERGENCES):
    result = divergence_rows(
        base.to(device), ablated.to(device), row_map.to(device), names=names, backend=backend
    )
    assert result.dtype == torch.float64 and result.device.type == device
    assert result.shape == (len(names), len(ablated))
    return result.cpu()


# base, ablated, and what comes out; None: a finite KL
SPECIAL = {
    "masked-in-both": ([0.0, 1.0, -INF, 2.0], [0.5, 1.0, -INF, 2.0], None),
    "masked-in-base": ([0.0, 1.0, -INF, 2.0], [0.5, 1.0, 3.0, 2.0], None),
    "finite-minimum": ([0.0, 1.0, -3e38, 2.0], [0.5, 1.0, -3e38, 2.0], None),
    "masked-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, -INF, 3.0, 2.0], INF),
    "masked-at-the-maximum": ([0.0, 1.0, 5.0, 2.0], [0.5, 1.0, -INF, 2.0], INF),
    "masked-where-p-underflows": ([0.0, 1.0, -5e3, 2.0], [0.5, 1.0, -INF, 2.0], INF),
    "nan-in-base": ([0.0, NAN, 5.0, 2.0], [0.5, 1.0, 3.0, 2.0], NAN),
    "nan-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, NAN, 3.0, 2.0], NAN),
    "nan-where-base-is-masked": ([0.0, -INF, 5.0, 2.0], [0.5, NAN, 3.0, 2.0], NAN),
    "nan-beside-a-mask": ([0.0, 1.0, 5.0, 2.0], [-INF, NAN, 3.0, 2.0], NAN),
    "inf-in-base": ([0.0, INF, 5.0, 2.0], [0.5, 1.0, 3.0, 2.0], NAN),
    "inf-in-ablated": ([0.0, 1.0, 5.0, 2.0], [0.5, 1.0, INF, 2.0], NAN),
    "inf-where-base-is-masked": ([0.0, -INF, 5.0, 2.0], [0.5, INF, 3.0, 2.0], NAN),
    "inf-in-both": ([0.0, 1.0, INF, 2.0], [0.5, 1.0, INF, 2.0], NAN),
    "base-all-masked": ([-INF] * 4, [0.5, 1.0, 3.0, 2.0], NAN),
    "ablated-all-masked": ([0.5, 1.0, 3.0, 2.0], [-INF] * 4, NAN),
}
