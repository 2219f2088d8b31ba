"""A direction on its own: its file, its cosines, and what is no direction."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from shipsfast import Direction, InputError

VECTORS = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
IDENTITY = {"fingerprint": "ab", "dtype": "float32", "prompts_a": ["x", "y"], "prompts_b": ["z"]}


def direction(**given) -> Direction:
    about = {"layer": 1, "identity": IDENTITY, "record": {"model": {"name": "tiny"}, "seconds": 0.5}}
    return Direction(VECTORS, np.array([0.5, 1.0, np.nan]), **about | given)


def test_a_file_and_back(tmp_path):
    given, path = direction(position=-3), tmp_path / "d.safetensors"
    given.save(path)
    found = Direction.load(path)
    assert found == given
    assert (found.layer, found.position, found.record) == (1, -3, given.record)
    assert found.vectors.dtype == found.auroc.dtype == np.float64
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["model"] == "tiny"
        assert json.loads(file.metadata()["identity"]) == IDENTITY


def test_what_it_says(capsys):
    given = direction()
    assert repr(given) == "Direction of tiny: 2 prompts less 1 prompt, layer 1 of 3, position -1, AUROC 1"
    given.show()
    assert "1 chosen" in capsys.readouterr().out
    said = json.loads(json.dumps(given.as_json(), allow_nan=False))
    assert said["norm"] == [5, 2, 1]
    assert said["auroc"] == [0.5, 1, None]


def test_cosine():
    given = direction()
    assert given.cosine(given).tolist() == pytest.approx([1, 1, 1])
    assert given.cosine([1.0, 0.0]).tolist() == pytest.approx([0.6, 0, -1])
    assert np.isnan(given.cosine(np.zeros(2))).all()
    with pytest.raises(InputError, match=r"vectors \[3, 2\], the other \[3\]: they are of other models"):
        given.cosine(np.zeros(3))


@pytest.mark.parametrize(
    "given",
    [
        {"vectors": np.zeros(3)}, {"vectors": np.zeros((0, 2))}, {"auroc": np.zeros(2)}, {"layer": 3}, {"layer": -1},
        {"layer": 0.5}, {"vectors": np.full((3, 2), np.inf)}, {"auroc": np.array([0.5, 1.5, 1])},
    ],
)  # fmt: skip
def test_what_is_no_direction(given):
    with pytest.raises(InputError):
        Direction(**{"vectors": VECTORS, "auroc": np.zeros(3), "layer": 1} | given)


def test_files_that_hold_no_direction(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(InputError, match="cannot be read as a direction"):
        Direction.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot be read as a direction"):
        Direction.load(path)
    save_file({"vectors": VECTORS}, path)
    with pytest.raises(InputError, match="holds no direction: expected a file of shipsfast direction"):
        Direction.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "9"}, {"layer": "one"}, {"position": ""}, {"identity": "[]"}, {"record": "{"}, {"record": "[" * 100_000},
        {"layer": None}, {"record": '{"model": "x"}'}, {"identity": '{"prompts_a": 5}'},
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, change):
    path = tmp_path / "d.safetensors"
    direction().save(path)
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() | change
    save_file(tensors, path, {name: value for name, value in about.items() if value is not None})
    with pytest.raises(InputError, match="d.safetensors is damaged"):
        Direction.load(path)


@pytest.mark.parametrize("left", [("vectors",), ("auroc",)])
def test_files_that_lack_a_tensor(tmp_path, left):
    path = tmp_path / "d.safetensors"
    direction().save(path)
    with safe_open(path, framework="numpy") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in left}
    save_file(tensors, path, about)
    with pytest.raises(InputError, match="d.safetensors is damaged"):
        Direction.load(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_a_dtype_that_numpy_does_not_have(tmp_path, dtype):
    path = tmp_path / "d.safetensors"
    direction().save(path)
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_torch({name: x.to(dtype) for name, x in tensors.items()}, path, about)
    with pytest.raises(InputError, match=r"d.safetensors cannot be read as a direction"):
        Direction.load(path)
