"""Exhaustive KL scans of true shapes: ours, its check against float32, then the peers, on the same model and prompts.

A time is written as soon as there is one, and again with the verdict of its check: wrong scores are a row that says so.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import shipsfast
from shipsfast.engine import flops
from shipsfast.ops.prefix_tree import pack

from . import peers
from .alarms import alarms_off, refused
from .clock import peak_mib, reset_peak, seconds
from .rows import verdict
from .session import OURS, NotMeasured, Session
from .shapes import GEMMA2_9B, LLAMA2_7B, LLAMA31_8B, MISTRAL_7B, QWEN3_8B, Prompts, Shape, twin

SAMPLED_HEADS, SAMPLED_PROMPTS = 8, 16
# Scores may be off by twice what plain passes in the same dtype are, and this: the rule of all kernels here.
FACTOR, FLOOR_NATS = 2.0, 1e-5


@dataclass(frozen=True)
class ScanCase:
    """peers: whether the other ways are measured too; own_layers: whether a scan through the model's own layers is;
    runs of ours without --quick."""

    name: str
    shape: Shape
    prompts: Prompts
    peers: bool = False
    own_layers: bool = True
    runs: int = 3

    @property
    def title(self) -> str:
        return f"{self.shape.title}, bf16, {self.prompts.title}"


SCANS = {
    case.name: case
    for case in (
        ScanCase("llama2-7b-short", LLAMA2_7B, Prompts(100, 5), peers=True),
        ScanCase("llama2-7b-template", LLAMA2_7B, Prompts(100, 140), peers=True, own_layers=False),
        ScanCase("llama31-8b", LLAMA31_8B, Prompts(20, 5)),
        ScanCase("qwen3-8b", QWEN3_8B, Prompts(20, 5)),
        ScanCase("gemma2-9b", GEMMA2_9B, Prompts(20, 5)),
        ScanCase("mistral-7b", MISTRAL_7B, Prompts(20, 5)),
    )
}
PEERS = {
    "HF hooks, prompts padded": (peers.padded, peers.hooks_batched),
    "HF hooks, sorted by length": (peers.length_sorted, peers.hooks_batched),
    "heads x prompts as row masks": (peers.padded, peers.row_masks),
    "layers >= l only, by hand": (peers.padded, peers.skip_lower_layers),
}
OWN_LAYERS = "shipsfast, layers='model'"
LOOP = "one at a time, float32 (the paper's code)"


@dataclass(frozen=True)
class Oracle:
    """KL of a sample of heads and prompts in float32, and how far plain passes in the scan's dtype are from it."""

    heads: list[peers.Head]
    prompts: list[int]
    kl: np.ndarray  # float64 [heads, prompts]
    plain_rms: float

    def figures(self, result, dtype: torch.dtype) -> dict:
        """What a row says of a scan in `dtype`: `check`, and how far its scores are off."""
        scores = result.kl
        own = np.stack([scores[self.prompts, layer, head] for layer, head in self.heads])
        rms = _rms(own - self.kl)
        allowed = FACTOR * self.plain_rms + FLOOR_NATS
        wrong = refused(result, dtype)
        if not np.isfinite(own).all():
            wrong = "a score is not a finite number"
        elif not rms <= allowed:
            wrong = (
                f"scores differ from float32 by {rms:.3g} nats (root mean square), allowed are {allowed:.3g}"
            )
        return {
            "check": verdict(wrong), "rms_error_nats": float(f"{rms:.4g}"),
            "plain_rms_error_nats": float(f"{self.plain_rms:.4g}"), "rms_score_nats": float(f"{_rms(self.kl):.4g}"),
            "checked_against": f"float32, {own.size} scores",
        }  # fmt: skip


