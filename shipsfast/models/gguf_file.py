"""GGUF files, through transformers' own loader: their weights are dequantised, and computed with in one dtype.

That loader passes over what it does not know: tensors without a place in the model, entries of the header about rotary
embeddings, windows or head sizes. So everything in a file is accounted for here, and what would be lost is refused.
A file is data from anywhere: its header is read within its bounds, and nothing in it runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..errors import InputError, UnsupportedModelError
from .checkpoint import Checkpoint

NEEDS = ("gguf", "accelerate")
# Architectures whose every weight is known to arrive (tests/models/test_gguf.py), and entries of their headers that
# transformers leaves out, with the attribute of the config that they are.
FAMILIES: dict[str, dict[str, str]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"attention.key_length": "head_dim"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {},
}  # fmt: skip
# Entries that say again what the config says already.
_ALREADY = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Gemma's queries are scaled by a number that no GGUF holds; with heads of this size it is transformers' default.
_GEMMA_HEAD = 256
_one_at_a_time = threading.Lock()  # transformers' loader is changed while a model is loaded


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header. tensors: (name, shape, type) of each."""

    path: Path
    architecture: str
    entries: dict
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    float_dtype: torch.dtype | None  # of a file without quantised tensors

    def dtype(self, asked: str) -> torch.dtype:
        """What a model of it is computed in. "auto" is float32 for a quantised file, as blocks have no dtype."""
        return (self.float_dtype or torch.float32) if asked == "auto" else getattr(torch, asked)

    def describe(self, dtype: torch.dtype) -> dict:
        """For run.json."""
        import gguf

        kind = self.entries.get("general.file_type")
        known = isinstance(kind, int) and kind in set(gguf.LlamaFileType)
        return {
            "file": self.path.name,
            "architecture": self.architecture,
            "quantisation": gguf.LlamaFileType(kind).name.removeprefix("MOSTLY_") if known else None,
            "tensors": dict(sorted(Counter(kind for *_, kind in self.tensors).items())),
            "loaded_as": str(dtype).removeprefix("torch."),
        }


def _path_of(where: Checkpoint) -> Path:
    """The file, downloaded if it is on the hub. Raises InputError if there is none, and for what cannot be loaded here."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"loading GGUF files needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if importlib.util.find_spec("transformers.integrations.gguf") is None:
        import transformers

        raise InputError(
            f"transformers {transformers.__version__} takes the tokens of many GGUF files apart in another way than "
            "their models were trained with: pip install 'transformers>=5.18'"
        )
    path = where.file(where.gguf)
    if path is None:
        raise InputError(f"{where} has no file {where.gguf}, or gives no access to it")
    return path


def read(where: Checkpoint) -> GgufFile:
    """The header of a file whose tensors are all there. Raises InputError for a damaged or truncated one, and for one of
    several parts; UnsupportedModelError for an architecture that is not loaded."""
    path = _path_of(where)
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        size = path.stat().st_size
        entries, _ = read_gguf_metadata(str(path))
        architecture = entries["general.architecture"]
        if entries.get("split.count", 0) not in (0, 1):
            raise UnsupportedModelError(
                f"{path.name} is one of {entries['split.count']} parts: make one file of them with llama-gguf-split --merge"
            )
        if not isinstance(architecture, str) or architecture not in FAMILIES:
            raise UnsupportedModelError(
                f"{where.name} is a GGUF file of architecture {architecture}, which is not loaded from GGUF: expected one "
                f"of {', '.join(FAMILIES)}; take the model's safetensors"
            )
        header = GgufHeader.from_file(str(path))
    except InputError:
        raise
    except Exception as error:  # of struct, numpy or the reader: the bytes may be anything
        raise InputError(
            f"{where.name} cannot be read as a GGUF file, it is damaged or cut off: {error}"
        ) from error
    end = max((header.data_start + t.offset + t.nbytes for t in header.tensors), default=0)
    if end > size:
        raise InputError(
            f"{where.name} is cut off: its tensors end at byte {end:,}, and it has {size:,}; fetch it again"
        )
    tensors = tuple((t.name, t.shape, _type_name(t.ggml_type)) for t in header.tensors)
    return GgufFile(path, architecture, entries, tensors, header.dtype)


def config_of(where: Checkpoint, file: GgufFile) -> PreTrainedConfig:
    """The config that the header describes, with what transformers leaves out of it.

    Raises UnsupportedModelError for entries and tensors that would be lost.
    """
    config = AutoConfig.from_pretrained(
        where.place, gguf_file=where.gguf, trust_remote_code=False, **where.how
    )
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if config.model_type not in (file.architecture, f"{file.architecture}_text"):
        # A file of llama that is named mistral is taken for one, with a window that it does not have.
        raise _lost(where, f"transformers takes it for a model of {config.model_type}, by its general.name")
    of = FAMILIES[file.architecture]
    for key, name in of.items():
        value = file.entries.get(f"{file.architecture}.{key}")
        if value:
            setattr(config, name, value)
    _check_entries(where, file, config)
    if any(name == _ROPE_FACTORS for name, *_ in file.tensors):
        _take_rope_factors(where, file, config)
    _check_tensors(where, file, config)
    config._name_or_path = _name(where)
    return config


def _name(where: Checkpoint) -> str:
    """What the model is called in plans and records: transformers would name the folder alone."""
    return str(Path(where.name) if where.name.endswith(where.gguf) else f"{where.name}/{where.gguf}")


def load(where: Checkpoint, file: GgufFile, dtype: torch.dtype):
    """The model, dequantised, and what transformers says of its loading."""
    from transformers import AutoModelForCausalLM, GgufConfig

    config = config_of(where, file)
    with _quiet_and_quick():
        model, info = AutoModelForCausalLM.from_pretrained(
            where.place,
            gguf_file=where.gguf,
            config=config,
            dtype=dtype,
            # Else blocks could stay packed, and be computed with by kernels fetched from the hub.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            trust_remote_code=False,
            **where.how,
        )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # it is no quantised model any more
    model.config._name_or_path = _name(where)
    return model, info


def _check_entries(where: Checkpoint, file: GgufFile, config: PreTrainedConfig) -> None:
    """Every entry about the architecture is in the config."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    prefix, known = file.architecture + ".", GGUF_CONFIG_MAPPING[file.architecture]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    holds = {
        "rope.dimension_count": int(head_dim * partial),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
    }
    holds |= {
        key: head_dim if name == "head_dim" else getattr(config, name, None) for key, name in _ALREADY.items()
    }
    for full, value in file.entries.items():
        key = full.removeprefix(prefix)
        if key == full:
            continue
        if key in holds:
            if value != holds[key]:
                raise _lost(
                    where, f"{full} is {value}, and the model that transformers makes of it has {holds[key]}"
                )
        elif key not in known and key not in FAMILIES[file.architecture]:
            raise _lost(where, f"transformers does not read {full} ({str(value)[:40]})")
    if file.architecture.startswith("gemma") and head_dim != _GEMMA_HEAD:
        raise _lost(
            where,
            f"Gemma with heads of size {head_dim} scales its queries by a number that is not in the file",
        )


