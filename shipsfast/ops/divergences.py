"""How far ablation moves a model: divergences between rows of logits, in float64.

With p_b = softmax(base logits), p_a = softmax(ablated logits) and m = (p_b + p_a) / 2:

    kl               KL(base || ablated) = sum_v p_b(v) (log p_b(v) - log p_a(v))            nats
    reverse_kl       KL(ablated || base) = sum_v p_a(v) (log p_a(v) - log p_b(v))            nats
    js               (KL(base || m) + KL(ablated || m)) / 2, Jensen-Shannon                  nats, 0 .. ln 2
    total_variation  sum_v |p_a(v) - p_b(v)| / 2                                             0 .. 1, no unit

KL(base || ablated) is the Ships score of one prompt and one head (arXiv 2410.13708, section 3.2) where the rows
are next-token logits. All are computed by the extension `shipsfast._C`, which takes each ablated row from memory
once, or by plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from ..errors import InputError
from .extension import REMEDY, extension_status

KL_BACKENDS = ("auto", "cpp", "reference")
DIVERGENCES = ("kl", "reverse_kl", "js", "total_variation")  # in the order of the extension's bits
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCRATCH_BYTES = 64 * 2**20  # float64 scratch of the torch path, unless one row alone needs more
_LIVE_ARRAYS = 6  # float64 arrays of a chunk's size that the torch path of kl_rows holds at once
_LIVE_DIVERGENCE_ARRAYS = 14  # and that of divergence_rows
_SMALL = 0.34  # the series below are for distances under this, with 2e-18 left out
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
    The error is about 1e-15 nats for logits of ordinary range. On CUDA, "cpp" is off by up to 1e-6 of the KL
    instead, however small that is, but for float64 logits, by 1e-12 of it.
    Rows may have any stride; a last dimension that is not contiguous is copied for the extension.

    Raises InputError for wrong shapes, dtypes or devices, for a row_map out of range, and for a named backend
    that cannot run. The range is not checked where row_map is on a GPU, as the host would have to wait for
    it: the rows concerned are NaN.
    """
    backend, base, ablated, row_map = _arguments(base_logits, ablated_logits, row_map, backend, "kl_rows")
    if backend == "reference":
        return _in_chunks(_kl_chunk, base, ablated, row_map, 1, _LIVE_ARRAYS)[0]
    return torch.ops.shipsfast.kl_rows(base, ablated, row_map)


def divergence_rows(
    base_logits: torch.Tensor,
    ablated_logits: torch.Tensor,
    row_map: torch.Tensor,
    *,
    names: Sequence[str],
    backend: str = "auto",
) -> torch.Tensor:
    """The divergences `names` of each ablated row from its base row. Float64 [len(names), N], without gradient.

    base_logits     [P, V], bfloat16, float16, float32 or float64
    ablated_logits  [N, V], same dtype and device
    row_map         [N], integers: the base row of each ablated row
    names           of "kl", "reverse_kl", "js" (nats, natural logarithm) and "total_variation" (no unit)
    backend         "cpp" (the extension), "reference" (torch) or "auto" (the extension where it serves the device)

    Small divergences keep their digits: the error is relative, near 1e-14 for logits of ordinary range (1e-12
    where a divergence is below 1e-18), unless rounding a large common offset between the two rows hides their
    difference. "kl" alone is kl_rows, which is faster, and whose error is another.

    A logit of -inf is a token that cannot come. Where it can come in the other row, it gives kl = +inf for -inf
    in ablated, reverse_kl = +inf for -inf in base, and its share in the other divergences; -inf in both weighs
    nothing. NaN, +inf, or nothing but -inf in either row gives NaN. Equal rows give exactly 0, and no result is
    negative. js and total_variation do not exceed ln 2 and 1.

    Raises InputError as kl_rows does, and for names that are none of the four.
    """
    if isinstance(names, str) or not names or not set(names) <= set(DIVERGENCES):
        raise InputError(f"divergences {names!r}: expected a list of {', '.join(DIVERGENCES)}")
    if set(names) == {"kl"}:
        return kl_rows(base_logits, ablated_logits, row_map, backend=backend).repeat(len(names), 1)
    backend, base, ablated, row_map = _arguments(
        base_logits, ablated_logits, row_map, backend, "divergence_rows"
    )
    chosen = [name for name in DIVERGENCES if name in names]
    if backend == "reference":
        chunk = functools.partial(_divergence_chunk, names=chosen)
        results = _in_chunks(chunk, base, ablated, row_map, len(chosen), _LIVE_DIVERGENCE_ARRAYS)
    else:
        which = sum(1 << DIVERGENCES.index(name) for name in chosen)
        results = torch.ops.shipsfast.divergence_rows(base, ablated, row_map, which)
    return results if list(names) == chosen else results[[chosen.index(name) for name in names]]


