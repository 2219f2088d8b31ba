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

from ..provenance import provenance
from .shapes import SMOKE, SMOKE_PROMPTS, Prompts, Shape

OURS = "shipsfast"
REASON = 300  # characters of a reason in a row


class NotMeasured(Exception):
    """Says why a path was not run; its row reads `not measured`."""


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

    def gemm_flops_per_s(
        self, shape: Shape, dtype: torch.dtype | None = None, tokens: int | None = None
    ) -> float:
        """Measured now, at the scan's own products: a device's clock changes with its temperature."""
        return flops.gemm_flops_per_s(
            shape.costs().products, tokens or self.chunk_tokens, dtype=dtype or self.dtype, device=self.device,
            repeats=2 if self.smoke else 4,
        )  # fmt: skip

    def write(self, case: str, path: str, figures: dict) -> dict:
        """Append a row and print a line; the row is on disk when this returns."""
        if self._origin is None:
            self._origin = provenance(str(self.device))
        row = self._origin | {"bench": "gpu", "case": case, "path": path} | figures
        self.results.mkdir(parents=True, exist_ok=True)
        with open(self.results / f"{self.file}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False, default=float) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        print(f"{case:22.22} {path:34.34} {summary(row)}", flush=True)
        return row

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
            text = f"{type(error).__name__}: {_short(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                text = f"out of memory: {_short(error)}"
            error.__traceback__ = None  # its frames hold tensors
            before = self.broken
            self._look_at_device()
            told = {"failed": text}
            if before is not None:
                told = {"not_measured": f"the device had stopped answering: {before}"}
            self.write(case, path, (common or {}) | told)
            self.clear()

    def _look_at_device(self) -> None:
        """After some errors nothing runs on a device any more in this process."""
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
    for name in ("failed", "not_measured"):
        if name in row:
            return f"{name.replace('_', ' ')}: {row[name]}"[:140]
    told = []
    for name, text in (
        ("median_s", "{:.2f} s"), ("median_ms", "{:.3f} ms"), ("tflops_per_s", "{:.0f} TFLOP/s"), ("gb_per_s", "{:.0f} GB/s"),
        ("rows_per_s", "{:.1f} rows/s"), ("share_of_floor", "{:.0%} of the floor"),
        ("share_of_ceiling", "{:.0%} of the ceiling"), ("times_slower_than_shipsfast", "{:.2f} x shipsfast"),
        ("peak_mib", "{:.0f} MiB"), ("extrapolated_from", "extrapolated from {}"), ("passed", "{} passed"), ("spearman", "Spearman {:.3f}"),
        ("top10_overlap", "top 10: {:.0%}"),
    ):  # fmt: skip
        if row.get(name) is not None:
            told.append(text.format(row[name]))
    return ", ".join(told) or "done"


Case = Callable[[Session], None]
