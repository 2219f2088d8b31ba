"""One run of the GPU benchmark: its device, models, ceilings, time left, and the rows it writes at once."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shipsfast.engine import flops
from shipsfast.engine.memory_plan import CPU_CHUNK_TOKENS, CUDA_CHUNK_TOKENS
from shipsfast.models.ambient import set_aside

from ..provenance import provenance
from . import rows as words
from .rows import OURS, PENDING  # noqa: F401 (OURS: what the cases call our own path)
from .shapes import SMOKE, SMOKE_PROMPTS, Prompts, Shape

REASON = 300  # characters of a reason in a row
# Of matrix products on end: long enough for a device to settle at its power limit. Shorter where the result is only looked at.
SUSTAINED_S, SUSTAINED_SHORT_S, SUSTAINED_SMOKE_S = 2.0, 0.5, 0.01


class NotMeasured(Exception):
    """Says why a path was not run; its row reads `not measured`."""


@dataclass(frozen=True)
class GemmRate:
    """FLOP/s of one layer's products. burst: of some 100 ms after a rest; sustained: of seconds on end, which is what a
    scan gets, and what floors of scans are made of."""

    burst: float
    sustained: float

    def figures(self) -> dict:
        return {
            "gemm_tflops_per_s": float(f"{self.sustained / 1e12:.4g}"),
            "gemm_burst_tflops_per_s": float(f"{self.burst / 1e12:.4g}"),
        }


@dataclass
class Session:
    """budget_s: of the whole run; quick: fewer runs and samples; smoke: small shapes, for a test on a CPU."""

    device: torch.device
    results: Path
    budget_s: float = float("inf")
    quick: bool = False
    smoke: bool = False
    started: float = field(default_factory=time.perf_counter)
    rows: list[dict] = field(default_factory=list)
    broken: str | None = None  # why nothing runs on the device any more
    ceilings: dict[str, float] = field(default_factory=dict)
    _origin: dict | None = None
    _model: tuple | None = None
    _rates: dict = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.perf_counter() - self.started)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def chunk_tokens(self) -> int:
        return 64 if self.smoke else CUDA_CHUNK_TOKENS if self.on_gpu else CPU_CHUNK_TOKENS

    def share_s(self, seconds: float) -> float:
        """What a path may take: `seconds`, less where the budget is nearly spent, next to nothing in a smoke run."""
        if self.smoke:
            return 0.02
        return max(0.5, min(seconds if self.quick else 3 * seconds, self.left_s / 4))

    def shape(self, shape: Shape) -> Shape:
        return SMOKE[shape] if self.smoke else shape

    def prompts(self, prompts: Prompts) -> Prompts:
        if not self.smoke:
            return prompts
        return Prompts(min(SMOKE_PROMPTS.count, prompts.count), min(prompts.shared, 7), 2, 5, 4)

    def model(self, shape: Shape, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model of a shape; it stays until another is asked for."""
        dtype = dtype or self.dtype
        if self._model is None or self._model[:2] != (shape, dtype):
            self.drop_model()
            self._model = (shape, dtype, shape.model(self.device, dtype))
        return self._model[2]

    def drop_model(self) -> None:
        self._model = None
        self.clear()

    def clear(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.on_gpu and self.broken is None:
            torch.cuda.empty_cache()

    def gemm_rate(
        self,
        shape: Shape,
        dtype: torch.dtype | None = None,
        tokens: int | None = None,
        *,
        seconds: float = SUSTAINED_S,
    ) -> GemmRate:
        """At a scan's own products, by default at its chunk: measured once, and kept. In half precision with partial sums in
        float32, as in a scan; float32 as it is set."""
        products, tokens, dtype = shape.costs().products, tokens or self.chunk_tokens, dtype or self.dtype
        key = (products, dtype, tokens, torch.backends.cuda.matmul.fp32_precision)
        if key not in self._rates:
            how = dict(dtype=dtype, device=self.device)
            with set_aside() if dtype.itemsize < 4 else contextlib.nullcontext():
                burst = flops.gemm_flops_per_s(products, tokens, repeats=2 if self.smoke else 4, **how)
                self._rates[key] = GemmRate(
                    burst, flops.gemm_flops_per_s(products, tokens, seconds=self.sustained_s(seconds), **how)
                )
        return self._rates[key]

    def gemm_rate_around(self, shape: Shape, before: GemmRate) -> GemmRate:
        """The same with the sustained rate measured again, right after a scan, and the mean of both."""
        with set_aside():
            again = flops.gemm_flops_per_s(
                shape.costs().products, self.chunk_tokens, dtype=self.dtype, device=self.device,
                seconds=self.sustained_s(SUSTAINED_SHORT_S if self.quick else SUSTAINED_S),
            )  # fmt: skip
        return GemmRate(before.burst, (before.sustained + again) / 2)

    def sustained_s(self, seconds: float) -> float:
        return SUSTAINED_SMOKE_S if self.smoke else seconds

    def write(self, case: str, path: str, figures: dict) -> dict:
        """Append a row and print a line; the row is on disk when this returns."""
        if self._origin is None:
            self._origin = provenance(str(self.device))
        row = words.finite(self._origin | {"bench": "gpu", "case": case, "path": path} | figures)
        self._append(row)
        self.rows.append(row)
        return row

    def write_unchecked(self, case: str, path: str, figures: dict) -> dict:
        """A row of a result whose check is still to come, and may be what does not come to an end: `settle` follows."""
        return self.write(case, path, figures | {"check": PENDING})

    def settle(self, row: dict, found: dict) -> None:
        """Append the row again with what its check found, `check` and figures: of rows with one case and path, the
        last counts."""
        row |= words.finite(found)
        self._append(row)

    def _append(self, row: dict) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        with open(self.results / f"{self.file}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False, default=float) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{row['case']:22.22} {row['path']:34.34} {summary(row)}", flush=True)

    @property
    def file(self) -> str:
        return "smoke-cpu" if self.smoke else device_slug(self.device)

    @contextlib.contextmanager
    def guarded(self, case: str, path: str, common: dict | None = None) -> Iterator[None]:
        """Whatever goes wrong inside is a row that says why; the benchmark goes on."""
        try:
            yield
        except NotMeasured as reason:
            self.write(case, path, (common or {}) | {"not_measured": _short(reason)})
        except Exception as error:  # noqa: BLE001 (whatever it is, the next case must run)
            before = self.broken
            told = {"failed": self.caught(error)}
            if before is not None:
                told = {"not_measured": f"the device had stopped answering: {before}"}
            self.write(case, path, (common or {}) | told)
            self.clear()

    def caught(self, error: Exception) -> str:
        """What a row says of an error, whose frames are let go; after some, nothing runs on a device any more."""
        error.__traceback__ = None  # its frames hold tensors
        self._look_at_device()
        kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        return f"{kind}: {_short(error)}"

    def checked(self, check: Callable[[], dict]) -> dict:
        """What a check finds; one that cannot be made is a verdict too, and no reason to lose what it was to check."""
        try:
            return check()
        except Exception as error:  # noqa: BLE001 (whatever it is, the result was not confirmed)
            found = {"check": words.verdict(f"could not be made: {self.caught(error)}")}
            self.clear()
            return found

    def _look_at_device(self) -> None:
        if not self.on_gpu or self.broken is not None:
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:  # noqa: BLE001
            self.broken = _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return text if len(text) <= REASON else text[: REASON - 3] + "..."


def device_slug(device: torch.device) -> str:
    """The name of a device's results file: "nvidia-h200"."""
    if device.type != "cuda":
        return "cpu"
    return "-".join(torch.cuda.get_device_name(device).lower().replace("/", " ").split())


def summary(row: dict) -> str:
    """What a line on the terminal says of a row."""
    if "failed" in row or "not_measured" in row:
        return words.reason(row)[:140]
    told = [] if row.get("check", words.PASSED) == words.PASSED else [f"check {row['check']}"[:110]]
    for name, text in (
        ("median_s", "{:.2f} s"), ("median_ms", "{:.3f} ms"), ("tflops_per_s", "{:.0f} TFLOP/s"), ("gb_per_s", "{:.0f} GB/s"),
        ("rows_per_s", "{:.1f} rows/s"), ("share_of_floor", "{:.0%} of the floor"),
        ("share_of_ceiling", "{:.0%} of the ceiling"), ("times_slower_than_shipsfast", "{:.2f} x shipsfast"),
        ("peak_mib", "{:.0f} MiB"), ("extrapolated_from", "extrapolated from {}"), ("passed", "{} passed"), ("failed_tests", "{} failed"), ("spearman", "Spearman {:.3f}"),
        ("top10_overlap", "top 10: {:.0%}"),
    ):  # fmt: skip
        if row.get(name) is not None:
            told.append(text.format(row[name]))
    return ", ".join(told) or "done"


Case = Callable[[Session], None]
