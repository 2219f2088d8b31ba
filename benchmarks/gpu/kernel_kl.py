"""KL of rows of logits alone: ours against what PyTorch and libraries offer. Bytes are every logit read once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from shipsfast.ops.divergences import kl_backend, kl_rows

from .ceilings import bandwidth_figures
from .clock import timed
from .kernel_attention import compiled
from .rows import held
from .session import OURS, NotMeasured, Session

# (case, prompts, ablations, vocabulary); logits leave the head in float32.
CASES = {"kl-v32000": (100, 20, 32000), "kl-v128256": (100, 5, 128256), "kl-v256000": (100, 2, 256000)}
SMOKE_CASE = (3, 4, 61)
TOLERANCE_NATS = 1e-5  # of the peers, whose KL is in float32
OURS_TOLERANCE_NATS = 1e-12
CUDA_TOLERANCE = 1e-6  # of the KL, beside it: the terms of csrc/ships_kl.cuh are float32


def kl_kernels(session: Session) -> None:
    session.drop_model()
    for case, size in CASES.items():
        with session.guarded(case, OURS):
            _case(session, case, *(SMOKE_CASE if session.smoke else size))
        session.clear()


def torch_kl(base: torch.Tensor, ablated: torch.Tensor) -> torch.Tensor:
    """log_softmax of both, then kl_div; base [P, V], ablated [R, P, V] -> [R, P]."""
    log_base, log_ablated = (torch.log_softmax(x.float(), -1) for x in (base, ablated))
    return torch.nn.functional.kl_div(
        log_ablated, log_base.expand_as(log_ablated), reduction="none", log_target=True
    ).sum(-1)


def _case(session: Session, case: str, prompts: int, ablations: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    base = 2 * torch.randn(prompts, vocabulary, device=session.device)
    ablated = base + 0.1 * torch.randn(ablations, prompts, vocabulary, device=session.device)
    flat, place = ablated.flatten(0, 1), torch.arange(prompts, device=session.device).repeat(ablations)
    moved = (base.numel() + ablated.numel()) * base.element_size()
    common = {
        "dtype": "float32", "prompts": prompts, "rows": len(flat), "vocabulary": vocabulary, "bytes": moved,
    }  # fmt: skip
    few = ablated[:1].double()
    exact = torch.nn.functional.kl_div(
        torch.log_softmax(few, -1), torch.log_softmax(base.double(), -1)[None], reduction="none", log_target=True
    ).sum(-1)[0]  # fmt: skip
    backend = kl_backend(session.device)
    paths: dict[str, Callable[[], Callable]] = {
        OURS: lambda: lambda: kl_rows(base, flat, place).view(ablations, prompts),
        "log_softmax + kl_div": lambda: lambda: torch_kl(base, ablated),
        "the same, torch.compile": lambda: _compiled(session, base, ablated),
        "Liger KL": lambda: _liger(base, ablated),
    }
    first = None
    for name, prepare in paths.items():
        with session.guarded(case, name, common):
            run = prepare()
            error = float((run()[0].double() - exact).abs().max())
            allowed = OURS_TOLERANCE_NATS if name == OURS else TOLERANCE_NATS
            if name == OURS and session.on_gpu and backend == "cpp":  # a case's rows have about the same KL
                allowed += CUDA_TOLERANCE * float(exact.min())
            timing = timed(run, session.device, budget_s=session.share_s(0.3))
            first = timing.median if name == OURS else first
            session.write(
                case,
                name,
                common | bandwidth_figures(session, timing, moved, first) | held(error, allowed, "float64", "_nats") | {
                    "resolved_backend": backend if name == OURS else None,
                },
            )  # fmt: skip


def _compiled(session: Session, base: torch.Tensor, ablated: torch.Tensor) -> Callable:
    function = compiled(session, torch_kl)
    return lambda: function(base, ablated)


def _liger(base: torch.Tensor, ablated: torch.Tensor) -> Callable:
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotMeasured("the package liger_kernel is not installed")
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="none", log_target=True)

    def run() -> torch.Tensor:
        log_ablated = torch.log_softmax(ablated, -1).flatten(0, 1)
        log_base = torch.log_softmax(base, -1).expand_as(ablated).flatten(0, 1)
        return loss(log_ablated, log_base.contiguous()).sum(-1).view(ablated.shape[:2])

    return run
