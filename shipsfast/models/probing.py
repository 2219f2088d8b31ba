"""What a model is seen to do when it is looked at for the first time: which modules call attention, with what shapes,
what their masks hide, and whether anything but attention looks beyond a token and its position id.

While a probe runs, attention hands every token its own value, so that tokens are strangers to each other. Two rows
that differ in their first token then agree at the others, unless something else mixes tokens; and a token with its
position id gives the same in another place of the sequence, unless something looks at that place (`looks_beyond`).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import UnsupportedModelError
from .ambient import autocast

# Rows of one batch that differ by less agree, in standard deviations of the logits: whatever does it moves no score by more
# than a scan in this dtype rounds. It saves a pass, which for weights that are elsewhere is a reading of them all.
LEAST = {torch.float64: 1e-12, torch.float32: 1e-6}
# By how much products of other sizes round apart, likewise; half precision rounds too much to tell a look from rounding.
ROUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass
class Probe:
    """Records the calls of attention in one forward pass."""

    longest: int  # visibility is settled for sequences of up to this many tokens
    calls: list[ProbeCall] = field(default_factory=list)


@dataclass(frozen=True)
class ProbeCall:
    module: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    window: int | None
    autocast: str | None


@dataclass(frozen=True)
class Visible:
    """Stands in for an attention mask: causal, with a sliding window of `window` tokens or none."""

    window: int | None


probe: contextvars.ContextVar[Probe | None] = contextvars.ContextVar("shipsfast_probe", default=None)


def record_call(recorder: Probe, module, query, key, value, mask, sliding_window: int | None) -> torch.Tensor:
    """Take note of a call of attention; returns every token's own value, [B, T, H, D of v].

    Raises UnsupportedModelError if it cannot be known what the call's mask hides.
    """
    if not isinstance(mask, Visible):
        raise UnsupportedModelError(
            f"{type(module).__name__} makes its own attention mask ({type(mask).__name__}): what it hides is unknown"
        )
    hides = sliding_window is not None and sliding_window < recorder.longest
    if hides and mask.window != sliding_window:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for a sliding window of {sliding_window} tokens, but its mask has {mask.window}"
        )
    tokens = (query.shape[2], key.shape[2], value.shape[2])
    if len(set(tokens)) > 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to {tokens[1]} keys from {tokens[0]} tokens: it adds keys of its own, "
            "which shipsfast does not know how to pack"
        )
    call = ProbeCall(
        module, query.shape[1], key.shape[1], query.shape[3], value.shape[3], mask.window, autocast()
    )
    recorder.calls.append(call)
    return value.repeat_interleave(call.num_heads // call.num_kv_heads, 1).transpose(1, 2).contiguous()


def probe_rows(token_ids: list[int], vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and position ids [3, T] for `looks_beyond`: as they are; with another first token; one place earlier."""
    first, *rest = token_ids
    ids = [token_ids, [(first + 1) % vocabulary, *rest], [*rest, first]]
    positions = list(range(len(token_ids)))
    return ids, [positions, positions, [p + 1 for p in positions]]


def looks_beyond(
    logits: torch.Tensor, ids: torch.Tensor, position_ids: torch.Tensor, run: Callable[..., torch.Tensor]
) -> bool:
    """Whether tokens know of others, or of their place, without attention. logits [3, T, V] of `probe_rows`.

    No size of a difference tells mixing from rounding: a router in half precision rounds more than a small steering vector
    at the last place adds. So where rows do not agree, the same tokens go through once more, in the same order and each as
    a row of its own. Every product and every router then has the same numbers before it, in any dtype, and
    whatever is not bit for bit the same has looked at a neighbour or at a place. run(input_ids, position_ids) -> logits.
    """
    least = LEAST.get(logits.dtype, 0.0) * float(logits[0].double().nan_to_num(0.0, 0.0, 0.0).std())
    if _same(logits[0, 1:], logits[1, 1:], least) and _same(logits[0, 1:], logits[2, :-1], least):
        return False
    alone = run(ids.reshape(-1, 1), position_ids.reshape(-1, 1))
    return not _same(alone.flatten(0, 1), logits.flatten(0, 1))


def looks_at_end(short: torch.Tensor, longer: torch.Tensor, hooked: bool) -> bool:
    """Whether the last token of a sequence is another one where more follow. Logits [rows, T, V], and those of the same tokens in
    longer sequences. hooked: by more than the model's own code, which alone is causal; in half precision that is then told bit
    for bit."""
    std = float(short[0].double().nan_to_num(0.0, 0.0, 0.0).std())
    if short.dtype not in ROUNDS and not hooked:
        return False
    return not _same(short, longer[:, : short.shape[1]], ROUNDS.get(short.dtype, 0.0) * std)


def _same(a: torch.Tensor, b: torch.Tensor, least: float = 0.0) -> bool:
    a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).abs().max()) <= least


def window_of(mask_function, longest: int, device) -> int | None:
    """The sliding window of a causal mask function over `longest` tokens, None if it hides nothing else.

    The function is asked about every key for up to 256 queries, so that chunked, bidirectional, blockwise
    and other masks are noticed and refused.
    """
    device = torch.device(device)
    if device.type == "meta":  # a model without weights: its masks are asked on a CPU
        device = torch.device("cpu")
    key = torch.arange(longest, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    window = None
    queries = np.unique(np.linspace(longest - 1, 0, min(longest, 256)).astype(int))[::-1]
    for q in queries.tolist():
        try:
            seen = mask_function(zero, zero, torch.tensor(q, device=device), key)
            seen = torch.as_tensor(seen, device=device).expand(longest)
        except (IndexError, RuntimeError, TypeError) as error:
            raise UnsupportedModelError(f"the model's attention mask cannot be read: {error}") from error
        if q == longest - 1:
            hidden = int((~seen).sum())
            window = longest - hidden if hidden else None
        expected = key <= q
        if window is not None:
            expected &= key > q - window
        if not torch.equal(seen, expected):
            raise UnsupportedModelError(
                "the model's attention mask is neither causal nor a sliding window: it cannot be scanned exactly"
            )
    return window
