"""Commands about finished work and this machine: contrast, demo, show, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, note
from .asked import check_picture, check_place, quiet_transformers
from .options import Json, Plot, Quiet, Top
from .shown import draw, show_contrast, show_json


def contrast(
    run_a: Annotated[Path, typer.Argument(help="Run folder of a scan, such as one of harmful prompts.")],
    run_b: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder of the same scan of other prompts, such as ordinary ones; default the control of RUN_A."
        ),
    ] = None,
    alternative: Annotated[
        str | None,
        typer.Option(
            help="Where heads are sought: greater (scores larger on RUN_A), less, or two-sided; default two-sided for metrics "
            "with a sign, else greater."
        ),
    ] = None,
    statistic: Annotated[
        str,
        typer.Option(
            help="What the permutation test goes by: auroc (of ranks: Mann and Whitney's) or difference (of means)."
        ),
    ] = "auroc",
    permutations: Annotated[
        int,
        typer.Option(min=1, help="Relabellings of the prompts that are drawn; all, where there are no more."),
    ] = 99_999,
    seed: Annotated[int, typer.Option(min=0, help="Of --permutations.")] = 0,
    top: Top = 10,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write the two maps and their difference here (png, svg or pdf)."),
    ] = None,
    json: Json = False,
) -> None:
    """Say which heads matter more on the prompts of RUN_A than on those of RUN_B, and which of them by chance."""
    check_picture(plot)
    from ..results.contrast import contrast as run

    result = run(
        run_a, run_b, alternative=alternative, statistic=statistic, permutations=permutations, seed=seed
    )
    show_contrast(result, top, plot, json)


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

    result = load(run)
    from ..results.tables import as_json
    from ..results.tables import show as print_it

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
