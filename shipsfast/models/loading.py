"""Models for the command line: from a folder or a hub id, safetensors only, and no code of theirs unless asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import InputError
from ..memory import is_out_of_memory

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, MemoryError, RuntimeError, SafetensorError)
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    stream: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    name: a folder with config.json and safetensors, or a hub id; dtype: "auto" is the checkpoint's;
    device: default "cuda" where there is one, else "cpu"; stream: read decoder layers from the checkpoint when they
    run, at most two at a time, for models larger than the memory (streaming.py); trust_remote_code: run Python code that
    comes with the model, with all rights of this process.
    Raises InputError, in one line, for anything that cannot be loaded.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_folder(name)
    _check_weights(name)
    where = as_device(device)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {where} was asked for, and torch sees {torch.cuda.device_count()} CUDA GPUs"
        )
    how = dict(
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    try:
        if stream:
            from .streaming import load_streamed

            model, loading = load_streamed(name, where, **how)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(name, **how)
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(
                f"{name} lacks weights of a causal language model, such as {missing[0]}: they would be random"
            )
        return (model if stream else model.to(where)).eval()
    except InputError:
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            use = "another device or --dtype bfloat16"
            raise InputError(
                f"{name} does not fit on {where}: use {use if stream else '--stream, ' + use}"
            ) from error
        raise InputError(
            f"cannot load a causal language model from {_place(name)}: {first_line(error)}"
        ) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub id. Raises InputError if there is none."""
    check_folder(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exceptions for malformed files
        raise InputError(f"cannot load a tokenizer from {_place(name)}: {first_line(error)}") from error


def as_device(name: str | torch.device | None) -> torch.device:
    """A CPU or CUDA device, which need not be here; default "cuda" where there is one. Raises InputError for others."""
    try:
        where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(name)!r}: expected cpu, cuda or cuda:N")
    return where


def check_folder(name: str) -> None:
    """A path that is no model folder would otherwise be looked up on the hub."""
    path = Path(name)
    looks_like_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()
    if looks_like_path and not path.is_dir():
        raise InputError(f"no model folder at {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} is not a model folder: it has no config.json")


def _place(name: str) -> str:
    return name if Path(name).is_dir() else f"the hub's {name} (there is no folder of that name)"


def _check_weights(name: str) -> None:
    """Pickled weights can run code when they are opened: they are not, and the remedy is named."""
    path = Path(name)
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind))
    if pickled:
        raise InputError(
            f"{name} holds its weights as pickle only ({pickled[0]}), which is not opened: convert it to safetensors, "
            f"e.g. AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(another folder), or take a "
            "revision that has them"
        )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
