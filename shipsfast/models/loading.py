"""Models for the command line: from a folder, a GGUF file or a hub id, no pickle, and no code of theirs unless asked for."""

from __future__ import annotations

import json
from functools import partial

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..errors import InputError
from ..memory import is_out_of_memory
from .checkpoint import ORIGIN, Checkpoint, check_streamable, find
from .without_weights import loader_of

PROCESSOR_TEMPLATE = "chat_template.json"
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, MemoryError, RuntimeError, SafetensorError)
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    stream: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    name: a folder with config.json and safetensors, a folder with a PEFT adapter, a GGUF file, or a hub id; dtype: "auto"
    is the checkpoint's, float32 for a quantised GGUF file, whose weights are dequantised; device: default "cuda" where
    there is one, else "cpu"; stream: read decoder layers from the checkpoint when they
    run, at most two at a time, for models larger than the memory (streaming.py); trust_remote_code: run Python code that
    comes with the model, with all rights of this process; gguf_file: the GGUF file in the folder or repository.
    Raises InputError, in one line, for anything that cannot be loaded.
    """
    check_dtype(dtype)
    found = find(name, gguf_file)
    if stream:
        check_streamable(found)
    where = as_device(device)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {where} was asked for, and torch sees {torch.cuda.device_count()} CUDA GPUs"
        )
    try:
        if found.adapter:
            from .adapters import load_adapted

            model = load_adapted(found, partial(_load, dtype=dtype), trust_remote_code)
        else:
            model = _load(
                found, dtype, stream_to=where if stream else None, trust_remote_code=trust_remote_code
            )
        return (model if stream else model.to(where)).eval()
    except InputError:
        raise
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            use = "another device or --dtype bfloat16"
            raise InputError(
                f"{name} does not fit on {where}: use {use if stream or found.gguf else '--stream, ' + use}"
            ) from error
        raise InputError(f"cannot load a causal language model from {found}: {first_line(error)}") from error


def _load(
    found: Checkpoint, dtype: str, *, stream_to: torch.device | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model without its adapter, on the CPU unless it is streamed to a device."""
    if found.gguf:
        from . import gguf_file

        file = gguf_file.read(found)
        model, loading = gguf_file.load(found, file, file.dtype(dtype))
        model.__dict__[ORIGIN] = {"gguf": file.describe(model.dtype)}
    else:
        _check_weights(found)
        how = dict(
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **found.how,
        )
        config = AutoConfig.from_pretrained(found.place, trust_remote_code=trust_remote_code, **found.how)
        loader = loader_of(config)
        if stream_to is not None:
            from .streaming import load_streamed

            model, loading = load_streamed(found.place, stream_to, loader, **how)
        else:
            model, loading = loader.from_pretrained(found.place, **how)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{found.name} lacks weights of a causal language model, such as {missing[0]}: they would be random"
        )
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False, gguf_file: str | None = None):
    """The tokenizer of a folder, GGUF file or hub id, of an adapter's base model where the adapter has none; with the chat
    template of the processor if it has none itself. Raises InputError if there is none."""
    found = find(name, gguf_file)
    try:
        if found.gguf:
            from .gguf_tokenizer import load_gguf_tokenizer

            return load_gguf_tokenizer(found)
        if found.adapter and not found.whole and not found.file("tokenizer_config.json"):
            from .adapters import base_of

            found, trust_remote_code = base_of(found), False
        tokenizer = AutoTokenizer.from_pretrained(
            found.place, trust_remote_code=trust_remote_code, **found.how
        )
        _take_processors_template(tokenizer, found)
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions for malformed files
        raise InputError(f"cannot load a tokenizer from {found}: {first_line(error)}") from error


def _take_processors_template(tokenizer, found: Checkpoint) -> None:
    """Checkpoints that also take images may keep the chat template in a file that only their processor reads."""
    if getattr(tokenizer, "chat_template", None):
        return
    path = found.file(PROCESSOR_TEMPLATE)
    if path is None:
        return
    try:
        template = json.loads(path.read_text("utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a chat template: {first_line(error)}") from error
    if not isinstance(template, str):
        raise InputError(f"{path} is not a chat template: expected a text")
    tokenizer.chat_template = template


def as_device(name: str | torch.device | None) -> torch.device:
    """A CPU or CUDA device, which need not be here; default "cuda" where there is one. Raises InputError for others."""
    try:
        where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(name)!r}: expected cpu, cuda or cuda:N")
    return where


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")


def _check_weights(found: Checkpoint) -> None:
    """Pickled weights can run code when they are opened: they are not, and the remedy is named."""
    path = found.folder
    if path is None or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind))
    if pickled:
        raise InputError(
            f"{found.name} holds its weights as pickle only ({pickled[0]}), which is not opened: convert it to "
            f"safetensors, e.g. AutoModelForCausalLM.from_pretrained({found.name!r}).save_pretrained(another folder), or "
            "take a revision that has them"
        )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
