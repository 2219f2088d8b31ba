"""Attention kernels alone, at the scan's shapes: tree attention of one layer and chunk, decode attention of one step.

FLOPs are 4 D per head, query and key that it sees; bytes are q, k, v and the output once. Every path gives the same
function of the same inputs and is held against float32 on one row; one that is off is timed too, and its row says so.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import torch
from shipsfast.kernels.tree_kind import wasted_products

from shipsfast.ops import reference
from shipsfast.ops.decode_attention import decode_attention
from shipsfast.ops.masks import LayerMask
from shipsfast.ops.tree_attention import TreeContext, resolve_backend, tree_attention

from .ceilings import copy_ceiling, gemm_ceiling
from .clock import timed
from .rows import held
from .scans import SCANS
from .session import OURS, NotMeasured, Session
from .shapes import GEMMA2_9B, LLAMA2_7B, LLAMA31_8B, Shape

EPS = 1e-5
# The rule of all kernels here: at most twice the error of plain PyTorch in the same dtype, and a little.
FACTOR, FLOOR = 2.0, 1e-3
TREES = {
    "tree-llama2-short": (LLAMA2_7B, "llama2-7b-short"),
    "tree-llama2-template": (LLAMA2_7B, "llama2-7b-template"),
    "tree-llama31": (LLAMA31_8B, "llama31-8b"),
    "tree-gemma2": (GEMMA2_9B, "gemma2-9b"),
}
DECODES = {"decode-llama2": LLAMA2_7B, "decode-llama31": LLAMA31_8B}
QUICK = ("tree-llama2-short", "tree-llama31", "decode-llama2")  # compiling FlexAttention takes seconds each
DECODE_ROWS, DECODE_CAPACITY, SMOKE_ROWS, SMOKE_CAPACITY = 512, 160, 6, 20
Path = Callable[[], torch.Tensor]


def compiled(session: Session, function: Callable) -> Callable:
    """torch.compile where there is a GPU; a smoke run takes the function as it is."""
    return torch.compile(function, dynamic=False) if session.on_gpu else function


def attention_kernels(session: Session) -> None:
    session.drop_model()
    for case in (*TREES, *DECODES):
        with session.guarded(case, OURS):
            if session.quick and not session.smoke and case not in QUICK:
                raise NotMeasured("left out by --quick")
            if case in TREES:
                shape, scan = TREES[case]
                _tree_case(session, case, session.shape(shape), scan)
            else:
                _decode_case(session, case, session.shape(DECODES[case]))
        session.clear()


def _mask(session: Session, rows: int, heads: int) -> LayerMask:
    """One head of every row but the first switched off."""
    logit_scale = torch.ones(rows, heads, device=session.device)
    for row in range(1, rows):
        logit_scale[row, row % heads] = EPS
    return LayerMask(logit_scale, torch.ones_like(logit_scale))


def _tree_case(session: Session, case: str, shape: Shape, scan: str) -> None:
    packed = session.prompts(SCANS[scan].prompts).packed(shape.vocabulary)
    rows = max(1, session.chunk_tokens // packed.num_tokens)
    softcap = dict(shape.more).get("attn_logit_softcapping")
    backend = resolve_backend("auto", session.device, session.dtype)
    tree = TreeContext(packed, backend, session.device)
    torch.manual_seed(0)
    make = lambda heads: torch.randn(
        rows, packed.num_tokens, heads, shape.head_dim, dtype=session.dtype, device=session.device
    ).transpose(1, 2)
    q, k, v = make(shape.heads), make(shape.kv_heads), make(shape.kv_heads)
    mask, scaling = _mask(session, rows, shape.heads), shape.head_dim**-0.5
    seen = int((packed.position + 1).sum())
    work = 4 * rows * shape.heads * shape.head_dim * seen
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    common = {
        "dtype": "bfloat16", "rows": rows, "packed_tokens": packed.num_tokens, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "softcap": softcap, "flops": work, "bytes": moved,
    }  # fmt: skip
    wide = lambda x, part: x[part].float()
    part = slice(rows - 1, rows)
    of_row = LayerMask(mask.logit_scale[part], mask.output_scale[part])
    tables = (tree.position, tree.subtree_end)
    expected = reference.tree_attention(
        *(wide(x, part) for x in (q, k, v)), of_row.logit_scale, of_row.output_scale, *tables, scaling=scaling,
        softcap=softcap,
    )  # fmt: skip
    plain = reference.tree_attention(
        *(x[part] for x in (q, k, v)), of_row.logit_scale, of_row.output_scale, *tables, scaling=scaling, softcap=softcap
    )  # fmt: skip
    allowed = FACTOR * float((plain.float() - expected).abs().max()) + FLOOR

    def ours() -> torch.Tensor:
        return tree_attention(
            tree, q, k, v, mask, tree.plan(None, False, q), scaling=scaling, softcap=softcap
        )

    def dense() -> torch.Tensor:
        if softcap is not None:
            raise NotMeasured("scaled_dot_product_attention has no softcap")
        scaled = q * mask.logit_scale.to(q.dtype)[:, :, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            scaled, k, v, attn_mask=visible, scale=scaling, enable_gqa=shape.heads != shape.kv_heads
        )
        return out.transpose(1, 2)

    visible = reference.visible(*tables)[None, None]
    paths: dict[str, Callable[[], Path]] = {
        OURS: lambda: ours,
        "FlexAttention, compiled": lambda: _flex(session, q, k, v, mask, tables, scaling, softcap),
        "SDPA with a dense mask": lambda: dense,
        "FlashAttention varlen": lambda: _flash(session, packed, shape, rows, scaling, softcap),
    }
    record = {OURS: {"resolved_backend": backend, **tile_record(tree, q)}}
    _time_paths(session, case, paths, record, common, expected, part, allowed, work, moved)


def tile_record(tree: TreeContext, query: torch.Tensor) -> dict:
    """The kind of tree, and where Triton runs the tile that it chose and the products computed for each that is needed."""
    found = {"kind_of_tree": tree.kind(None)}
    if tree.backend != "triton":
        return found
    config = tree.plan(None, False, query)["config"]
    tile = (config.block_m, config.block_n)
    wasted = wasted_products(tree.packed.position, tree.packed.subtree_end, tile)
    return found | {"tile": f"{tile[0]}x{tile[1]}", "wasted_products": round(wasted, 2)}


def _time_paths(session, case, paths, record, common, expected, part, allowed, work, moved) -> None:
    """Check, time and write every path. A path without a check (None) computes the same sums over other inputs."""
    first = None
    for name, prepare in paths.items():
        with session.guarded(case, name, common):
            run = prepare()
            out = run()
            figures = {}
            if out.shape[1:] == expected.shape[1:]:
                figures = held(float((out[part].float() - expected).abs().max()), allowed, "float32")
            del out
            timing = timed(run, session.device, budget_s=session.share_s(0.3))
            if name == OURS:
                first = timing.median
            ceiling_s = max(work / gemm_ceiling(session), moved / copy_ceiling(session))
            session.write(
                case,
                name,
                common | timing.figures() | {
                    "tflops_per_s": round(work / timing.median / 1e12, 4),
                    "gb_per_s": round(moved / timing.median / 1e9, 2),
                    "share_of_ceiling": round(ceiling_s / timing.median, 4),
                    "times_slower_than_shipsfast": round(timing.median / first, 3) if first else None,
                } | figures | record.get(name, {}),
            )  # fmt: skip


def _flex(session: Session, q, k, v, mask: LayerMask, tables, scaling: float, softcap: float | None) -> Path:
    """The same tree as a block mask, the same factors per head as a score modification."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, subtree_end = tables
    scale = mask.logit_scale
    tokens = q.shape[2]

    def sees(_b, _h, query, key):
        return (key <= query) & (query < subtree_end[key])

    def score(value, b, h, _query, _key):
        value = value * scale[b, h]
        return value if softcap is None else softcap * torch.tanh(value / softcap)

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=str(session.device))
    attend = compiled(session, flex_attention)
    gqa = q.shape[1] != k.shape[1]
    q, k, v = (x.contiguous() for x in (q, k, v))
    return lambda: attend(
        q, k, v, score_mod=score, block_mask=blocks, scale=scaling, enable_gqa=gqa
    ).transpose(1, 2)


