"""Weights read straight from safetensors files: the same bytes, in memory used again only when nobody has it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shipsfast
from shipsfast.models.layer_bytes import Buffers, found_at, needed, places, read_alone
from shipsfast.models.loading import load_model
from tests.support.checkpoints import in_memory, save
from tests.support.models import LAYERS, build
from tests.support.streamed import built

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 10, 11]]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(7, 3),
        "b": torch.randn(5, dtype=torch.bfloat16),
        "c": torch.randn(600, 700),  # more than is compared at a time
        "d": torch.arange(3),
    }


@pytest.fixture
def file(tensors, tmp_path) -> str:
    save_file(tensors, tmp_path / "some.safetensors")
    return str(tmp_path / "some.safetensors")


@pytest.fixture
def folder(tmp_path) -> str:
    return str(save(build("llama-gqa", torch.float32), tmp_path / "model", "20KB"))


def stream(folder: str):
    """A streamed model whose layers have been read once."""
    model = load_model(folder, stream=True)
    first = shipsfast.scan(model, PROMPTS, progress=False)
    return model, model._shipsfast_stream, first


def test_places_are_the_tensors(file, tensors):
    where = places(file)
    assert set(where) == set(tensors)
    for name, tensor in tensors.items():
        assert found_at(tensor, where[name], []) == [where[name]]
        assert torch.equal(read_alone(where[name], tensor.dtype, tensor.shape), tensor)


def test_a_tensor_is_elsewhere(file, tensors):
    where, other = places(file), tensors["c"].clone()
    other[-1, -1] += 1  # in the last part that is compared
    assert not found_at(other, where["c"], [])
    assert not found_at(tensors["c"].t(), where["c"], [])
    assert not found_at(tensors["c"], where["a"], [where["b"]])


def test_a_tensor_put_together_is_found(file, tensors):
    where = places(file)
    together = torch.cat([tensors["a"].flatten(), tensors["c"].flatten(), tensors["a"].flatten()])
    pieces = found_at(together, None, list(where.values()))
    assert pieces == [where["a"], where["c"], where["a"]]
    buffers = Buffers(needed([together]), pinned=False)
    assert torch.equal(buffers.read(0, [(pieces, together)])[0], together)
    together[-1] += 1
    assert not found_at(together, None, list(where.values()))


def test_buffers_take_turns(file, tensors):
    where, buffers = places(file), Buffers(needed(tensors.values()), pinned=False)
    wanted = [([where[name]], tensor) for name, tensor in tensors.items()]
    addresses = []
    for turn in range(3):
        found = buffers.read(turn, wanted)
        assert all(torch.equal(x, tensor) for x, (_, tensor) in zip(found, wanted, strict=True))
        # As in a mapped file: products of small sizes round otherwise at other addresses.
        assert all(
            x.data_ptr() % 64 == place.start % 64 for x, ([place], _) in zip(found, wanted, strict=True)
        )
        addresses.append(found[0].data_ptr())
        del found
        buffers.give_back(turn)
        assert len(buffers._free) == 1
    assert len(set(addresses)) == 1


def test_memory_that_somebody_holds_is_not_overwritten(file, tensors):
    where, buffers = places(file), Buffers(needed(tensors.values()), pinned=False)
    wanted = [([where["a"]], tensors["a"])]
    held = buffers.read(0, wanted)[0][2:]
    buffers.give_back(0)
    assert not buffers._free
    buffers.read(1, [([where["c"]], tensors["c"])])
    assert torch.equal(held, tensors["a"][2:])


def test_a_file_that_changed_is_refused(file, tensors):
    where = places(file)
    save_file(tensors, file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(shipsfast.InputError, match="has changed since the model was loaded"):
        read_alone(where["a"], torch.float32, (7, 3))


def test_a_checkpoint_that_changes_between_two_scans_is_refused(folder):
    model, layers, _ = stream(folder)
    [place] = layers._places[1][0]
    tensor = build("llama-gqa", torch.float32).state_dict()
    save_file({k: v.clone() for k, v in tensor.items()}, place.file, metadata={"format": "pt"})
    with pytest.raises(shipsfast.InputError, match="has changed since the model was loaded"):
        shipsfast.scan(model, PROMPTS, progress=False)
    assert not in_memory(model)


def test_layers_come_straight_from_the_files_after_the_first_time(folder, monkeypatch):
    model, layers, first = stream(folder)
    assert all(len(places) == 9 for places in layers._places) and len(layers._places) == LAYERS
    monkeypatch.setattr(layers, "_load", None)  # the loader is not asked again
    again = shipsfast.scan(model, PROMPTS, progress=False)
    assert (again.kl == first.kl).all() and again.noise_floor == first.noise_floor
    assert layers._buffers is None and not in_memory(model)


def test_merged_experts_come_straight_from_the_files_too(tmp_path, monkeypatch):
    model, layers, first = stream(str(save(built("mixtral-merged-experts"), tmp_path)))
    assert {len(pieces) for places in layers._places for pieces in places} == {
        1,
        3,
        6,
    }  # 3 experts, gate and up
    monkeypatch.setattr(layers, "_load", None)
    assert (shipsfast.scan(model, PROMPTS, progress=False).kl == first.kl).all()


def test_layers_that_are_not_bytes_of_files_go_through_the_loader(folder):
    model = load_model(folder, stream=True, dtype="bfloat16")
    first = shipsfast.scan(model, PROMPTS, progress=False).kl
    assert model._shipsfast_stream._places == [[]] * LAYERS
    assert (shipsfast.scan(model, PROMPTS, progress=False).kl == first).all()


@pytest.mark.parametrize("spaces", [1, 4, 7])
def test_data_that_starts_anywhere(folder, spaces):
    """Python's writer puts them at a multiple of 8; another need not."""
    for file in Path(folder).glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].rstrip(b" ")
        header += b" " * ((spaces - len(header)) % 8)
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    model, _, first = stream(folder)
    expected = shipsfast.scan(build("llama-gqa", torch.float32), PROMPTS, progress=False).kl
    assert np.abs(first.kl - expected).max() < 1e-5
    assert (shipsfast.scan(model, PROMPTS, progress=False).kl == first.kl).all()
    mapped = shipsfast.scan(load_model(folder), PROMPTS, progress=False)
    assert np.abs(mapped.kl - expected).max() < 1e-5
    assert mapped.record["layers"] == ("fused" if spaces == 4 else "model")


def test_a_relative_folder_after_a_change_of_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(folder).parent)
    model, _, first = stream(f"./{Path(folder).name}")
    monkeypatch.chdir("/")
    assert (shipsfast.scan(model, PROMPTS, progress=False).kl == first.kl).all()


def test_files_that_are_gone(folder):
    model, *_ = stream(folder)
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        shipsfast.InputError, match="cannot be read any more .*a streamed model needs its files"
    ):
        shipsfast.scan(model, PROMPTS, progress=False)
    assert not in_memory(model)
