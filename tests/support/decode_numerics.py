"""What the tests of decode attention share: their inputs, the definition, the oracle, and how results are held to it.

The tolerance rule is that of attention_numerics.py, for every entry and head. One query alone has so few outputs that
the largest may be small by luck: what sums are off by is of the values, which are about 1.

Whatever an entry does not see of the caches is NaN, unless another entry sees it, and so is every replacement
that no head is flagged for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from shipsfast.ops import reference
from tests.conftest import TEST_GPU
from tests.support.attention_numerics import ALTERNATIVES, DTYPE_NAMES, FACTOR
from tests.support.numerics import assert_close_abs
from tests.support.rounding import sum_eps

DEVICE = "cuda" if TEST_GPU else "cpu"


@dataclass(frozen=True)
class Case:
    N: int = 6
    H: int = 4
    HKV: int = 2
    C: int = 37
    D: int = 16
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    window: int | None = None
    replace: str = ""  # full, or one: every sum of flags, with alternatives whose broadcast dimensions are 1
    DV: int | None = None  # v's head size, if it is not D
    seed: int = 11

    def __str__(self) -> str:
        parts = [f"N{self.N}-H{self.H}-HKV{self.HKV}-C{self.C}-D{self.D}-{DTYPE_NAMES[self.dtype]}"]
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += [f"window{self.window}"] if self.window else []
        parts += ["replace1" if self.replace == "one" else "replace"] if self.replace else []
        parts += [f"DV{self.DV}"] if self.DV else []
        return "-".join(parts)


@dataclass
class Inputs:
    """Arguments of decode_attention, positional and by keyword, as every backend takes them."""

    args: list[torch.Tensor]  # q, k_cache, v_cache, slot, length, logit_scale, output_scale
    options: dict = field(default_factory=dict)

    def run(self, function: Callable[..., torch.Tensor], logit_scale=None, output_scale=None, **changes):
        *own, ls, os = self.args
        ls, os = (x if given is None else given for x, given in ((ls, logit_scale), (os, output_scale)))
        return function(*own, ls, os, **{**self.options, **changes})

    def exact(self) -> torch.Tensor:
        """shipsfast.ops.reference.decode_attention in float64, from the same rounded inputs."""
        wide = [x.double() if x.is_floating_point() else x for x in self.args]
        options = {
            name: x.double() if name in ALTERNATIVES and x is not None else x
            for name, x in self.options.items()
        }
        return reference.decode_attention(*wide, **options)

    def check(self, function: Callable[..., torch.Tensor], **changes) -> torch.Tensor:
        """Runs a backend and holds it to the tolerance rule; float64 to 1e-13."""
        actual, exact = self.run(function, **changes), self.exact()
        assert actual.is_contiguous() and actual.dtype == self.args[0].dtype
        bound = 1e-13
        if actual.dtype != torch.float64:
            largest = lambda x: x.abs().amax(-1, keepdim=True)
            plain_error = largest(self.run(reference.decode_attention).double() - exact)
            stored = torch.finfo(actual.dtype).eps * largest(exact)
            sums = (
                sum_eps(actual.dtype)
                * sum(self.args[1].shape[2:]) ** 0.5
                * self.args[6].double().abs()[..., None]
            )
            bound = FACTOR * plain_error + stored + sums
        assert_close_abs(actual, exact, bound)
        return actual


def make_inputs(
    case: Case, logit_scale=None, output_scale=None, device: torch.device | str = "cpu"
) -> Inputs:
    """Two slots more than entries, read in no order, the first and third entry from one slot; caches laid out
    [S, C, HKV, D] and larger than what is seen of them. The first entry is of full length, the last of length 1.
    """
    N, H, S = case.N, case.H, case.N + 2
    generator = torch.Generator().manual_seed(case.seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)
    slot = torch.randperm(S, generator=generator)[:N].int()
    length = torch.randint(1, case.C + 1, (N,), generator=generator, dtype=torch.int32)
    length[:1], length[1:][-1:] = case.C, 1
    slot[2:3] = slot[:1]
    seen = seen_positions(slot, length, S, case.C, case.window)

    def cache(heads: int, size: int) -> torch.Tensor:
        x = random(S, case.C + 2, heads, size + 8)[:, : case.C, :, :size]
        x[~seen] = float("nan")
        return x.transpose(1, 2)

    q = random(N, 2, H, case.D)[:, 1]
    vectors = torch.arange(N * H).reshape(N, H)
    if logit_scale is None:
        logit_scale = torch.tensor([1.0, 1e-5, 0.0, 1.0, -1.0, 2.0, 1.0])[vectors % 7]
    if output_scale is None:
        output_scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1e-5, -0.5, 1.0, 1.0])[vectors % 9]
    args = [q, cache(case.HKV, case.D), cache(case.HKV, case.DV or case.D), slot, length]
    args = [x.to(device) for x in (*args, logit_scale, output_scale)]
    inputs = Inputs(args, {"scaling": case.D**-0.5, "softcap": case.softcap, "window": case.window})
    if case.replace:
        # In an order that meets the vectors above: each flag alone at a head whose logits matter.
        flags = torch.tensor([2, 0, 5, 4, 1, 3, 7, 6], dtype=torch.int8)[vectors % 8]
        inputs.options |= make_replacements(inputs, flags, full=case.replace == "full")
    return inputs


def seen_positions(slot, length, slots: int, positions: int, window: int | None) -> torch.Tensor:
    """bool [S, C]: what at least one entry sees."""
    seen = torch.zeros(slots, positions, dtype=torch.bool)
    for s, stop in zip(slot.tolist(), length.tolist(), strict=True):
        seen[s, max(0, stop - window) if window else 0 : stop] = True
    return seen


def make_replacements(inputs: Inputs, flags: torch.Tensor, full: bool = True) -> dict:
    """The replacement arguments for flags [N, H]. full: a q_alt for every entry, an out_alt for every head."""
    q, k_cache, v_cache, slot, length = inputs.args[:5]
    (N, H), (S, _, C, D) = flags.shape, k_cache.shape
    generator = torch.Generator().manual_seed(12)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(q.dtype)
    q_alt, out_alt = random(N if full else 1, 2, D)[:, 1], random(H if full else 1, 2, v_cache.shape[3])[:, 1]
    for x, flag, dim in ((q_alt, 1, 1), (out_alt, 4, 0)):
        missing = ((flags & flag) == 0).all(dim)
        x[missing if full else missing.all(0, keepdim=True)] = float("nan")
    takes_k = ((flags & 2) != 0).any(1).to(slot.device)
    seen = seen_positions(slot[takes_k], length[takes_k], S, C, inputs.options["window"])
    k_alt = random(S, C + 1, D + 8)[:, :C, :D]
    k_alt[~seen] = float("nan")
    given = {"replace": flags, "q_alt": q_alt, "k_alt": k_alt, "out_alt": out_alt}
    return {name: x.to(q.device) for name, x in given.items()}


def formula(inputs: Inputs) -> torch.Tensor:
    """The definition, entry by entry and head by head, from the visible keys alone."""
    q, k, v, slot, length, logit_scale, output_scale = (x.numpy() for x in inputs.args)
    options = inputs.options
    replace, q_alt, k_alt, out_alt = (
        options[name].numpy() if name in options else None for name in ("replace", *ALTERNATIVES)
    )
    out = np.empty((*q.shape[:2], v.shape[3]))
    for n, h in np.ndindex(out.shape[:2]):
        flags = 0 if replace is None else int(replace[n, h])
        kv_head = h * k.shape[1] // q.shape[1]
        seen = slice(max(0, length[n] - options["window"]) if options["window"] else 0, length[n])
        query = q_alt[n % len(q_alt)] if flags & 1 else q[n, h]
        keys = k_alt[slot[n], seen] if flags & 2 else k[slot[n], kv_head, seen]
        logits = keys @ query * options["scaling"] * logit_scale[n, h]
        if options["softcap"]:
            logits = options["softcap"] * np.tanh(logits / options["softcap"])
        weights = np.exp(logits - logits.max())
        result = weights / weights.sum() @ v[slot[n], kv_head, seen]
        if flags & 4:
            result = out_alt[h % len(out_alt)]
        out[n, h] = result * output_scale[n, h] if output_scale[n, h] else 0
    return torch.from_numpy(out)


def triton_attention(*args, **options) -> torch.Tensor:
    from shipsfast.kernels.decode_attention import decode_attention
    from shipsfast.kernels.launch_config import LaunchConfig

    # Without a GPU small tiles, so that small caches have several blocks.
    config = None if TEST_GPU else LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    return decode_attention(*args, config=config, **options)


def why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs triton"
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if not TEST_GPU and version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of triton 3.6 cannot loop with numpy 2.4: install numpy<2.4"
    return None