def _take_rope_factors(where: Checkpoint, file: GgufFile, config: PreTrainedConfig) -> None:
    """Llama 3's rotary scaling lies in a GGUF as one divisor per frequency, which transformers drops: here the parameters
    that give the same divisors go into the config."""
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(str(file.path)).tensors}
    given = torch.from_numpy(tensors[_ROPE_FACTORS].data.copy()).double().flatten()
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    wave = 2 * math.pi * theta ** (torch.arange(given.numel(), dtype=torch.float64) / given.numel())
    factor, original, low, high = float(given.max()), 8192, 1.0, 4.0
    smooth = (original / wave - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(wave < original / high, 1.0, torch.where(wave > original / low, factor, middle))
    if not torch.allclose(given, expected, rtol=1e-4, atol=0):
        raise _lost(where, f"{_ROPE_FACTORS} holds a rotary scaling that is not Llama 3's")
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _check_tensors(where: Checkpoint, file: GgufFile, config: PreTrainedConfig) -> None:
    """Every tensor has a place of its shape in the model: the loader skips others without a word."""
    import gguf

    from .without_weights import hollow

    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    shapes = {}
    for weight, tensor in hollow(config, torch.float32).state_dict().items():
        module, _, kind = weight.rpartition(".")
        shapes[f"{names.get_name(module)}.{kind}"] = tuple(tensor.shape)
    for name, shape, _ in file.tensors:
        if name not in shapes and name != _ROPE_FACTORS:
            raise _lost(where, f"transformers has no place for {name}")
        if shapes.get(name, shape) != shape:
            raise _lost(
                where, f"{name} is {shape}, and the model that transformers makes of it has {shapes[name]}"
            )


@contextlib.contextmanager
def _quiet_and_quick() -> Iterator[None]:
    """transformers' loader shows a bar whatever it is told, and builds one map of names anew for every module."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    with _one_at_a_time:
        before = gguf.get_tensor_name_map, loader.tqdm
        gguf.get_tensor_name_map, loader.tqdm = functools.cache(before[0]), logging.tqdm
        try:
            yield
        finally:
            gguf.get_tensor_name_map, loader.tqdm = before


def _lost(where: Checkpoint, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where.name} would not be loaded as it is: {what}; take the model's safetensors"
    )


def _type_name(number: int) -> str:
    import gguf

    return gguf.GGMLQuantizationType(number).name
