"""Arguments and options that commands share, and what is checked before a model is loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .checks import check_together, given_options

ModelName = Annotated[str, typer.Argument(help="Model folder or hub id.")]
PromptFile = Annotated[
    str,
    typer.Argument(
        help="Prompts: a csv, jsonl, parquet or txt file, or a data set of the hub, owner/name[:config[:split]]."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run folder to write; an unfinished one is continued.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Only go on with the unfinished run in --out; an error if none is there."),
]
Template = Annotated[
    str,
    typer.Option(
        help="chat, query-answer, none, or a text with {prompt}. auto: chat if the tokenizer has one."
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the prompts.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")]
Sample = Annotated[int | None, typer.Option(min=1, help="N prompts drawn at random.")]
Seed = Annotated[int, typer.Option(min=0, help="Of --sample, and of --do-sample.")]
HowAblated = Annotated[
    str,
    typer.Option(
        "--ablation",
        help="undifferentiated, uniform, scale, zero, head_mean_q, head_mean_k, head_mean_v, mean or resample.",
    ),
]
Scale = Annotated[str, typer.Option(help="eps of undifferentiated and scale.")]
Source = Annotated[
    Path | None,
    typer.Option(
        help="Prompt file for mean (default: PROMPTS) and resample (one prompt each, or one for all)."
    ),
]
Heads = Annotated[str | None, typer.Option(help="Only these: LAYER-HEAD or LAYER, comma-separated.")]
Unit = Annotated[str, typer.Option(help="What is switched off together: head or kv_group.")]
Rank = Annotated[int, typer.Option(min=1, help="Singular vectors that span the subspace.")]
Backend = Annotated[str, typer.Option(help="Attention: auto, triton, cpp, torch or reference.")]
Layers = Annotated[
    str,
    typer.Option(
        help="How rows pass a layer: auto, model (its own forward), fused (faster, where it can) or, for scans in half "
        "precision through Triton, fused_fp32_residual."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default cuda where there is one.")]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Run nothing: print plan, memory and time. config.json is enough.")
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(help="With --plan: what the device has in all, such as 80GiB; default what is free."),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read decoder layers from the checkpoint as they run: for models larger than the memory.",
    ),
]
MaxMemory = Annotated[
    str | None, typer.Option(help="Memory to use beyond the model, such as 8GiB; default what is free.")
]
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL, with all your rights."),
]
Plot = Annotated[Path | None, typer.Option(help="Write the heatmap here (png, svg or pdf).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many heads to list.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
MetricNames = Annotated[
    list[str],
    typer.Option(
        "--metric",
        help="kl, reverse_kl, js, total_variation, logit_diff:TOKEN,TOKEN or refusal_logit:TOKEN,TOKEN,...; may be "
        "given several times, for one pass that measures all (plots of all but the first get a number).",
    ),
]
NonFinite = Annotated[
    str,
    typer.Option(
        help="A score that is NaN or infinite: raise ends the run and says where it begins, mark leaves it out."
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Where a text ends at the latest.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Draw tokens instead of taking the likeliest.")]
TopK = Annotated[int, typer.Option(help="Tokens to draw from; 0: all.")]
Temperature = Annotated[float, typer.Option(help="Of the draws.")]
EndTokens = Annotated[
    list[str] | None,
    typer.Option(
        "--eos-token-id",
        help="Id of a token that ends a text, may be given several times, or none; default: as the model says.",
    ),
]
Groups = Annotated[
    str | None,
    typer.Option(
        help="Groups of heads to switch off, such as '2-26; 2-26,3-1'; 'none' is the unablated model."
    ),
]
JudgeName = Annotated[
    str,
    typer.Option("--judge", help="keywords, paper, classifier:PATH:LABEL or chat:PATH (a model on disk)."),
]
JudgeTemplate = Annotated[
    str | None,
    typer.Option(
        help="What a model judge is shown: a text with {completion}, or a file of it; {prompt} if it asks."
    ),
]
KeepText = Annotated[bool, typer.Option("--keep-text", help="Keep the answers in the run folder.")]
running: dict[str, Path | None] = {"out": None}  # where the command at work writes, for its last words
ARGUMENTS = {"model": ModelName, "prompts": PromptFile}
RUN_OPTIONS = {
    "out": (Out, None),
    "resume": (Resume, False),
    "template": (Template, "auto"),
    "column": (Column, None),
    "limit": (Limit, None),
    "sample": (Sample, None),
    "seed": (Seed, 0),
    "ablation": (HowAblated, "undifferentiated"),
    "scale": (Scale, "1e-5"),
    "source": (Source, None),
    "unit": (Unit, "head"),
    "backend": (Backend, "auto"),
    "layers": (Layers, "auto"),
    "dtype": (Dtype, "auto"),
    "device": (Device, None),
    "max_memory": (MaxMemory, None),
    "trust_remote_code": (RemoteCode, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
}
ANSWER_OPTIONS = {
    "max_new_tokens": (NewTokens, 128),
    "do_sample": (DoSample, False),
    "top_k": (TopK, 5),
    "temperature": (Temperature, 1.0),
    "eos_token_id": (EndTokens, None),
}
SCAN_OPTIONS = {"heads": (Heads, None), "plot": (Plot, None), "stream": (Stream, False)}
PLAN_OPTIONS = {"plan": (PlanOnly, False), "device_memory": (DeviceMemory, None)}


def command(*more: dict, without: tuple[str, ...] = ()) -> Callable:
    """A command with the arguments and options of every run, of `more`, and of its own.

    The function decorated gets `load`, which loads the model and gives the arguments of a run, `shared`, the options
    as given, and its own options. Where `more` has them, shared["answers"] are the settings of generation.
    """

    def decorate(function: Callable) -> Callable:
        options = {name: option for some in (*more, RUN_OPTIONS) for name, option in some.items()}
        options = {name: option for name, option in options.items() if name not in without}

        def run(context: typer.Context, **given) -> None:
            if "plan" in options:
                by_answers = given.get("rank_by") == "asr"
                check_together(given_options(context), plan=given["plan"], answers=by_answers)
            shared = {name: given.pop(name) for name in (*ARGUMENTS, *options)}
            running["out"] = shared.get("out")
            answers = {name: shared.pop(name) for name in ANSWER_OPTIONS if name in options}
            load = checked(**shared)
            if answers:
                answers["eos_token_id"] = _end_tokens(answers["eos_token_id"])
                shared["answers"] = answers | {"seed": shared["seed"]}
            shared["before"] = as_it_lies(shared.get("out"))
            function(load, shared, **given)

        def parameter(name: str, kind, default=inspect.Parameter.empty) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[2:]
        parameters = [
            parameter("context", typer.Context),
            *(parameter(name, kind) for name, kind in ARGUMENTS.items()),
            *(parameter(p.name, p.annotation, p.default) for p in own),
            *(parameter(name, kind, default) for name, (kind, default) in options.items()),
        ]
        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def checked(
    model, prompts, column, limit, sample, seed, template, ablation, scale, source, unit, backend, layers, dtype,
    device, max_memory, trust_remote_code, quiet, json, out=None, resume=False, heads=None, plot=None, stream=False,
    plan=False, device_memory=None,
) -> Callable[[], dict]:  # fmt: skip
    """Check the options, cheapest first; the function returned loads the model and gives the arguments of a run.

    `heads` is among them where the command has that option.
    """
    from ..prompts.datasets import load_prompts, sample_prompts

    texts = sample_prompts(load_prompts(prompts, column), limit, sample, seed)
    eps = _number(scale, "--scale")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: expected a name ending in .png, .svg or .pdf")
    for path in (plot, out):
        check_place(path)
    if resume:
        check_resume(out)
    others = None if source is None else load_prompts(source, column)
    if others is not None and ablation == "resample":
        others = sample_prompts(others, limit, sample, seed) if len(others) > 1 else others
    quiet_transformers()
    from ..engine.ablation import Ablation
    from ..engine.heads import parse_heads
    from ..engine.layer_path import check_layers
    from ..engine.memory_plan import parse_bytes
    from ..models.loading import load_model, load_tokenizer

    check_layers(layers)
    if ablation == "resample" and others is None:
        raise InputError("--ablation resample needs --source, a file of prompts to take outputs from")
    how = Ablation(ablation, eps, None if others is None else tuple(others))
    chosen = None if heads is None else parse_heads(heads)
    limit_bytes = None if max_memory is None else parse_bytes(max_memory)
    if device_memory is not None and not plan:
        raise InputError("--device-memory is for --plan: a scan is told what it may use with --max-memory")
    whole_bytes = None if device_memory is None else parse_bytes(device_memory)

    def load() -> dict:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        wrapped = template
        if template == "auto":
            wrapped = "chat" if getattr(tokenizer, "chat_template", None) else "none"
        if plan:
            from ..models.without_weights import hollow_model

            return {
                "model": hollow_model(model, dtype, trust_remote_code=trust_remote_code),
                "prompts": texts, "tokenizer": tokenizer, "template": wrapped, "backend": backend,
                "layers": layers, "ablation": how, "unit": unit.replace("-", "_"), "device": device, "max_memory": limit_bytes,
                "device_memory": whole_bytes, "stream": stream, "heads": chosen,
            }  # fmt: skip
        return {
            "model": load_model(
                model, dtype=dtype, device=device, stream=stream, trust_remote_code=trust_remote_code
            ),
            "prompts": texts, "tokenizer": tokenizer,
            "template": wrapped, "ablation": how, "unit": unit.replace("-", "_"), "backend": backend,
            "layers": layers, "out": out, "progress": not quiet, "max_memory": limit_bytes,
        } | ({} if heads is None else {"heads": chosen})  # fmt: skip

    return load


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number, got {text!r}") from None


def _end_tokens(given: list[str] | None) -> list[int] | None:
    """As `generate` takes them: None for those of the model, [] for none."""
    if not given or given == ["none"]:
        return None if not given else []
    try:
        return [int(each) for each in given]
    except ValueError:
        raise InputError(
            f"--eos-token-id must be whole numbers, or none alone, got {', '.join(given)}"
        ) from None


def as_it_lies(out: Path | None) -> tuple[int, int] | None:
    """What tells whether a run has written its manifest since: whoever does any work does."""
    from ..runs.manifest import MANIFEST

    if out is None or not (out / MANIFEST).is_file():
        return None
    found = (out / MANIFEST).stat()
    return found.st_ino, found.st_mtime_ns


def check_resume(out: Path | None) -> None:
    """Raises InputError unless there is a run to go on with."""
    from ..runs.manifest import BACKUP, MANIFEST, without_run

    if out is None:
        raise InputError("--resume goes on with the run in --out: give --out")
    if not any((out / name).is_file() for name in (MANIFEST, BACKUP)):
        raise InputError(
            f"--resume {out}: there is no run to go on with, {without_run(out)}; leave --resume away to begin one"
        )


def check_place(path: Path | None) -> None:
    """A result that cannot be written is refused before it is computed."""
    if path is None:
        return
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {path}: {parent} is not a folder that can be written to")
    if path.suffix.lower() in (".png", ".svg", ".pdf") and not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def quiet_transformers() -> None:
    """Bad input is told once, by us; progress bars of loading are noise beside ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