def make_oracle(session: Session, shape: Shape, token_ids: list[list[int]]) -> Oracle:
    model = session.model(shape)
    every = peers.every_head(model)
    heads = [every[int(i)] for i in np.linspace(1, len(every) - 1, min(SAMPLED_HEADS, len(every) - 1))]
    chosen = [int(i) for i in np.unique(np.linspace(0, len(token_ids) - 1, SAMPLED_PROMPTS).round())]
    batches = peers.equal_length([token_ids[i] for i in chosen], session.device)
    plain = peers.plain_kl(model, batches, heads).numpy()
    exact = twin(model, torch.float32)
    kl = peers.plain_kl(exact, batches, heads).numpy()
    del exact
    session.clear()
    return Oracle(heads, chosen, kl, _rms(plain - kl))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def run_scan(session: Session, case: ScanCase) -> None:
    shape, prompts = session.shape(case.shape), session.prompts(case.prompts)
    token_ids = prompts.token_ids(shape.vocabulary)
    packed = pack(token_ids)
    units = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    work = flops.scan_flops(shape.costs(), [packed], units)
    common = {
        "dtype": "bfloat16", "prompts": len(token_ids), "shared_tokens": prompts.shared,
        "tokens": sum(map(len, token_ids)), "packed_tokens": packed.num_tokens, "scores": len(units) * len(token_ids),
        "flops": work,
    }  # fmt: skip
    row, result, ours_s, floor = None, None, None, {}
    with session.guarded(case.name, OURS, common), alarms_off():
        model = session.model(shape)
        # Kernels are compiled and libraries loaded before anything is timed.
        shipsfast.scan(model, token_ids, heads=[units[0], units[-1]], progress=False, rescored=0)
        runs = 1 if session.quick or session.smoke else case.runs
        rate = session.gemm_rate(shape)
        times, inner, before = [], [], reset_peak(session.device)
        for _ in range(runs):
            taken, result = seconds(
                lambda: shipsfast.scan(model, token_ids, progress=False, rescored=0), session.device
            )
            times.append(taken)
            inner.append(result.record["scan_seconds"])
            if session.left_s < 3 * taken:
                break
        peak = peak_mib(session.device, before)
        rate = session.gemm_rate_around(shape, rate)
        ours_s = statistics.median(times)
        floor = rate.figures() | {"floor_s": float(f"{work / rate.sustained:.4g}")}
        row = session.write_unchecked(
            case.name,
            OURS,
            common | floor | {
                "median_s": round(ours_s, 4), "p20_s": round(float(np.quantile(times, 0.2)), 4),
                "p80_s": round(float(np.quantile(times, 0.8)), 4), "runs": len(times),
                "scan_median_s": round(statistics.median(inner), 4),
                "share_of_floor": round(work / rate.sustained / ours_s, 4), "times_slower_than_shipsfast": 1.0,
                "scores_per_s": round(common["scores"] / ours_s, 1),
                "noise_floor_nats": float(f"{result.record['packing_noise']:.4g}"), "peak_mib": peak, **how_it_ran(result),
            },
        )  # fmt: skip
    session.clear()
    oracle = scan_oracle(session, shape, token_ids)
    if row is not None:
        session.settle(row, oracle(result))
    if case.own_layers:  # also where ours failed
        with session.guarded(case.name, OWN_LAYERS, common | floor), alarms_off():
            _run_own_layers(session, case, token_ids, units, common | floor, oracle, ours_s)
        session.clear()
    if case.peers:
        _run_peers(
            session, case, shape, token_ids, common | floor, ours_s, None if row is None else result.kl
        )


def scan_oracle(session: Session, shape: Shape, token_ids: list[list[int]]) -> Callable[[object], dict]:
    """A scan's result -> what its row says of it, also where there is no memory, or no device any more, for a check."""
    made: list[Oracle] = []

    def make() -> dict:
        made.append(make_oracle(session, shape, token_ids))
        return {}

    failed = session.checked(make)
    session.clear()
    return lambda result: failed or session.checked(lambda: made[0].figures(result, session.dtype))


def how_it_ran(result) -> dict:
    """The plan of a scan, and the backends and layers that it went through."""
    plan = result.record["plan"]
    return {
        "chunk_tokens": plan["chunk_tokens"], "predicted_mib": round(plan["predicted_bytes"] / 2**20, 1), "plan": plan,
        "resolved_backend": result.record["attention_backend"], "kl_backend": result.record["kl_backend"],
        "rescored": 0, "spot_check_max_abs_nats": result.record.get("spot_check_max_abs"), **_layers(result),
    }  # fmt: skip


def _layers(result) -> dict:
    """Which way rows passed the decoder layers, and why not the fused one."""
    return {name: result.record[name] for name in ("layers", "layers_why") if name in result.record}


def _run_own_layers(
    session, case: ScanCase, token_ids, units, common, check: Callable, ours_s: float | None
) -> None:
    """The same scan through the model's own decoder layers: what the fused ones save."""
    if session.left_s < 3 * (ours_s or 0.0):
        raise NotMeasured(f"{session.left_s:.0f} s of the budget are left")
    how = dict(layers="model", progress=False, rescored=0)
    model = session.model(session.shape(case.shape))
    shipsfast.scan(model, token_ids, heads=[units[0], units[-1]], **how)
    before = reset_peak(session.device)
    taken, result = seconds(lambda: shipsfast.scan(model, token_ids, **how), session.device)
    session.write(
        case.name,
        OWN_LAYERS,
        common | how_it_ran(result) | check(result) | {
            "median_s": round(taken, 4), "runs": 1, "scan_median_s": round(result.record["scan_seconds"], 4),
            "share_of_floor": round(common["floor_s"] / taken, 4) if "floor_s" in common else None,
            "times_slower_than_shipsfast": round(taken / ours_s, 3) if ours_s else None,
            "scores_per_s": round(common["scores"] / taken, 1), "peak_mib": peak_mib(session.device, before),
        },
    )  # fmt: skip


