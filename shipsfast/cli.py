"""The command line. Results go to stdout, progress and errors to stderr; bad input exits with status 2.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import json as json_module
import os
import sys
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

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many heads to list.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.command()
def scan(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompts: Annotated[Path, typer.Argument(help="Prompt file: csv, jsonl, parquet or txt.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder to write; an unfinished one is continued.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            help="chat, query-answer, none, or a text with {prompt}. auto: chat if the tokenizer has one."
        ),
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    ablation: Annotated[
        str, typer.Option(help="undifferentiated, uniform, scale or zero.")
    ] = "undifferentiated",
    scale: Annotated[str, typer.Option(help="eps of undifferentiated and scale.")] = "1e-5",
    heads: Annotated[
        str | None, typer.Option(help="Only these: LAYER-HEAD or LAYER, comma-separated.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Attention: auto, triton, torch or reference.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default cuda where there is one.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory to use beyond the model, such as 8GiB; default what is free.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the heatmap here (png, svg or pdf).")] = None,
    top: Top = 10,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every attention head of MODEL on PROMPTS (Ships: KL of the next token, in nats)."""
    from .prompts import load_prompts

    texts = load_prompts(prompts, column)[:limit]
    eps = _number(scale, "--scale")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: expected a name ending in .png, .svg or .pdf")
    for path in (plot, out):
        _check_place(path)
    _quiet_transformers()
    from .ablation import Ablation, parse_heads
    from .loading import load_model, load_tokenizer
    from .planner import parse_bytes
    from .ships import scan as run_scan

    how = Ablation(ablation, eps)
    chosen = None if heads is None else parse_heads(heads)
    limit_bytes = None if max_memory is None else parse_bytes(max_memory)
    tokenizer = load_tokenizer(model)
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "none"
    loaded = load_model(model, dtype=dtype, device=device)
    result = run_scan(
        loaded, texts, tokenizer, template=template, ablation=how, heads=chosen, backend=backend, out=out,
        progress=not quiet, max_memory=limit_bytes,
    )  # fmt: skip
    if plot is not None:
        result.plot(plot)
    _show(result, top, json, out)


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


def _show(result, top: int, json: bool, out: Path | None) -> None:
    from .tables import ranking, ranking_json

    if json:
        print(json_module.dumps(ranking_json(result, top, out), indent=1))
    else:
        ranking(result, top, out)


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
