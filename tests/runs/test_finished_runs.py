"""A finished run that is asked for again: each part is read and checked once, those that no result needs as well."""

import collections
import shutil

import numpy as np
import pytest

import shipsfast
from shipsfast.runs.manifest import Part
from shipsfast.runs.verify import render, verify
from tests.support.evaluations import evaluate, scan_asr
from tests.support.models import build

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [11, 12]]
HOW = dict(progress=False, rows_per_block=6)
KINDS = {
    "scan": lambda out, model: shipsfast.scan(model, PROMPTS, metric=["kl", "js"], out=out, **HOW),
    "scan-dataset": lambda out, model: shipsfast.scan_dataset(model, PROMPTS, out=out, **HOW),
    "top": lambda out, model: shipsfast.top_heads(model, PROMPTS, k=2, screen="float32", out=out, **HOW),
    "sahara": lambda out, model: shipsfast.sahara(model, PROMPTS, out=out, group_size=2, **HOW),
    "controlled": lambda out, model: shipsfast.sahara(
        model, PROMPTS, out=out, group_size=2, control=PROMPTS[:2], penalty=3, **HOW
    ),
    "asr": lambda out, model: scan_asr(model, out=out, heads=[(0, 1), (2, 3)]),
    "evaluate": lambda out, model: evaluate(model=model, out=out, control=["some words here"]),
}
ROOMS = [
    ("scan", "scores"), ("scan", "also/1/scores"), ("scan-dataset", "basis"), ("scan-dataset", "grams"),
    ("top", "scores"), ("top", "screen"),
    ("sahara", "basis"), ("sahara", "scores"), ("controlled", "scores"), ("controlled", "control"), ("asr", "completions"), ("asr", "scores"),
    ("evaluate", "completions"), ("evaluate", "control"), ("evaluate", "scores"),
]  # fmt: skip


def numbers(result) -> np.ndarray:
    if hasattr(result, "completions"):
        return result.completions.label
    if getattr(result, "control_by_prompt", None) is not None:
        return np.concatenate([result.angle_deg.ravel(), result.control_by_prompt.ravel()])
    return result.angle_deg if hasattr(result, "angle_deg") else result.scores


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    places = {kind: tmp_path_factory.mktemp("runs") / kind for kind in KINDS}
    return {kind: (place, numbers(KINDS[kind](place, model))) for kind, place in places.items()}


@pytest.fixture
def reads(monkeypatch):
    """How often each part is read, and so hashed."""
    count, real = collections.Counter(), Part.read

    def read(self, folder):
        count[folder / self.file] += 1
        return real(self, folder)

    monkeypatch.setattr(Part, "read", read)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_read_once(model, finished, reads, kind):
    out, whole = finished[kind]
    everything = dict.fromkeys(out.rglob("part-*.parquet"), 1)
    again = KINDS[kind](out, model)
    assert reads == everything and np.array_equal(numbers(again), whole, equal_nan=True)
    assert getattr(again, "also", {}).keys() == ({"js"} if kind == "scan" else set())
    reads.clear()
    assert np.array_equal(numbers(shipsfast.load(out)), whole, equal_nan=True)
    assert reads and set(reads.values()) == {1}
    reads.clear()
    verify(out)
    assert reads == everything


def turn_a_bit(part) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "room"), ROOMS, ids=[f"{kind}-{room.replace('/', '-')}" for kind, room in ROOMS]
)
def test_any_damaged_part_is_made_good(tmp_path, capfd, model, finished, kind, room):
    out = shutil.copytree(finished[kind][0], tmp_path / "run")
    part = next((out / room).glob("part-*.parquet"))
    turn_a_bit(part)
    again = KINDS[kind](out, model)
    np.testing.assert_allclose(numbers(again), finished[kind][1], rtol=0, atol=1e-9)
    assert str(part) in capfd.readouterr().err
    assert verify(out)["verdict"] == "sound", render(verify(out))


def test_a_part_that_is_not_listed_is_cleared_away(tmp_path, model, finished):
    out = shutil.copytree(finished["scan"][0], tmp_path / "run")
    shutil.copy(out / "scores/part-000000.parquet", out / "scores/part-000777.parquet")
    assert np.array_equal(numbers(KINDS["scan"](out, model)), finished["scan"][1])
    assert not (out / "scores/part-000777.parquet").exists()


def test_saving_over_a_damaged_folder_makes_it_good(tmp_path, model, finished):
    result = shipsfast.load(finished["scan-dataset"][0])
    for room in ("scores", "grams"):
        out = shutil.copytree(finished["scan-dataset"][0], tmp_path / room)
        turn_a_bit(next((out / room).glob("part-*.parquet")))
        result.save(out)
        assert verify(out)["verdict"] == "sound", render(verify(out))
        assert np.array_equal(shipsfast.load(out).angle_deg, result.angle_deg)