def _run_peers(session, case: ScanCase, shape, token_ids, common, ours_s, scores) -> None:
    """ours_s and scores are None where our own scan failed."""

    def write(name: str, found: peers.Measured, more: dict) -> None:
        rms = None
        if scores is not None:
            differences = [
                value - scores[p, layer, head] for ((layer, head), p), value in found.scores.items()
            ]
            rms = float(f"{_rms(np.array(differences)):.4g}")
        session.write(
            case.name,
            name,
            common
            | {
                "median_s": round(found.seconds, 4), "runs": 1,
                "share_of_floor": round(common["floor_s"] / found.seconds, 4) if "floor_s" in common else None,
                "times_slower_than_shipsfast": round(found.seconds / ours_s, 3) if ours_s else None,
                "scores_per_s": round(common["scores"] / found.seconds, 1), "rms_difference_nats": rms,
                "extrapolated_from": None if found.done == found.units else f"{found.done} of {found.units} passes",
            }
            | more,
        )  # fmt: skip

    for name, (batches, path) in PEERS.items():
        with session.guarded(case.name, name, common):
            before = reset_peak(session.device)
            found = path(
                session, session.model(shape), batches(token_ids, session.device), session.share_s(5)
            )
            write(name, found, {"peak_mib": peak_mib(session.device, before)})
        session.clear()
    with session.guarded(case.name, LOOP, common):
        exact = twin(session.model(shape), torch.float32)
        write(LOOP, peers.one_at_a_time(session, exact, token_ids, session.share_s(4)), {"dtype": "float32"})
        del exact
    session.clear()


SAHARA = "llama2-7b-sahara"
STEPS = 3


def run_sahara(session: Session) -> None:
    """A dataset-level scan and a search of three heads beside a KL scan of the same prompts, which is run here too."""
    case = SCANS["llama2-7b-short"]
    shape, prompts = session.shape(case.shape), session.prompts(case.prompts)
    token_ids = prompts.token_ids(shape.vocabulary)
    common = {"dtype": "bfloat16", "prompts": len(token_ids), "shared_tokens": prompts.shared}
    model = session.model(shape)
    quiet = dict(progress=False, rescored=0)
    paths = {
        "KL scan": lambda: shipsfast.scan(model, token_ids, **quiet),
        "dataset-level scan": lambda: shipsfast.scan_dataset(model, token_ids, **quiet),
        f"{STEPS} Sahara steps": lambda: shipsfast.sahara(model, token_ids, group_size=STEPS, **quiet),
    }
    taken: dict[str, float] = {}
    for name, path in paths.items():
        with session.guarded(SAHARA, name, common), alarms_off():
            if session.left_s < 1.5 * STEPS * taken.get("KL scan", 0.0) and name == list(paths)[-1]:
                raise NotMeasured(f"{session.left_s:.0f} s of the budget are left")
            few = [(0, 0), (shape.layers - 1, 0)]
            warm = shipsfast.scan if name == "KL scan" else shipsfast.scan_dataset
            warm(model, token_ids, heads=few, **quiet)
            before = reset_peak(session.device)
            taken[name], result = seconds(path, session.device)
            ratio = taken[name] / taken["KL scan"] if "KL scan" in taken else None
            figures = common | {
                "median_s": round(taken[name], 4), "runs": 1, "peak_mib": peak_mib(session.device, before),
                "scans": None if ratio is None else round(ratio, 3),
                "resolved_backend": result.record["attention_backend"],
                "step_seconds": result.record.get("step_seconds"),
            }  # fmt: skip
            if name == "KL scan":  # held against float32 in its own case
                session.write(SAHARA, name, figures)
            else:
                row = session.write_unchecked(SAHARA, name, figures)
                session.settle(row, session.checked(lambda: _angles_checked(model, token_ids, result)))  # noqa: B023
        session.clear()


def _angles_checked(model, token_ids, result) -> dict:
    """Angles of a few heads against a float32 twin of the model, by torch attention; ranks, for angles have no scale
    that tells good from bad."""
    heads = [
        tuple(h)
        for h in np.argwhere(np.isfinite(_first(result)))[:: max(1, _first(result).size // 8)].tolist()
    ]
    gc.collect()
    exact = twin(model, torch.float32)
    expected = shipsfast.scan_dataset(
        exact, token_ids, heads=heads, backend="torch", progress=False, rescored=0
    ).angle_deg
    plain = shipsfast.scan_dataset(
        model, token_ids, heads=heads, backend="torch", progress=False, rescored=0
    ).angle_deg
    at = tuple(np.array(heads).T)
    error, allowed = _rms(_first(result)[at] - expected[at]), FACTOR * _rms(plain[at] - expected[at]) + 1e-3
    wrong = None
    if not error <= allowed:
        wrong = f"angles differ from float32 by {error:.3g} degrees (rms), allowed are {allowed:.3g}"
    return {
        "check": verdict(wrong), "rms_error_deg": float(f"{error:.4g}"),
        "checked_against": f"float32, {len(heads)} heads",
    }  # fmt: skip


def _first(result) -> np.ndarray:
    return result.angle_deg if result.angle_deg.ndim == 2 else result.angle_deg[0]
