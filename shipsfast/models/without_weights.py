"""Models without weights, on the meta device: enough to see how they are built and what they would take."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import InputError, UnsupportedModelError


def hollow_model(name: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model that config.json describes, without weights. name: a folder or hub id;
    trust_remote_code: run Python code that comes with the model, with all rights of this process.

    Raises InputError for what has no config, UnsupportedModelError for quantised checkpoints.
    """
    from .loading import DTYPES, LOADING_ERRORS, check_folder, first_line

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_folder(name)
    try:
        # Not None, with which transformers asks on the terminal.
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                f"{name} is quantised, and what its weights take is known only once they are loaded: plan for the "
                "unquantised model, or run without --plan"
            )
        kind = _dtype(config, Path(name)) if dtype == "auto" else getattr(torch, dtype)
        return hollow(config, kind, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(f"cannot build a causal language model from {name}: {first_line(error)}") from error


def hollow(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of this config on the meta device, in evaluation mode.

    Mixtures of experts compute all at once, as which expert is asked would depend on values.
    """
    with torch.device("meta"), _quiet_config():
        return AutoModelForCausalLM.from_config(
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