def kl_backend(device: torch.device | str) -> str:
    """The backend that "auto" means on this device: "cpp" or "reference"."""
    return "reference" if _extension_problem(torch.device(device), "kl_rows") else "cpp"


def _arguments(
    base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor, backend: str, op: str
) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks a call of `op`. Returns "cpp" or "reference", and base, ablated and row_map as that takes them."""
    check_rows(base, ablated, row_map)
    if backend not in KL_BACKENDS:
        raise InputError(f"unknown backend {backend!r}: expected one of {', '.join(KL_BACKENDS)}")
    if backend != "reference":
        problem = _extension_problem(base.device, op)
        if problem and backend == "cpp":
            raise InputError(f"backend 'cpp' cannot run: {problem}; or use backend='reference' or 'auto'")
        backend = "reference" if problem else "cpp"
    base, ablated = base.detach(), ablated.detach()
    row_map = row_map.to(device=base.device, dtype=torch.int64)
    if backend == "cpp":
        base, ablated = _rows_contiguous(base), _rows_contiguous(ablated)
    return backend, base, ablated, row_map


def _extension_problem(device: torch.device, op: str) -> str | None:
    loaded, reason = extension_status()
    if not loaded:
        return reason
    if not hasattr(torch.ops.shipsfast, op):
        return f"the extension is from before {op}: {REMEDY}"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None:
        return f"the extension has no kernel for device {device.type!r}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"shipsfast::{op}", key):
        return f"the extension was built without {key}: {REMEDY}, a CUDA build of torch and nvcc"
    return None


def check_rows(base: torch.Tensor, ablated: torch.Tensor, row_map: torch.Tensor) -> None:
    """Raises InputError unless base [P, V], ablated [N, V] and row_map [N] go together."""
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
    """For the extension, which wants rows in one piece, at addresses that their type allows."""
    if logits.is_cpu and logits.data_ptr() % logits.element_size():
        return logits.clone(memory_format=torch.contiguous_format)
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _in_chunks(
    chunk_results: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],  # of pairs [R, V], [R, V] -> [K, R]
    base: torch.Tensor,
    ablated: torch.Tensor,
    row_map: torch.Tensor,
    num_results: int,
    live_arrays: int,
) -> torch.Tensor:
    """chunk_results of all pairs of rows, [K, N], within SCRATCH_BYTES; NaN for a row_map out of range."""
    rows = max(1, SCRATCH_BYTES // (live_arrays * 8 * ablated.shape[1]))
    results = torch.empty(num_results, ablated.shape[0], dtype=torch.float64, device=ablated.device)
    in_range = (row_map >= 0) & (row_map < base.shape[0])
    safe_map = torch.where(in_range, row_map, 0)
    for start in range(0, ablated.shape[0], rows):
        chunk = slice(start, start + rows)
        results[:, chunk] = chunk_results(base[safe_map[chunk]], ablated[chunk])
    return results.masked_fill_(~in_range, torch.nan)


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


def _divergence_chunk(base: torch.Tensor, ablated: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The divergences `names` of pairs of rows [R, V] -> [len(names), R], by the terms of csrc/ships_divergence.h:

        d = log p_a - log p_b,  a = |d|,  s = exp(-a),  top = max(p_a, p_b)
        toward = s - 1 + a,  away = 1 - s (1 + a),  drop = 1 - s
        kl += top (away if d > 0 else toward),  reverse_kl the other way round
        js += top ((1 + s) log(2 / (1 + s)) - s a) / 2,  total_variation += top drop / 2

    None is negative, and for small a each is computed to full relative accuracy.
    """
    # In one layout, so that equal rows have equal sums.
    x_b = base.to(torch.float64).contiguous()  # [R, V]
    x_a = ablated.to(torch.float64).contiguous()
    max_b, log_sum_b = _norm(x_b)
    max_a, log_sum_a = _norm(x_a)
    log_p_b = (x_b - max_b).sub_(log_sum_b)
    top = (x_a - max_a).sub_(log_sum_a)
    torch.maximum(top, log_p_b, out=top).clamp_(min=_LOWEST_EXPONENT).exp_()  # NaN where a log_sum is
    del log_p_b
    d = (x_a - x_b).sub_((max_a - max_b) + (log_sum_a - log_sum_b))
    del x_a, x_b
    up = d > 0.0
    a = torch.nan_to_num_(d.abs_(), nan=0.0, posinf=torch.inf)  # NaN: -inf in both rows
    small = a < _SMALL
    near = torch.where(small, a, 0.0)
    tail = near.square().mul_(_polynomial(near, _TAIL))  # s - 1 + a
    finite = a.clamp(max=-_LOWEST_EXPONENT)
    s = finite.neg().exp_()
    drop = torch.where(small, near - tail, 1.0 - s)
    sums = {}
    if "js" in names:
        half = 0.5 * drop
        f = half / (2.0 - half)
        rest = half * f + 2.0 * f**3 * _polynomial(f.square(), _ATANH)  # -log(1 - half) - half, where small
        close = (0.5 * near.square() - tail) - 0.5 * tail.square() + (1.0 + s) * rest
        far = torch.log1p(half.neg_()).mul_(-1.0 - s).sub_(s * finite)
        sums["js"] = torch.where(small, close, far).mul_(top).sum(dim=1).mul_(0.5).clamp_(0.0, math.log(2.0))
        del half, f, rest, close, far
    if "total_variation" in names:
        change = top * drop
        gained = torch.where(up, change, 0.0).sum(dim=1)
        excess = gained - torch.where(up, 0.0, change).sum(dim=1)  # sum p_a - 1: the error of the log sums
        mass_up = torch.where(up, top, 0.0).sum(dim=1)
        sums["total_variation"] = (gained - mass_up * (excess / (1.0 + excess))).clamp_(0.0, 1.0)
        del change
    if "kl" in names or "reverse_kl" in names:
        away = torch.where(small, near * drop - tail, 1.0 - s * (1.0 + finite)).mul_(top)
        toward = torch.where(small, tail, (s - 1.0) + a).mul_(top)
        sums["kl"] = torch.where(up, away, toward).sum(dim=1)
        sums["reverse_kl"] = torch.where(up, toward, away).sum(dim=1)
    return torch.stack([sums[name] for name in names])


# s - 1 + a = a^2 (1/2! - a/3! + a^2/4! ...), and (atanh(f) - f) / f^3 = 1/3 + f^2/5 + f^4/7 ...
_TAIL = tuple((-1) ** k / math.factorial(k + 2) for k in range(12))
_ATANH = tuple(1.0 / (2 * k + 3) for k in range(9))


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value


def _norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """largest and log_sum, [R, 1] each: log sum exp(x) = largest + log_sum. log_sum is NaN in a row with NaN,
    +inf, or nothing but -inf."""
    largest = x.amax(dim=1, keepdim=True)
    return largest, (x - largest).exp_().sum(dim=1, keepdim=True).log_()
