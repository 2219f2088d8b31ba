"""Streaming a model from its checkpoint beside the same scan with all of it in memory, runs interleaved.

Equal work: the same prompts, plan and scores, bit for bit. Models are loaded before a scan is timed, a streamed one anew for
every scan, so that the first reading by transformers' loader counts; layers come from the page cache or the disk, as it
happens. The question is what reading costs beside computing, so the row says how long each takes by itself.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

import shipsfast
from shipsfast.models.loading import load_model

from .cases import Case
from .provenance import append, provenance


def run_case(case: Case, repeats: int, console: Console) -> dict:
    """Time pairs of scans, in memory and streamed; append the row and return it."""
    with tempfile.TemporaryDirectory(prefix="shipsfast-bench-") as folder:
        case.model().save_pretrained(folder, max_shard_size="50MB")
        prompts = case.token_ids()
        memory, streamed = load_model(folder, device="cpu"), _streamed(folder)
        size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
        # One plan for both: what is free differs by the model.
        options = {"max_memory": 4 << 30, "progress": False, "rescored": 0}
        expected = shipsfast.scan(memory, prompts, **options)
        found = shipsfast.scan(streamed, prompts, **options)
        equal = (
            bool(np.array_equal(found.kl, expected.kl)) and found.record["plan"] == expected.record["plan"]
        )
        if not equal:
            raise RuntimeError(f"{case.name}: streamed scores are not those of the model in memory")
        reading = _read_s(streamed)
        times: dict[str, list[float]] = {"memory": [], "stream": []}
        ratios = []
        for _ in range(repeats):
            around = [_timed(lambda: shipsfast.scan(memory, prompts, **options))]
            fresh = _streamed(folder)
            taken = _timed(lambda fresh=fresh: shipsfast.scan(fresh, prompts, **options))
            around.append(_timed(lambda: shipsfast.scan(memory, prompts, **options)))
            times["memory"] += around
            times["stream"].append(taken)
            ratios.append(taken / statistics.mean(around))
    row = provenance("cpu") | {
        "bench": "stream", "case": case.name, "dtype": str(case.dtype).removeprefix("torch."),
        "prompts": case.prompts, "shared_tokens": case.shared, "own_tokens": case.own, "runs": repeats,
        "checkpoint_mib": round(size / 2**20, 1), "one_reading_s": round(reading, 4), "equal_bits": equal, "rescored": 0,
        "layers": found.record["layers"],
        "memory_median_s": round(statistics.median(times["memory"]), 4),
        "stream_median_s": round(statistics.median(times["stream"]), 4),
        "stream_to_memory": round(statistics.median(ratios), 3),
        "stream_to_memory_p20": round(float(np.quantile(ratios, 0.2)), 3),
        "stream_to_memory_p80": round(float(np.quantile(ratios, 0.8)), 3),
    }  # fmt: skip
    append("stream", [row])
    console.print(
        f"{case.name}: in memory {row['memory_median_s']:.2f} s, streamed {row['stream_median_s']:.2f} s, "
        f"{row['stream_to_memory']:.3f} times; reading all layers once takes {row['one_reading_s']:.2f} s"
    )
    return row


def _streamed(folder: str):
    return load_model(folder, device="cpu", stream=True)


def _read_s(streamed) -> float:
    """Seconds to read every layer once, one after the other, with nothing beside it."""
    layers = streamed._shipsfast_stream

    def once() -> None:
        for index in range(len(layers.layers)):
            layers._read_in(index)
            layers._take_out(index)

    return statistics.median(_timed(once) for _ in range(3))


def _timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
