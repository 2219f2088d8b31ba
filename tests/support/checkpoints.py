"""Checkpoints of tiny models, and the ways of loading them that keep weights out of memory."""

from __future__ import annotations

import contextlib

import torch
from transformers import AutoModelForCausalLM

from shipsfast.models.streaming import CheckpointLayers, no_progress_bar


def save(model, folder, shard: str = "20KB"):
    """The model as a sharded checkpoint. Returns the folder."""
    with no_progress_bar():
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def device_map(model, layers: str) -> dict[str, str]:
    """What accelerate is told: members of ModuleLists go to `layers` ("cpu" or "disk"), the rest is in memory."""
    out: dict[str, str] = {}

    def walk(prefix: str, module: torch.nn.Module) -> None:
        if not any(isinstance(m, torch.nn.ModuleList) for m in module.modules()):
            out[prefix] = "cpu"
            return
        for name, child in module.named_children():
            here = f"{prefix}.{name}".lstrip(".")
            if isinstance(module, torch.nn.ModuleList):
                out[here] = layers
            else:
                walk(here, child)

    walk("", model)
    return out


def load_offloaded(folder, where: dict[str, str], **how):
    """Through accelerate, which reads from the checkpoint what is on "disk"."""
    with no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(folder, device_map=where, **how).eval()


@contextlib.contextmanager
def watched(monkeypatch):
    """What streamed models do with their layers: [("bring" | "drop", layer), ...] and the most that were held."""
    seen = {"events": [], "most": 0}
    bring, drop = CheckpointLayers._read_in, CheckpointLayers._take_out

    def held(layers) -> int:
        return sum(any(not getattr(m, k)[n].is_meta for m, k, n, _ in tensors) for tensors in layers._empty)

    def read_in(self, index):
        seen["events"].append(("bring", index))
        bring(self, index)
        seen["most"] = max(seen["most"], held(self))

    def take_out(self, index):
        seen["events"].append(("drop", index))
        drop(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointLayers, "_read_in", read_in)
        patch.setattr(CheckpointLayers, "_take_out", take_out)
        yield seen


def in_memory(model) -> list[str]:
    """Names of the streamed weights that are not dropped."""
    return [name for name, p in model.named_parameters() if ".layers." in name and not p.is_meta]
