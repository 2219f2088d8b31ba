"""A thousand scans in one process leave nothing behind: memory, tensors, open files, threads, hooks, settings.

SHIPSFAST_LONG_RUNS=1000 does them all (some minutes); otherwise fewer, which is enough to see a leak of a few KB each.
"""

import gc
import os
import threading

import numpy as np
import psutil
import pytest
import torch

import shipsfast
from tests.support.models import build

RUNS = int(os.environ.get("SHIPSFAST_LONG_RUNS", "50"))
WARM = 60  # the first fifty grow by 7 KB a scan, the next by 1, and from then on it is 0.5, while pools fill
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
# Per scan. A leaked logits matrix, cache or mask of this model is 6 to 20 KB, a hook or a closure some hundred bytes,
# which the counts see. The allocator's own noise over 50 scans is below this.
MOST_RSS_BYTES = 4096


def state(model) -> dict:
    """What must not grow, counted."""
    gc.collect()
    live = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    process = psutil.Process()
    modules = list(model.modules())
    return {
        "tensors": len(live),
        "bytes of tensors": sum(x.numel() * x.element_size() for x in live),
        "objects of shipsfast": sum(
            str(type(x).__module__).startswith("shipsfast") for x in gc.get_objects()
        ),
        "open files": process.num_fds(),
        "threads": threading.active_count(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "attributes": sum(len(m.__dict__) for m in modules),
        "forwards replaced": sum("forward" in m.__dict__ for m in modules),
        "attention": model.config._attn_implementation,
        "config": str(model.config),
        "training": sum(m.training for m in modules),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.timeout(3600)
@pytest.mark.serial
def test_scans_leave_nothing_behind(tmp_path):
    model = build(dtype=torch.float32)
    process, sizes, before = psutil.Process(), [], {}

    def once(number: int) -> None:
        kind = number % 10
        if kind == 7:
            shipsfast.scan_dataset(model, PROMPTS, progress=False)
        elif kind == 8:
            shipsfast.generate(model, PROMPTS, groups=[[], [(1, 2)]], max_new_tokens=3, progress=False)
        elif kind == 9:  # one that fails halfway
            with pytest.raises(shipsfast.InputError):
                shipsfast.scan(model, PROMPTS, progress=False, metric=lambda b, a, i: a[:, 0] * float("nan"))
        else:
            out = tmp_path / "run" if kind == 6 and number < WARM else None
            shipsfast.scan(model, PROMPTS, progress=False, metric=["kl", "js"], out=out)

    for number in range(WARM + RUNS):
        if number == WARM:
            before = state(model)
        once(number)
        if number >= WARM:
            sizes.append(process.memory_info().rss)
    assert state(model) == before
    slope = float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0])
    assert slope < MOST_RSS_BYTES, f"resident memory grows by {slope:.0f} bytes a scan"