def _flash(session: Session, packed, shape: Shape, rows: int, scaling: float, softcap: float | None) -> Path:
    """Every prompt a sequence of its own, so that shared tokens are computed once per prompt; no factors per head."""
    if importlib.util.find_spec("flash_attn") is None:
        raise NotMeasured("the package flash_attn is not installed")
    from flash_attn import flash_attn_varlen_func

    lengths = [int(packed.position[i]) + 1 for i in packed.last_index] * rows
    ends = torch.tensor([0, *lengths], device=session.device).cumsum(0).int()
    make = lambda heads: torch.randn(
        sum(lengths), heads, shape.head_dim, dtype=session.dtype, device=session.device
    )
    q, k, v = make(shape.heads), make(shape.kv_heads), make(shape.kv_heads)
    return lambda: flash_attn_varlen_func(
        q, k, v, ends, ends, max(lengths), max(lengths), softmax_scale=scaling, causal=True, softcap=softcap or 0.0
    )  # fmt: skip


def _decode_case(session: Session, case: str, shape: Shape) -> None:
    rows, capacity = (SMOKE_ROWS, SMOKE_CAPACITY) if session.smoke else (DECODE_ROWS, DECODE_CAPACITY)
    draw = random.Random(0)
    lengths = [draw.randrange(capacity // 6 + 1, capacity) for _ in range(rows)]
    torch.manual_seed(0)
    make = lambda *size: torch.randn(*size, dtype=session.dtype, device=session.device)
    q = make(rows, shape.heads, shape.head_dim)
    k, v = (make(rows, shape.kv_heads, capacity, shape.head_dim) for _ in range(2))
    slot = torch.arange(rows, dtype=torch.int32, device=session.device)
    length = torch.tensor(lengths, dtype=torch.int32, device=session.device)
    mask, scaling = _mask(session, rows, shape.heads), shape.head_dim**-0.5
    backend = resolve_backend("auto", session.device, session.dtype)
    work = 4 * sum(lengths) * shape.heads * shape.head_dim
    moved = (2 * sum(lengths) * shape.kv_heads * shape.head_dim + 2 * q.numel()) * q.element_size()
    common = {
        "dtype": "bfloat16", "rows": rows, "capacity": capacity, "tokens": sum(lengths), "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "flops": work, "bytes": moved,
    }  # fmt: skip
    part = slice(rows - 1, rows)
    args = (slot[part], length[part], mask.logit_scale[part], mask.output_scale[part])
    expected = reference.decode_attention(q[part].float(), k.float(), v.float(), *args, scaling=scaling)
    plain = reference.decode_attention(q[part], k, v, *args, scaling=scaling)
    allowed = FACTOR * float((plain.float() - expected).abs().max()) + FLOOR
    gqa = shape.heads != shape.kv_heads

    def ours() -> torch.Tensor:
        return decode_attention(backend, q, k, v, None, slot, length, mask, scaling=scaling)

    visible = (torch.arange(capacity, device=session.device) < length[:, None])[:, None, None]

    def dense() -> torch.Tensor:
        scaled = (q * mask.logit_scale.to(q.dtype)[:, :, None])[:, :, None]
        return torch.nn.functional.scaled_dot_product_attention(
            scaled, k, v, attn_mask=visible, scale=scaling, enable_gqa=gqa
        )[:, :, 0]

    def flex() -> Path:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b, _h, _query, key):
            return key < length[b]

        scale = mask.logit_scale

        def score(value, b, h, _query, _key):
            return value * scale[b, h]

        blocks = create_block_mask(sees, rows, None, 1, capacity, device=str(session.device))
        attend = compiled(session, flex_attention)
        one = q[:, :, None]
        return lambda: attend(one, k, v, score_mod=score, block_mask=blocks, scale=scaling, enable_gqa=gqa)[
            :, :, 0
        ]

    paths = {OURS: lambda: ours, "SDPA with a dense mask": lambda: dense, "FlexAttention, compiled": flex}
    record = {OURS: {"resolved_backend": backend}}
    _time_paths(session, case, paths, record, common, expected, part, allowed, work, moved)
