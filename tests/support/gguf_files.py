"""GGUF files as llama.cpp's converter writes them (convert_hf_to_gguf.py), of tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch

from shipsfast.demo.run import MODEL

ARCHITECTURES = {"gemma3_text": "gemma3"}  # of a model_type, where it has another name


def write_gguf(
    model, path: Path, *, kind: str = "F32", entries: dict | None = None, extra: dict | None = None
) -> Path:
    """The model with the embedded model's tokenizer and chat template.

    kind: type of the matrices, of gguf.GGMLQuantizationType; entries: of the header, changed (None: left out); extra: more
    tensors by name. Returns the path.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    header = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float((config.rope_parameters or {}).get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if arch in ("llama", "phi3"):
        header["rope.dimension_count"] = head_dim
    if arch in ("qwen3", "gemma2", "gemma3"):
        header |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("phi3", "gemma2", "gemma3") and config.sliding_window:
        header["attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        header["attn_logit_softcapping"] = config.attn_logit_softcapping
        header["final_logit_softcapping"] = config.final_logit_softcapping
    if arch == "gemma3":
        # one base for layers of a window, another for the rest: the file holds the second
        header["rope.freq_base"] = float(config.rope_parameters["full_attention"]["rope_theta"])
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_file_type(gguf.LlamaFileType[f"{'MOSTLY' if kind != 'F32' else 'ALL'}_{kind}"])
    own = {f"{arch}.{k}": v for k, v in header.items()} | _tokenizer_entries() | (entries or {})
    for key, value in own.items():
        _add(writer, key, value)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        module, _, end = name.rpartition(".")
        data = _as_llama_cpp_has_it(arch, name, tensor.float(), config)
        _tensor(writer, f"{names.get_name(module)}.{end}", data, kind if data.ndim > 1 else "F32")
    for name, data in (extra or {}).items():
        _tensor(writer, name, np.asarray(data, dtype=np.float32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp_has_it(arch: str, name: str, tensor: torch.Tensor, config) -> np.ndarray:
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        # ggml rotates neighbours together, transformers the halves of a head.
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        size = tensor.shape[0] // heads
        to = torch.arange(size).view(2, -1).T.flatten()  # 0, size / 2, 1, size / 2 + 1, ...
        tensor = tensor.view(heads, size, -1)[:, to].reshape(tensor.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.numpy()


def _tensor(writer, name: str, data: np.ndarray, kind: str) -> None:
    kind = gguf.GGMLQuantizationType[kind]
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(data))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)


def _tokenizer_entries() -> dict:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    special = {t["content"] for t in tokenizer["added_tokens"]}
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocab],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": vocab.index("<|end|>"),
        "tokenizer.ggml.padding_token_id": vocab.index("<|pad|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (MODEL / "chat_template.jinja").read_text(),
    }


def _add(writer, key: str, value) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
