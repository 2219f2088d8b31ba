"""Models without weights, on the meta device: enough to see how they are built and what they would take."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..errors import InputError, UnsupportedModelError
from .checkpoint import Checkpoint, find


def hollow_model(
    name: str, dtype: str = "auto", *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedModel:
    """The causal language model that config.json or a GGUF file's header describes, without weights.

    name: a folder, a GGUF file or a hub id; trust_remote_code: run Python code that comes with the model, with all rights of
    this process; gguf_file: the GGUF file in the folder or repository.
    Raises InputError for what has no config, UnsupportedModelError for quantised checkpoints.
    """
    from .loading import LOADING_ERRORS, check_dtype, first_line

    check_dtype(dtype)
    found = find(name, gguf_file)
    try:
        if found.adapter:
            from .adapters import hollow_adapted

            return hollow_adapted(found, partial(_hollow, dtype=dtype), trust_remote_code)
        return _hollow(found, dtype, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"cannot build a causal language model from {name}: {first_line(error)}") from error


def _hollow(found: Checkpoint, dtype: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    if found.gguf:
        from . import gguf_file

        file = gguf_file.read(found)
        return hollow(gguf_file.config_of(found, file), file.dtype(dtype))
    # Not None, with which transformers asks on the terminal.
    config = AutoConfig.from_pretrained(found.place, trust_remote_code=trust_remote_code, **found.how)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{found.name} is quantised, and what its weights take is known only once they are loaded: plan for the "
            "unquantised model, or run without --plan"
        )
    kind = _dtype(config, Path(found.place)) if dtype == "auto" else getattr(torch, dtype)
    return hollow(config, kind, trust_remote_code=trust_remote_code)


def loader_of(config: PreTrainedConfig) -> type:
    """The class of transformers that loads the config's language model: that for text, or that for text and images."""
    own = getattr(config, "auto_map", None) or {}  # of a checkpoint that brings its own code
    text_alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own
    return AutoModelForImageTextToText if with_images and not text_alone else AutoModelForCausalLM


def hollow(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of this config on the meta device, in evaluation mode.

    Mixtures of experts compute all at once, as which expert is asked would depend on values.
    """
    with torch.device("meta"), _quiet_config():
        return loader_of(config).from_config(
            copy.deepcopy(config), dtype=dtype, experts_implementation="batched_mm",
            trust_remote_code=trust_remote_code,
        ).eval()  # fmt: skip


@contextlib.contextmanager
def _quiet_config() -> Iterator[None]:
    """transformers tells of generation configs that it makes up."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype:
    """What `auto` means: the config's, else that of the first floating-point weight there is."""
    found = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if found is not None:
        return getattr(torch, found) if isinstance(found, str) else found
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                kind = tensors.get_tensor(key).dtype
                if kind.is_floating_point:
                    return kind
    return torch.float32
