"""PEFT adapters that lie in a folder or repository: with the base model beside them, or named by them.

As transformers does, a base model that lies in the same folder is taken before one that the adapter names. The adapter is
computed with in the base model's dtype. Nothing is pickled, and no code of a base model that the adapter names is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from .checkpoint import ADAPTER, ORIGIN, Checkpoint, find
from .wrappers import base_model

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
NAME = "default"  # what PEFT calls the adapter in the model


def load_adapted(found: Checkpoint, load: Callable, trust_remote_code: bool) -> PreTrainedModel:
    """The base model with the adapter in its layers. load(checkpoint, trust_remote_code=...): a model without adapter.

    Raises InputError for an adapter that is not whole or does not fit, or without PEFT.
    """
    folder = _folder(found)
    if not (folder / WEIGHTS).is_file():
        there = (folder / PICKLED).is_file()
        raise InputError(
            f"{found.name} holds an adapter's weights as pickle only ({PICKLED}), which is not opened: convert it to "
            "safetensors (PeftModel.save_pretrained writes them)"
            if there
            else f"{found.name} has {ADAPTER}, and no {WEIGHTS}"
        )
    base = _without_adapter(found, load, trust_remote_code)
    name = base.config._name_or_path
    model = _wrapped(found, folder, base)
    result = model.load_adapter(str(folder), NAME, torch_device="cpu", autocast_adapter_dtype=False)
    for keys, problem in (
        (result.missing_keys, "lacks weights"),
        (result.unexpected_keys, "has weights without a place"),
    ):
        if keys:
            raise InputError(f"the adapter in {found.name} {problem} in {name}, such as {min(keys)}")
    model = base_model(model)
    model.__dict__[ORIGIN] = base.__dict__.get(ORIGIN, {}) | {"adapter": _describe(found, folder, name)}
    return model


def hollow_adapted(found: Checkpoint, hollow: Callable, trust_remote_code: bool) -> PreTrainedModel:
    """The same without weights. hollow(checkpoint, trust_remote_code=...): a model without adapter."""
    folder = _folder(found)
    return base_model(_wrapped(found, folder, _without_adapter(found, hollow, trust_remote_code)).eval())


def base_of(found: Checkpoint) -> Checkpoint:
    """The base model that an adapter names. Raises InputError if that is none."""
    name = _read(found).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{found.adapter} names no base model: set base_model_name_or_path to its folder or hub id"
        )
    try:
        base = find(name)
    except InputError as error:
        raise InputError(
            f"the adapter in {found.name} is for the base model {name}, which is not here ({error}): set "
            f"base_model_name_or_path in {ADAPTER} to where it is"
        ) from error
    revision = _read(found).get("revision")
    if base.folder is None and revision not in (None, "", "main"):
        raise InputError(
            f"the adapter in {found.name} is for revision {revision} of {name}, and the hub's newest would be taken: download "
            f"that revision, and set base_model_name_or_path in {ADAPTER} to its folder"
        )
    if base.adapter:
        raise InputError(
            f"the adapter in {found.name} is for {name}, which holds an adapter itself: merge that one first"
        )
    return base


def _without_adapter(found: Checkpoint, load: Callable, trust_remote_code: bool) -> PreTrainedModel:
    with _base(found, trust_remote_code) as (where, code):
        base = load(where, trust_remote_code=code)
    if not where.gguf:
        base.config._name_or_path = where.name
    return base


@contextlib.contextmanager
def _base(found: Checkpoint, trust_remote_code: bool) -> Iterator[tuple[Checkpoint, bool]]:
    """The base model's checkpoint, and whether its code may run.

    transformers would load an adapter that lies in the same folder too, and then not say whether the base model was whole:
    such a folder is shown to it without the adapter.
    """
    if not found.whole:
        yield base_of(found), False
        return
    if found.folder is None:
        raise InputError(
            f"{found} holds a model and an adapter in one repository: download it, and scan the folder"
        )
    with tempfile.TemporaryDirectory(prefix="shipsfast-") as place:
        for file in found.folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(place) / file.name).symlink_to(file.resolve())
        yield replace(found, place=place, adapter=None), trust_remote_code


def _wrapped(found: Checkpoint, folder: Path, base: PreTrainedModel):
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT warns if it is written otherwise than the model's
    if getattr(config, "megatron_config", None) is not None:  # PEFT imports whatever module it names
        raise UnsupportedModelError(f"the adapter in {found.name} is for Megatron, which is not loaded")
    model = peft.get_peft_model(base, config, adapter_name=NAME, autocast_adapter_dtype=False)
    base_model(model)  # raises for an adapter that acts outside the layers
    return model


def _folder(found: Checkpoint) -> Path:
    """Where its files are, downloaded if they are on the hub."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{found.name} holds an adapter ({ADAPTER}), and loading it needs peft: pip install peft"
        )
    if found.folder is None:
        found.file(WEIGHTS)
    return found.adapter.parent


def _read(found: Checkpoint) -> dict:
    try:
        config = json.loads(found.adapter.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{found.adapter} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{found.adapter} is no adapter's config: it holds no object")
    return config


def _describe(found: Checkpoint, folder: Path, base: str) -> dict:
    """For run.json."""
    files = {"config_sha256": found.adapter, "weights_sha256": folder / WEIGHTS}
    return {
        "name": found.name,
        "type": str(_read(found).get("peft_type")),
        "base": base,
        **{key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()},
    }
