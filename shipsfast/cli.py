"""The command line. Results go to stdout, progress and errors to stderr; bad input exits with status 2.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import inspect
import json as json_module
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError

app = typer.Typer(
    name="shipsfast",
    help="Find the attention heads that carry a language model's behaviour: switch each one off, measure what changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[str, typer.Argument(help="Model folder or hub id.")]
PromptFile = Annotated[Path, typer.Argument(help="Prompt file: csv, jsonl, parquet or txt.")]
Out = Annotated[Path | None, typer.Option(help="Run folder to write; an unfinished one is continued.")]
Template = Annotated[
    str,
    typer.Option(
        help="chat, query-answer, none, or a text with {prompt}. auto: chat if the tokenizer has one."
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the prompts.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")]
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
Dtype = Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default cuda where there is one.")]
MaxMemory = Annotated[
    str | None, typer.Option(help="Memory to use beyond the model, such as 8GiB; default what is free.")
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


SCAN_ARGUMENTS = {"model": ModelName, "prompts": PromptFile}
SCAN_OPTIONS = {
    "out": (Out, None),
    "template": (Template, "auto"),
    "column": (Column, None),
    "limit": (Limit, None),
    "ablation": (HowAblated, "undifferentiated"),
    "scale": (Scale, "1e-5"),
    "source": (Source, None),
    "heads": (Heads, None),
    "unit": (Unit, "head"),
    "backend": (Backend, "auto"),
    "dtype": (Dtype, "auto"),
    "device": (Device, None),
    "max_memory": (MaxMemory, None),
    "plot": (Plot, None),
    "json": (Json, False),
    "quiet": (Quiet, False),
}


def _scan_command(function: Callable) -> Callable:
    """A command with the arguments and options of every scan beside its own.

    `function` gets `load`, which loads the model and gives the arguments of a scan, and its own options; it returns
    the result and how many heads of it to list.
    """

    def command(**given) -> None:
        shared = {name: given.pop(name) for name in (*SCAN_ARGUMENTS, *SCAN_OPTIONS)}
        json = shared.pop("json")
        result, top = function(_checked(**shared), **given)
        _show(result, top, json, shared["out"], shared["plot"])

    def parameter(name: str, kind, default=inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    parameters = [
        *(parameter(name, kind) for name, kind in SCAN_ARGUMENTS.items()),
        *(parameter(p.name, p.annotation, p.default) for p in own),
        *(parameter(name, kind, default) for name, (kind, default) in SCAN_OPTIONS.items()),
    ]
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command("scan")
@_scan_command
def scan(load: Callable[[], dict], metric: MetricNames = ("kl",), top: Top = 10):
    """Score every attention head of MODEL on PROMPTS (Ships: KL of the next token, in nats)."""
    from .metrics import parse_metric
    from .ships import scan as run

    chosen = [parse_metric(each) for each in metric]
    return run(**load(), metric=chosen), top


@app.command("scan-dataset")
@_scan_command
def scan_dataset(load: Callable[[], dict], rank: Rank = 1, top: Top = 10):
    """Score every head by how far it turns the subspace PROMPTS span (dataset-level Ships, in degrees)."""
    from .dataset import scan_dataset as run

    return run(**load(), rank=rank), top


@app.command("sahara")
@_scan_command
def sahara(
    load: Callable[[], dict],
    group_size: Annotated[int, typer.Option(min=1, help="How many heads to find.")] = 3,
    rank: Rank = 1,
    beam: Annotated[int, typer.Option(min=1, help="Groups kept after every step; 1 is the paper's.")] = 1,
):
    """Find the group of heads that carries the answers to PROMPTS, greedily (Sahara)."""
    from .greedy import sahara as run

    return run(**load(), group_size=group_size, rank=rank, beam=beam), group_size


def _checked(
    model, prompts, column, limit, template, ablation, scale, source, heads, unit, backend, dtype, device, max_memory,
    out, plot, quiet,
):  # fmt: skip
    """Check the options, cheapest first; the function returned loads the model and gives the arguments of a scan."""
    from .prompts import load_prompts

    texts = load_prompts(prompts, column)[:limit]
    eps = _number(scale, "--scale")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: expected a name ending in .png, .svg or .pdf")
    for path in (plot, out):
        _check_place(path)
    others = (
        None if source is None else load_prompts(source, column)[: limit if ablation == "resample" else None]
    )
    _quiet_transformers()
    from .ablation import Ablation, parse_heads
    from .loading import load_model, load_tokenizer
    from .planner import parse_bytes

    if ablation == "resample" and others is None:
        raise InputError("--ablation resample needs --source, a file of prompts to take outputs from")
    how = Ablation(ablation, eps, None if others is None else tuple(others))
    chosen = None if heads is None else parse_heads(heads)
    limit_bytes = None if max_memory is None else parse_bytes(max_memory)

    def load() -> dict:
        tokenizer = load_tokenizer(model)
        wrapped = template
        if template == "auto":
            wrapped = "chat" if getattr(tokenizer, "chat_template", None) else "none"
        return {
            "model": load_model(model, dtype=dtype, device=device), "prompts": texts, "tokenizer": tokenizer,
            "template": wrapped, "ablation": how, "heads": chosen, "unit": unit.replace("-", "_"), "backend": backend,
            "out": out, "progress": not quiet, "max_memory": limit_bytes,
        }  # fmt: skip

    return load


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the heatmap and the completions.")] = Path(
        "demo-run"
    ),
    quiet: Quiet = False,
) -> None:
    """Scan the small model that comes with shipsfast, and show what its top head does."""
    _check_place(out / "run")
    _quiet_transformers()
    from .demo.run import run

    run(out, progress=not quiet)


@app.command()
def info(json: Json = False) -> None:
    """Say what is installed, what will run, and what is missing and why."""
    from .info import describe, render

    facts = describe()
    print(json_module.dumps(facts, indent=1) if json else render(facts))


def _show(result, top: int, json: bool, out: Path | None, plot: Path | None) -> None:
    from .tables import as_json, show

    if plot is not None:
        result.plot(plot)
        for number, other in enumerate(getattr(result, "also", {}).values(), 2):
            other.plot(plot.with_stem(f"{plot.stem}-{number}"))
    if json:
        print(json_module.dumps(as_json(result, top, out), indent=1))
    else:
        show(result, top, out)


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number, got {text!r}") from None


def _check_place(path: Path | None) -> None:
    """A result that cannot be written is refused before it is computed."""
    if path is None:
        return
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {path}: {parent} is not a folder that can be written to")
    if path.suffix.lower() in (".png", ".svg", ".pdf") and not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def _quiet_transformers() -> None:
    """Bad input is told once, by us; progress bars of loading are noise beside ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Entry point. Exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # typer's own for Ctrl-C, which says nothing
            _fail("interrupted")
        raise
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = f" ({error.filename})" if error.filename else ""
        kept = "; what was finished is kept, run again to continue" if "--out" in sys.argv else ""
        sys.exit(_fail(f"cannot read or write{where}: {error.strerror}{kept}"))


def _fail(message: str) -> int:
    print(f"shipsfast: {' '.join(message.split())}", file=sys.stderr)
    return 2
