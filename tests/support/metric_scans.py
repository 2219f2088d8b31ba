"""Scans under other metrics than KL, and one that is interrupted."""

import shipsfast
from shipsfast.engine.growing_batch import GrowingBatch
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12], [5, 6, 7, 8]]
HEADS = [(0, 1), (1, 2), (2, 3)]


def scan(metric, **options):
    return shipsfast.scan(build(), PROMPTS, metric=metric, heads=HEADS, progress=False, **options)


def to_the_mean_of_all(base_logits, ablated_logits, prompt_index):
    """A metric that needs every prompt's base logits, and the prompt's own number."""
    centre = base_logits.mean(0)
    return (ablated_logits - centre).norm(dim=1) + 100 * prompt_index


def killed_after(monkeypatch, runs):
    """The next scan is interrupted when its pass number `runs` + 1 begins."""
    real, calls = GrowingBatch.run, []

    def run(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == runs + 1:
            monkeypatch.setattr(GrowingBatch, "run", real)
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GrowingBatch, "run", run)
