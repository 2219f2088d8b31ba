"""Attention over a prefix tree with a mask vector per row and head, by the backend that was chosen."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import InputError
from . import reference
from .end_attention import Paths, plan_ends
from .end_attention_cpp import plan_end_blocks
from .extension import extension_status
from .masks import LayerMask
from .prefix_tree import PackedPrompts
from .tree_attention_cpp import Blocks, cpp_attention, plan_blocks
from .tree_attention_torch import plan_segments, segment_attention

BACKENDS = ("auto", "triton", "cpp", "torch", "reference")


def resolve_backend(
    requested: str, device: torch.device, dtype: torch.dtype, *, one_head_size: bool = True
) -> str:
    """The attention backend that will run: "triton", "cpp", "torch" or "reference".

    one_head_size: values are as wide as queries and keys, which they are not in multi-head latent attention.

    Raises InputError if the one asked for cannot run here, with the reason and the remedy.
    """
    if requested not in BACKENDS:
        raise InputError(f"unknown backend {requested!r}: expected one of {', '.join(BACKENDS)}")
    problems = {"triton": _no_triton(device, dtype, one_head_size), "cpp": _no_cpp(device, dtype)}
    if requested == "auto":
        return next((name for name, problem in problems.items() if problem is None), "torch")
    if problems.get(requested):
        raise InputError(
            f"backend {requested!r} cannot run: {problems[requested]}; use backend='torch' or 'auto'"
        )
    return requested


def _no_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the model is on {device.type}, the C++ attention runs on a CPU"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        return f"it takes half precision, float32 and float64, the model is in {str(dtype).removeprefix('torch.')}"
    built, reason = extension_status()
    if built and not hasattr(torch.ops.shipsfast, "add_"):
        return "the extension is of an older version: build it again"
    return None if built else reason


def _no_triton(device: torch.device, dtype: torch.dtype, one_head_size: bool) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device.type}, Triton kernels need a CUDA device"
    if dtype == torch.float64:
        return "the Triton kernels compute in at most float32, the model is in float64"
    if not one_head_size:
        return "the Triton kernels want values as wide as queries and keys, which this model's are not"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


@dataclass
class TreeContext:
    """What every attention call of one packed set of prompts shares."""

    packed: PackedPrompts
    backend: str
    device: torch.device
    trimmed: np.ndarray | None = None  # sorted packed indices of the last layer's queries
    _plans: dict = field(default_factory=dict)
    _kinds: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = torch.as_tensor(self.packed.position, device=self.device)
        self.subtree_end = torch.as_tensor(self.packed.subtree_end, device=self.device)

    def plan(self, window: int | None, trimmed: bool, query: torch.Tensor):
        """The backend's own form of the tree, made once per window and kind of query.

        cpp: Blocks; torch: a list of BlockStack; triton and reference: keyword arguments of the kernel.
        """
        key = (window, trimmed, query.dtype, query.shape[-1])
        if key not in self._plans:
            query_index = self.trimmed if trimmed else None
            if self.backend == "cpp":
                plan = plan_blocks(self.packed, window=window, query_index=query_index)
            elif self.backend == "torch":
                plan = plan_segments(self.packed, window=window, query_index=query_index, device=self.device)
            else:
                index = query_index
                if index is not None:
                    index = torch.as_tensor(index.astype(np.int32), device=self.device)
                plan = {"query_index": index}
            if self.backend == "triton":
                plan |= self._triton_plan(window, query_index, query)
            self._plans[key] = plan
        return self._plans[key]

    def end_plan(self, window: int | None) -> Blocks | list[Paths]:
        """The nodes of `trimmed` by the paths they are on, for end_attention.py: Blocks for cpp."""
        if ("ends", window) not in self._plans:
            if self.backend == "cpp":
                plan = plan_end_blocks(self.packed, self.trimmed, window)
            else:
                plan = plan_ends(self.packed, self.trimmed, window, self.device)
            self._plans["ends", window] = plan
        return self._plans["ends", window]

    def kind(self, window: int | None) -> str:
        """The kind of tree that chooses the Triton kernel's launch parameters (kernels/tree_kind.py)."""
        from ..kernels.tree_kind import kind_of_tree

        if window not in self._kinds:
            self._kinds[window] = kind_of_tree(self.packed.position, self.packed.subtree_end, window)
        return self._kinds[window]

    def _triton_plan(self, window: int | None, query_index, query: torch.Tensor) -> dict:
        """Launch parameters, and the key blocks that each block of queries sees."""
        from ..kernels.block_table import block_table
        from ..kernels.launch_config import launch_config

        config = launch_config(
            "tree_attention", query.dtype, query.shape[-1], query.device, self.kind(window)
        )
        table = block_table(
            self.packed.position, self.packed.subtree_end, block_m=config.block_m, block_n=config.block_n,
            query_index=query_index, window=window, device=query.device,
        )  # fmt: skip
        return {"config": config, "block_table": table}


def tree_attention(
    tree: TreeContext,
    query,
    key,
    value,
    mask: LayerMask,
    plan,
    *,
    scaling,
    softcap=None,
    window=None,
    sink=None,
) -> torch.Tensor:
    """`reference.tree_attention` by the backend that was chosen. `plan` is what `tree.plan` gave."""
    vectors = (mask.logit_scale, mask.output_scale)
    alt = mask.replacements(query, key)
    if tree.backend in ("cpp", "torch"):
        function = cpp_attention if tree.backend == "cpp" else segment_attention
        return mask.finish(
            function(query, key, value, *vectors, plan, scaling=scaling, softcap=softcap, sink=sink, **alt)
        )
    if tree.backend == "reference":
        function = reference.tree_attention
    else:
        from ..kernels.tree_attention import tree_attention as function  # needs triton

        sink = None if sink is None else sink.float().contiguous()
    out = function(
        query, key, value, *vectors, tree.position, tree.subtree_end,
        scaling=scaling, softcap=softcap, window=window, sink=sink, **alt, **plan,
    )  # fmt: skip
    return mask.finish(out)
