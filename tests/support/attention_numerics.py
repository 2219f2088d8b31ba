"""What the tests of attention share: their inputs, the oracle and the tolerance rule.

The rule, per row and head: the output is finite, and its largest error against the float64 oracle is at most
twice that of plain torch in the same dtype, plus a floor. Plain torch alone is no measure: it is right by luck
where a head has few outputs, and on another processor by other luck. The floor has two parts, both of the head's
largest output. One unit in the last place of the dtype: results are stored in it, and the Triton interpreter
truncates to bfloat16 where the GPU rounds, so half a unit would blame the kernel for the interpreter. And what sums
of float32 are off by: its unit times the root of their terms, one per dimension in a logit, one per key in an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shipsfast.ops import prefix_tree, reference
from tests.support.rounding import sum_eps

FACTOR = 2.0
ALTERNATIVES = ("q_alt", "k_alt", "out_alt")
DTYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip


def oracle(q, k, v, logit_scale, output_scale, position, subtree_end, **options) -> torch.Tensor:
    """shipsfast.ops.reference.tree_attention in float64, from the same rounded inputs."""
    wide = [x.double() for x in (q, k, v, logit_scale, output_scale)]
    options |= {name: options[name].double() for name in ALTERNATIVES if options.get(name) is not None}
    return reference.tree_attention(*wide, position, subtree_end, **options)


def assert_close_per_head(actual: torch.Tensor, args: tuple, options: dict) -> None:
    """actual: what a backend gives for the arguments of tree_attention, [B, TQ, H, D]."""
    plain, exact = reference.tree_attention(*args, **options), oracle(*args, **options)
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all(), "the output has NaN or infinite elements"
    per_head = lambda x: x.abs().amax(dim=(1, 3))
    error, plain_error = per_head(actual.double() - exact), per_head(plain.double() - exact)
    terms = args[0].shape[-1] + len(args[5])
    floor = (torch.finfo(actual.dtype).eps + sum_eps(actual.dtype) * terms**0.5) * per_head(exact)
    bound = FACTOR * plain_error + floor
    bad = error > bound
    assert not bad.any(), "\n".join(
        f"row {b} head {h}: error {error[b, h]:.3e} is more than {FACTOR} x {plain_error[b, h]:.3e} "
        f"(plain torch) + {floor[b, h]:.3e} (floor)"
        for b, h in bad.nonzero().tolist()[:8]
    )


def make_prompts(tree: str) -> list[list[int]]:
    rng = np.random.default_rng(3)
    tail = lambda low, high: rng.integers(0, 1000, rng.integers(low, high)).tolist()
    template = tail(37, 38)
    match tree:
        case "shared":  # one template, own endings
            return [template + tail(3, 15) for _ in range(7)]
        case "nested":  # branches of branches: more than one level of sharing
            stems = [template[:20] + tail(5, 12) for _ in range(3)]
            return [stem + tail(1, 10) for stem in stems for _ in range(3)]
        case "forest":
            return [tail(5, 25) for _ in range(6)]
        case "single":
            return [tail(71, 72)]
        case "one_token":
            return [[i] for i in range(9)]
        case "duplicates":
            return [template[:19], template[:30], template[:19], template[:30] + [7], template[:30]]
    raise ValueError(tree)


@dataclass(frozen=True)
class Case:
    B: int = 2
    H: int = 4
    HKV: int = 2
    D: int = 16
    dtype: torch.dtype = torch.float32
    tree: str = "shared"
    softcap: float | None = None
    window: int | None = None
    queries: str = "all"  # all, or last: the last token of each prompt
    batch: str = "full"  # full, or one: q, k and v have a batch dimension of 1
    replace: str = ""  # full, or one: every sum of flags, with alternatives whose broadcast dimensions are 1
    DV: int | None = None  # v's head size, if it is not D

    def __str__(self) -> str:
        T = prefix_tree.pack(make_prompts(self.tree)).num_tokens
        parts = [f"B{self.B}-H{self.H}-HKV{self.HKV}-T{T}-D{self.D}-{DTYPE_NAMES[self.dtype]}-{self.tree}"]
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += [f"window{self.window}"] if self.window else []
        parts += ["lastqueries"] if self.queries == "last" else []
        parts += ["batch1"] if self.batch == "one" else []
        parts += ["replace1" if self.replace == "one" else "replace"] if self.replace else []
        parts += [f"DV{self.DV}"] if self.DV else []
        return "-".join(parts)


def make_arguments(
    case: Case, logit_scale=None, output_scale=None, device: torch.device | str = "cpu"
) -> tuple[list[torch.Tensor], dict]:
    """Arguments of tree_attention, positional and by keyword.

    q, k and v are random and laid out as transformers' attention has them: [B, T, H, D] seen as [B, H, T, D].
    """
    packed = prefix_tree.pack(make_prompts(case.tree))
    T = packed.num_tokens
    query_index = np.unique(packed.last_index) if case.queries == "last" else None
    TQ = T if query_index is None else len(query_index)
    generator = torch.Generator().manual_seed(11)
    rows = 1 if case.batch == "one" else case.B
    draw = lambda heads, tokens, size: (
        torch.randn(rows, tokens, heads, size, generator=generator, dtype=torch.float64)
        .to(case.dtype).to(device).transpose(1, 2)
    )  # fmt: skip
    q, k, v = draw(case.H, TQ, case.D), draw(case.HKV, T, case.D), draw(case.HKV, T, case.DV or case.D)
    vectors = torch.arange(case.B * case.H).reshape(case.B, case.H)
    if logit_scale is None:
        logit_scale = torch.tensor([1.0, 1e-5, 0.0, 1.0, -1.0, 2.0, 1.0])[vectors % 7]
    if output_scale is None:
        output_scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1e-5, -0.5, 1.0, 1.0])[vectors % 9]
    tree = [torch.from_numpy(x).to(device) for x in (packed.position, packed.subtree_end)]
    options = {"scaling": case.D**-0.5, "softcap": case.softcap, "window": case.window}
    if query_index is not None:
        options["query_index"] = torch.from_numpy(query_index.astype(np.int32)).to(device)
    args = [q, k, v, logit_scale.to(device), output_scale.to(device), *tree]
    if case.replace:
        # In an order that meets the vectors above: each flag alone at a head whose logits matter.
        flags = torch.tensor([2, 0, 5, 4, 1, 3, 7, 6], dtype=torch.int8)[vectors % 8]
        options |= make_replacements(args, flags, full=case.replace == "full")
    return args, options


def make_replacements(args: list[torch.Tensor], flags: torch.Tensor, full: bool = True) -> dict:
    """The replacement arguments for flags [B, H]: random vectors, NaN where no head is flagged for them.

    full: q_alt and k_alt for every row, out_alt for every head and token; otherwise one for all.
    """
    q, k, v = args[:3]
    rows, heads = flags.shape
    generator = torch.Generator().manual_seed(12)

    def draw(count: int, tokens: int, size: int) -> torch.Tensor:
        wide = torch.randn(count, tokens, size + 8, generator=generator, dtype=torch.float64)
        return wide.to(q)[..., :size]  # rows of a larger tensor: only the last dimension is contiguous

    unused = lambda flag, dim: ((flags & flag) == 0).all(dim).to(q.device)
    q_alt, k_alt = (draw(rows if full else 1, x.shape[2], x.shape[3]) for x in (q, k))
    out_alt = draw(heads if full else 1, q.shape[2] if full else 1, v.shape[3])
    for x, flag, dim in ((q_alt, 1, 1), (k_alt, 2, 1), (out_alt, 4, 0)):
        missing = unused(flag, dim)
        x[missing if full else missing.all(0, keepdim=True)] = float("nan")
    return {"replace": flags.to(q.device), "q_alt": q_alt, "k_alt": k_alt, "out_alt": out_alt}
