"""Commands about finished work and this machine: demo, show, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, note
from .asked import check_picture, check_place, quiet_transformers
from .options import Json, Plot, Quiet, Top
from .shown import draw, show_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the heatmap and the completions.")] = Path(
        "demo-run"
    ),
    quiet: Quiet = False,
) -> None:
    """Scan the small model that comes with shipsfast, and show what its top head does."""
    check_place(out / "run")
    quiet_transformers()
    from ..demo.run import run

    run(out, progress=not quiet)


def show(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    top: Top = 10,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Show what a run folder holds, as the command that wrote it did; groups of prompts (--group-by) too."""
    check_picture(plot)
    from ..results.load import load
    from ..results.tables import as_json
    from ..results.tables import show as print_it

    result = load(run)
    if plot is not None and not hasattr(result, "plot"):
        raise InputError(f"{run} holds whole answers, which have no map of heads: leave --plot away")
    if result.record.get("status") not in (None, "complete"):
        note(f"{run} is not finished: heads without a score on every prompt are left out")
    draw(result, plot)
    show_json(as_json(result, top, run)) if json else print_it(result, top, run)


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: Json = False,
) -> None:
    """Check every file of a run folder: what is damaged, what is missing, what to do.

    Exit status: 0 sound and complete, 1 damaged or not finished, 2 no run.
    """
    from ..runs.verify import render, verify

    report = verify(run)
    show_json(report) if json else print(render(report))
    if report["verdict"] != "sound":
        raise typer.Exit(1)


def info(json: Json = False) -> None:
    """Say what is installed, what will run, and what is missing and why."""
    from .info import describe, render

    facts = describe()
    show_json(facts) if json else print(render(facts))
