"""Where a scan's time goes: torch's profiler over a scan of fewer prompts, its table beside the rows."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

import shipsfast

from .alarms import alarms_off
from .clock import seconds
from .session import OURS, Session
from .shapes import LLAMA2_7B, Prompts

CASE = "profile-llama2-7b"
PROMPTS = Prompts(20, 5)
ROWS = 40


def run_profile(session: Session) -> None:
    """A row with the device's busy share, and `<device>-profile.txt`."""
    shape = session.shape(LLAMA2_7B)
    token_ids = session.prompts(PROMPTS).token_ids(shape.vocabulary)
    with session.guarded(CASE, OURS), alarms_off():
        model = session.model(shape)
        few = [(0, 0), (shape.layers - 1, 0)]
        shipsfast.scan(model, token_ids, heads=few, progress=False, rescored=0)
        taken, result = seconds(
            lambda: shipsfast.scan(model, token_ids, progress=False, rescored=0), session.device
        )
        # Events of a scan whose every layer has the same chunks: half of the layers tell as much in half the memory.
        heads = [(layer, None) for layer in range(0, shape.layers, 2)]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.on_gpu
        with profile(activities=activities) as found:
            profiled, _ = seconds(
                lambda: shipsfast.scan(model, token_ids, heads=heads, progress=False, rescored=0),
                session.device,
            )
        events = found.key_averages()
        by = "self_device_time_total" if session.on_gpu else "self_cpu_time_total"
        busy = sum(getattr(event, by) for event in events) / 1e6
        text = (
            f"{shape.title}, bf16, {len(token_ids)} prompts, every second layer's heads; attention by "
            f"{result.record['attention_backend']}, layers {result.record['layers']}\nprofiled {profiled:.3f} s, sum of self times {busy:.3f} s; without "
            f"the profiler, all heads: {taken:.3f} s\n\n"
        )
        table = events.table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
        place = session.results / f"{session.file}-profile.txt"
        session.results.mkdir(parents=True, exist_ok=True)
        place.write_text(text + table + "\n", "utf-8")
        largest = sorted(events, key=lambda event: -getattr(event, by))[:12]
        session.write(
            CASE,
            OURS,
            {
                "dtype": "bfloat16", "prompts": len(token_ids), "layers": result.record["layers"], "median_s": round(taken, 4), "runs": 1,
                "profiled_s": round(profiled, 4), "busy_s": round(busy, 4), "file": place.name,
                "largest": [
                    {"name": event.key[:80], "self_ms": round(getattr(event, by) / 1e3, 3), "calls": event.count}
                    for event in largest
                ],
            },
        )  # fmt: skip
    session.clear()
