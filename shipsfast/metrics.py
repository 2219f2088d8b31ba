"""How far ablation moves a model: the KL divergence between rows of logits.

    KL(base || ablated) = sum_v p_b(v) (log p_b(v) - log p_a(v)),   p = softmax(logits), in nats

is the Ships score of one prompt and one head (arXiv 2410.13708, section 3.2) where the rows are next-token
logits. It is computed in float64 by the extension `shipsfast._C`, which reads each ablated row once, or by
plain torch.
"""

from __future__ import annotations

import functools
import importlib

import torch

from .errors import InputError

KL_BACKENDS = ("auto", "cpp", "reference")
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
REMEDY = "run `pip install --no-build-isolation -e .` in the checkout, with torch and a C++ compiler there"
SCRATCH_BYTES = 64 * 2**20  # float64 scratch of the torch path, unless one row alone needs more
_LIVE_ARRAYS = 6  # float64 arrays of a chunk's size that the torch path holds at once
_LOWEST_EXPONENT = -708.0  # exp of it is the smallest normal float64: a finite base logit keeps p_b > 0


def kl_rows(
    base_logits: torch.Tensor,
    ablated_logits: torch.Tensor,
    row_map: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """KL(base || ablated) in nats of each ablated row against its base row. Float64 [N], without gradient.

    base_logits     [P, V], bfloat16, float16, float32 or float64
    ablated_logits  [N, V], same dtype and device
    row_map         [N], integers: the base row of each ablated row
    backend         "cpp" (the extension), "reference" (torch) or "auto" (the extension where it serves the device)

    A logit of -inf is a token that cannot come: it weighs nothing in base, and gives +inf in ablated where base
    allows the token. NaN, +inf, or nothing but -inf in either row gives NaN. Equal rows give exactly 0.
    Rows may have any stride; a last dimension that is not contiguous is copied for the extension.

    Raises InputError for wrong shapes, dtypes or devices, for a row_map out of range, and for a named backend
    that cannot run. The range is not checked where row_map is on a GPU, as the host would have to wait for
    it: the rows concerned are NaN.
    """
    _check(base_logits, ablated_logits, row_map)
    if backend not in KL_BACKENDS:
        raise InputError(f"unknown backend {backend!r}: expected one of {', '.join(KL_BACKENDS)}")
    device = base_logits.device
    if backend == "auto":
        backend = kl_backend(device)
    base_logits, ablated_logits = base_logits.detach(), ablated_logits.detach()
    row_map = row_map.to(device=device, dtype=torch.int64)
    if backend == "reference":
        return _kl_rows_reference(base_logits, ablated_logits, row_map)
    problem = _extension_problem(device)
    if problem:
        raise InputError(f"backend 'cpp' cannot run: {problem}; or use backend='reference' or 'auto'")
    return torch.ops.shipsfast.kl_rows(
        _rows_contiguous(base_logits), _rows_contiguous(ablated_logits), row_map
    )


def kl_backend(device: torch.device | str) -> str:
    """The backend that "auto" means on this device: "cpp" or "reference"."""
    return "reference" if _extension_problem(torch.device(device)) else "cpp"


def extension_status() -> tuple[bool, str]:
    """Whether the native extension shipsfast._C is loaded, and where from; if not, why, and the remedy."""
    return _load_extension()


@functools.cache
def _load_extension() -> tuple[bool, str]:
    try:
        module = importlib.import_module("shipsfast._C")
    except ModuleNotFoundError as error:
        if error.name != "shipsfast._C":
            raise
        return False, f"the extension shipsfast._C is not built: {REMEDY}"
    except ImportError as error:  # built for another torch or Python
        return False, f"the extension shipsfast._C does not load ({error}): {REMEDY}"
    torch.library.register_fake("shipsfast::kl_rows", _kl_rows_fake)
    return True, str(module.__file__)


def _extension_problem(device: torch.device) -> str | None:
    loaded, reason = _load_extension()
    if not loaded:
        return reason
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None:
        return f"the extension has no kernel for device {device.type!r}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("shipsfast::kl_rows", key):
        return f"the extension was built without {key}: {REMEDY}, a CUDA build of torch and nvcc"
    return None


def _kl_rows_fake(base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
    return base.new_empty(ablated.shape[:1], dtype=torch.float64)


def _check(base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> None:
    shapes = f"base {list(base.shape)}, ablated {list(ablated.shape)}, row_map {list(row_map.shape)}"
    if base.dim() != 2 or ablated.dim() != 2 or base.shape[1] != ablated.shape[1] or base.shape[1] == 0:
        raise InputError(f"expected base [P, V] and ablated [N, V] with V > 0, got {shapes}")
    if row_map.shape != ablated.shape[:1]:
        raise InputError(f"expected one base row for each ablated row, row_map [N], got {shapes}")
    if base.dtype not in LOGIT_DTYPES or base.dtype != ablated.dtype:
        raise InputError(
            f"expected logits of one dtype of bfloat16, float16, float32 and float64, got base {base.dtype} "
            f"and ablated {ablated.dtype}: convert them first"
        )
    if row_map.dtype.is_floating_point or row_map.dtype.is_complex or row_map.dtype == torch.bool:
        raise InputError(f"expected row_map in int64, got {row_map.dtype}")
    if base.device != ablated.device:
        raise InputError(
            f"expected logits on one device, got base on {base.device}, ablated on {ablated.device}"
        )
    out_of_range = row_map.device.type == "cpu" and bool(((row_map < 0) | (row_map >= base.shape[0])).any())
    if out_of_range or (base.shape[0] == 0 and ablated.shape[0] > 0):
        raise InputError(f"row_map names a row that base does not have: {shapes}")


def _rows_contiguous(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _kl_rows_reference(base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> torch.Tensor:
    rows = max(1, SCRATCH_BYTES // (_LIVE_ARRAYS * 8 * ablated.shape[1]))
    kl_nats = torch.empty(ablated.shape[0], dtype=torch.float64, device=ablated.device)
    in_range = (row_map >= 0) & (row_map < base.shape[0])
    safe_map = torch.where(in_range, row_map, 0)
    for start in range(0, ablated.shape[0], rows):
        chunk = slice(start, start + rows)
        kl_nats[chunk] = _kl_chunk(base[safe_map[chunk]], ablated[chunk])
    return kl_nats.masked_fill_(~in_range, torch.nan)


def _kl_chunk(base: torch.Tensor, ablated: torch.Tensor) -> torch.Tensor:
    """KL of pairs of rows [R, V] -> [R]. With z and t the logits less their row's maximum, e = exp(.):

        KL = log(sum e_a / sum e_b) - sum e_b (t - z) / sum e_b

    where the sums are close, as log1p(sum (e_a - e_b) / sum e_b): the error is then relative to the change.
    """
    z = base.to(torch.float64, copy=True)  # [R, V]
    z.sub_(z.amax(dim=1, keepdim=True))  # NaN in a row with NaN, +inf, or nothing but -inf
    e_b = z.clamp(min=_LOWEST_EXPONENT).exp_().masked_fill_(z == -torch.inf, 0.0)
    sum_b = e_b.sum(dim=1)
    t = ablated.to(torch.float64, copy=True)
    t.sub_(t.amax(dim=1, keepdim=True))
    e_a = t.clamp(min=_LOWEST_EXPONENT).exp_()
    sum_a = e_a.sum(dim=1)
    difference = e_a.sub_(e_b).sum(dim=1)
    weighted = t.sub_(z).mul_(e_b).masked_fill_(e_b == 0.0, 0.0).sum(dim=1)
    close = difference.abs() < 0.5 * sum_b
    log_ratio = torch.where(close, torch.log1p(difference / sum_b), torch.log(sum_a / sum_b))
    return (log_ratio - weighted / sum_b).clamp_(min=0.0)  # KL >= 0: what is below is rounding
