"""What commands print of a result, and what they write of it."""

from __future__ import annotations

import json
from pathlib import Path

from .asked import Asked, as_it_lies


def show_result(result, top: int, asked: Asked) -> None:
    """A table, or JSON, and the plots that were asked for."""
    from ..results.tables import as_json, show

    plot, out = asked.given.get("plot"), asked.given["out"]
    _plot(result, plot)
    if asked.given["json"]:
        show_json(as_json(result, top, out))
        return
    show(result, top, out)
    if asked.before is not None and asked.before == as_it_lies(out):
        print("(it was complete: loaded, nothing was run)")


def show_contrast(result, top: int, plot: Path | None, asked_json: bool) -> None:
    """The same of a contrast, which has no run folder of its own."""
    from rich.console import Console

    _plot(result, plot)
    if asked_json:
        show_json(result.as_json(top))
    else:
        result.show(top, Console(highlight=False))


def _plot(result, plot: Path | None) -> None:
    """Its plot, and numbered ones of further metrics."""
    if plot is None:
        return
    result.plot(plot)
    for number, other in enumerate(getattr(result, "also", {}).values(), 2):
        other.plot(plot.with_stem(f"{plot.stem}-{number}"))
    if getattr(result, "control", None) is not None:
        _plot(result.contrast(), plot.with_stem(f"{plot.stem}-contrast"))


def show_report(report, asked_json: bool) -> None:
    """What has to_json() and render()."""
    if asked_json:
        show_json(report.to_json())
    else:
        print(report.render())


def show_json(value) -> None:
    print(json.dumps(value, indent=1))
