"""The small operations of a decoder layer alone, at the scan's shapes and chunk: ours against the modules of transformers,
those compiled, and Liger-Kernel's. Bytes are every input read once and every output written once.

Each path is held against float64: at most twice the error of the module in the same dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from shipsfast.ops.layer_ops import SmallOps, small_ops

from .ceilings import bandwidth_figures
from .clock import timed
from .kernel_attention import compiled
from .rows import held
from .session import OURS, NotMeasured, Session
from .shapes import GEMMA2_9B, LLAMA2_7B, LLAMA31_8B, Shape

FACTOR = 2.0
CHECKED_TOKENS = 64
EPS = 1e-6
FORKS = 8  # rows of a chunk that fork
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One operation on chunks of a model's shape.

    inputs(shape, tokens, device, dtype): what every path takes; ours(ops, shape, ...) and module(shape, ...) give the
    result, the first perhaps in the place of an input; liger(shape) gives a function of the inputs. peer: what `module` is called.
    """

    shape: Shape
    numbers: Callable[[Shape], int]  # read and written for a token
    inputs: Callable[..., Tensors]
    ours: Callable[..., torch.Tensor]
    module: Callable[..., torch.Tensor]
    liger: Callable[[Shape], Callable]
    peer: str = "transformers"


def _normal(device, dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _norm_module(kind: type, weight: torch.Tensor) -> torch.nn.Module:
    norm = kind(len(weight), eps=EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def _liger(module: str, name: str):
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotMeasured("the package liger_kernel is not installed")
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


def _norm_inputs(shape: Shape, tokens: int, device, dtype) -> Tensors:
    return _normal(device, dtype, tokens, shape.hidden), 1 + 0.1 * _normal(device, dtype, shape.hidden)


def _added_inputs(shape: Shape, tokens: int, device, dtype) -> Tensors:
    return _normal(device, dtype, tokens, shape.hidden), *_norm_inputs(shape, tokens, device, dtype)


def _ours_added(ops: SmallOps, shape: Shape, x, y, weight) -> torch.Tensor:
    ops.add_rms_norm_(x, y, _norm_module(Gemma2RMSNorm, weight))
    return x


def _rope_inputs(shape: Shape, tokens: int, device, dtype) -> Tensors:
    """The product of q, k and v of one row, and tables of its tokens' positions."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    angle = 9 * torch.rand(tokens, shape.head_dim // 2, device=device).repeat(1, 2)
    return _normal(device, dtype, 1, tokens, width), angle.cos().to(dtype), angle.sin().to(dtype)


def _heads(shape: Shape, qkv: torch.Tensor) -> Tensors:
    """Queries and keys, [B, T, heads, D] each, where they lie."""
    heads = qkv.unflatten(2, (-1, shape.head_dim))
    return heads[:, :, : shape.heads], heads[:, :, shape.heads : shape.heads + shape.kv_heads]


def _ours_rope(ops: SmallOps, shape: Shape, qkv, cos, sin) -> torch.Tensor:
    q, k = (ops.rope(x, cos, sin, None) for x in _heads(shape, qkv))
    return q, k


def _module_rope(shape: Shape, qkv, cos, sin) -> Tensors:
    q, k = (x.transpose(1, 2) for x in _heads(shape, qkv))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger_rope(shape: Shape) -> Callable:
    turn = _liger("transformers.rope", "liger_rotary_pos_emb")

    def run(qkv, cos, sin):
        q, k = turn(*(x.transpose(1, 2) for x in _heads(shape, qkv)), cos[None], sin[None])
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _liger_norm(shape: Shape) -> Callable:
    module = _liger("transformers.rms_norm", "LigerRMSNorm")(shape.hidden, eps=EPS)

    def run(x, weight):
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module(x)

    return run


def _liger_added(shape: Shape) -> Callable:
    module = _liger("transformers.rms_norm", "LigerRMSNorm")(
        shape.hidden, eps=EPS, offset=1.0, casting_mode="gemma"
    )

    def run(x, y, weight):
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return x + module(y)

    return run


def _gated_inputs(shape: Shape, tokens: int, device, dtype) -> Tensors:
    return (_normal(device, dtype, tokens, 2 * shape.intermediate),)


def _liger_gated(shape: Shape) -> Callable:
    function = _liger("ops.swiglu", "LigerSiLUMulFunction")
    return lambda gate_up: function.apply(*(x.contiguous() for x in gate_up.chunk(2, 1)))


def _module_gated(shape: Shape, gate_up) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def _forked_inputs(shape: Shape, tokens: int, device, dtype) -> Tensors:
    """Changes of one head's output in FORKS rows, and what engine/forked_rows.py makes of their layer."""
    wide, each = 2 * shape.intermediate, tokens // FORKS
    products = _normal(device, dtype, FORKS, shape.head_dim, wide) * shape.head_dim**-0.5
    change = _normal(device, dtype, FORKS, each, shape.head_dim)
    scale = 1 + 0.1 * torch.rand(FORKS, each, device=device)
    return change, products, 1 / scale, _normal(device, dtype, each, wide), scale


def _ours_forked(ops: SmallOps, shape: Shape, change, products, factor, base, scale) -> torch.Tensor:
    out = change.new_empty(change.shape[0] * change.shape[1], shape.intermediate)
    ops.forked_gated(change, products, factor, base, scale, None, None, None, "silu", out)
    return out


def _module_forked(shape: Shape, change, products, factor, base, scale) -> torch.Tensor:
    change = change * factor[..., None].to(change.dtype)
    wide = torch.baddbmm(base.expand(len(change), -1, -1), change, products)
    return _module_gated(shape, (wide * scale[..., None].to(wide.dtype)).flatten(0, 1))


def _no_liger(_shape: Shape) -> Callable:
    raise NotMeasured("Liger-Kernel has no such operation")


OPS = {
    "small-rms-norm": Op(
        LLAMA2_7B, lambda shape: 2 * shape.hidden, _norm_inputs,
        lambda ops, shape, x, weight: ops.rms_norm(x, _norm_module(LlamaRMSNorm, weight)),
        lambda shape, x, weight: _norm_module(LlamaRMSNorm, weight)(x), _liger_norm,
    ),
    "small-add-rms-norm": Op(
        GEMMA2_9B, lambda shape: 3 * shape.hidden, _added_inputs, _ours_added,
        lambda shape, x, y, weight: x + _norm_module(Gemma2RMSNorm, weight)(y), _liger_added,
    ),
    "small-rope": Op(
        LLAMA31_8B, lambda shape: 2 * (shape.heads + shape.kv_heads) * shape.head_dim, _rope_inputs, _ours_rope,
        _module_rope, _liger_rope,
    ),
    "small-silu-mul": Op(
        LLAMA2_7B, lambda shape: 3 * shape.intermediate, _gated_inputs, lambda ops, shape, x: ops.gated(x, "silu"),
        _module_gated, _liger_gated,
    ),
    "small-forked-gate-up": Op(
        LLAMA2_7B, lambda shape: shape.head_dim + shape.intermediate + 2 * shape.intermediate // FORKS, _forked_inputs,
        _ours_forked, _module_forked, _no_liger, "baddbmm and activation",
    ),
}  # fmt: skip


def small_op_kernels(session: Session) -> None:
    session.drop_model()
    for case, op in OPS.items():
        with session.guarded(case, OURS):
            _case(session, case, op)
        session.clear()


def _case(session: Session, case: str, op: Op) -> None:
    backend, dtype = ("triton", torch.bfloat16) if session.on_gpu else ("cpp", torch.float32)
    ops, shape = small_ops(backend, dtype, dtype), session.shape(op.shape)
    torch.manual_seed(0)
    few = op.inputs(shape, CHECKED_TOKENS, session.device, dtype)
    inputs = op.inputs(shape, session.chunk_tokens, session.device, dtype)
    moved = op.numbers(shape) * session.chunk_tokens * dtype.itemsize
    common = {"dtype": str(dtype).removeprefix("torch."), "tokens": session.chunk_tokens, "bytes": moved}
    paths: dict[str, Callable[[], Callable]] = {
        OURS: lambda: lambda *x: op.ours(ops, shape, *x),
        op.peer: lambda: lambda *x: op.module(shape, *x),
        "the same, torch.compile": lambda: compiled(session, lambda *x: op.module(shape, *x)),
        "Liger-Kernel": lambda: op.liger(shape),
    }
    exact = _exact(op, shape, few)
    allowed = FACTOR * _error(op.module(shape, *few), exact)
    first = None
    for name, prepare in paths.items():
        with session.guarded(case, name, common), torch.inference_mode():
            run = prepare()
            error = _error(run(*(x.clone() for x in few)), exact)
            timing = timed(lambda run=run: run(*inputs), session.device, budget_s=session.share_s(0.2))
            first = timing.median if name == OURS else first
            session.write(
                case,
                name,
                common | bandwidth_figures(session, timing, moved, first) | held(error, allowed, "float64") | {
                    "resolved_backend": backend if name == OURS else None,
                },
            )  # fmt: skip


def _exact(op: Op, shape: Shape, inputs: Tensors) -> Tensors:
    """In float64. Norms by their formula: their modules round to float32 on the way."""
    wide = [x.double() for x in inputs]
    if op.inputs in (_rope_inputs, _gated_inputs, _forked_inputs):
        return op.module(shape, *wide)
    *rest, y, weight = wide
    normed = y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return rest[0] + normed * (1 + weight) if rest else normed * weight


def _error(result, exact) -> float:
    """Largest difference; of the largest, if there are several results."""
    if isinstance(result, tuple):
        errors = [_error(*pair) for pair in zip(result, exact, strict=True)]
        return next((x for x in errors if math.isnan(x)), max(errors))
    return float((result.double() - exact).abs().max())
