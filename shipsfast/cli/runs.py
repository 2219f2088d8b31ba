"""Commands about finished work and this machine: demo, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .asked import check_place, quiet_transformers
from .options import Json, Quiet
from .shown import show_json


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
