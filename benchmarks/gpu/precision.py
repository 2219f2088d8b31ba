"""What half precision costs a scan: rankings against float32 on the same weights, and with a half-precision head."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch
from scipy.stats import spearmanr

import shipsfast

from .alarms import alarms_off, refused
from .clock import seconds
from .rows import verdict
from .session import NotMeasured, Session
from .shapes import LLAMA2_7B, Prompts, twin

CASE = "precision-llama2-7b"
PROMPTS, QUICK_PROMPTS, TOP = Prompts(16, 5), Prompts(6, 5), 10


def precision(session: Session) -> None:
    """The model is drawn in bfloat16, so that all three hold the same numbers; float16 has them rounded no further
    than its range asks."""
    shape = session.shape(LLAMA2_7B)
    token_ids = session.prompts(QUICK_PROMPTS if session.quick else PROMPTS).token_ids(shape.vocabulary)
    common = {"prompts": len(token_ids)}
    reference, paths = None, {
        "float32": (torch.float32, True), "bfloat16": (torch.bfloat16, True), "float16": (torch.float16, True),
        "bfloat16, its own head": (torch.bfloat16, False), "float16, its own head": (torch.float16, False),
        "bfloat16, float32 residual stream": (torch.bfloat16, True),
        "float16, float32 residual stream": (torch.float16, True),
    }  # fmt: skip
    for name, (dtype, wide_head) in paths.items():
        layers = "fused_fp32_residual" if "residual" in name else "auto"
        if not wide_head and session.device.type == "cpu":  # whose fused layers leave with float32
            layers = "model"
        row = common | {
            "dtype": str(dtype).removeprefix("torch."),
            "head_precision": "float32" if wide_head else name.split(",")[0],
        }
        with session.guarded(CASE, name, row):
            if name != "float32" and reference is None:
                raise NotMeasured("there is no float32 scan to compare with")
            if "residual" in name and session.device.type != "cuda":
                raise NotMeasured("a float32 residual stream goes through Triton")
            model = session.model(shape)
            if dtype != session.dtype:
                model = twin(model, dtype)
            with alarms_off(), contextlib.nullcontext() if wide_head else _model_head():
                shipsfast.scan(
                    model,
                    token_ids[:1],
                    heads=[(0, 0), (shape.layers - 1, 0)],
                    layers=layers,
                    progress=False,
                    rescored=0,
                )
                taken, result = seconds(
                    lambda model=model, layers=layers: shipsfast.scan(
                        model, token_ids, layers=layers, progress=False, rescored=0
                    ),
                    session.device,
                )
            del model
            if name == "float32":
                reference = result
            session.write(
                CASE,
                name,
                row | {"median_s": round(taken, 4), "runs": 1, "noise_floor_nats": float(f"{result.record['packing_noise']:.4g}"),
                "resolved_backend": result.record["attention_backend"], "layers": result.record["layers"]}
                | compared(result, reference, refused(result, dtype)),
            )  # fmt: skip
        session.clear()


def compared(result, reference, wrong: str | None) -> dict:
    """Rankings of heads by mean score, and single scores, against the reference's. How far they may differ is what is
    asked here: `check` fails only where a scan would have refused its result, `wrong`, or there is nothing to compare."""
    if not np.isfinite(result.kl).all():
        return {"check": verdict("a score is not a finite number")}
    mine, theirs = result.mean().ravel(), reference.mean().ravel()
    top = min(TOP, len(mine) - 1)
    best = lambda x: set(np.argsort(-x, kind="stable")[:top].tolist())
    return {
        "check": verdict(wrong),
        "top10_overlap": len(best(mine) & best(theirs)) / top,
        "spearman": round(float(spearmanr(mine, theirs).statistic), 5),
        "rms_error_nats": float(f"{np.sqrt(np.mean((result.kl - reference.kl) ** 2)):.4g}"),
        "rms_score_nats": float(f"{np.sqrt(np.mean(reference.kl**2)):.4g}"),
    }


@contextlib.contextmanager
def _model_head():
    """The output head as the model has it: its logits in half precision."""

    @contextlib.contextmanager
    def as_it_is(_model):
        yield

    with (
        mock.patch("shipsfast.engine.growing_batch.float32_head", as_it_is),
        mock.patch("shipsfast.scans.self_check.float32_head", as_it_is),
    ):
        yield
