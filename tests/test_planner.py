"""The memory plan keeps to its limit, and says so when it cannot."""

import pytest
import torch

import shipsfast
from shipsfast.anatomy import inspect_model
from shipsfast.planner import make_plan, parse_bytes
from tests.models import build

PROMPTS = [list(range(3, 20)), list(range(3, 40)), [7]]


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("8G", 8 << 30), ("1024", 1024), ("1.5 kib", 1536)],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "8GX"])
def test_bad_amounts_are_refused(text):
    with pytest.raises(shipsfast.InputError, match="amount of memory"):
        parse_bytes(text)


def plan(limit, **options):
    model = build()
    anatomy = inspect_model(model, [1, 2], 40)
    return make_plan(
        anatomy, PROMPTS, 12, device=torch.device("cpu"), dtype=torch.float64, max_memory=limit, **options
    )


def test_less_memory_makes_smaller_blocks_and_stays_inside():
    sizes = []
    for limit in (1 << 30, 2 << 20, 1 << 20, 1 << 19, 1 << 18):
        got = plan(limit)
        assert got.predicted_bytes <= limit
        assert sorted(i for group in got.prompt_groups for i in group) == [0, 1, 2]
        sizes.append((-len(got.prompt_groups), got.rows_per_block, got.chunk_tokens))
    assert sizes[0] == (-1, 12, sizes[0][2])
    assert sizes[-1] < sizes[0]


def test_too_little_memory_is_refused_with_the_amount():
    with pytest.raises(shipsfast.InputError, match="needs .* MiB beyond the model"):
        plan(1000)


def test_a_scan_under_a_tight_limit_gives_the_same_numbers():
    model = build()
    full = shipsfast.scan(model, PROMPTS, progress=False)
    tight = shipsfast.scan(model, PROMPTS, progress=False, max_memory=1 << 18)
    assert tight.record["plan"]["rows_per_block"] < 12 or len(tight.record["plan"]["prompt_groups"]) > 1
    assert abs(tight.kl - full.kl).max() < 1e-12
