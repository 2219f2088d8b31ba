"""What commands print of a result, and what they write of it."""

from __future__ import annotations

import json

from .asked import Asked, as_it_lies


def show_result(result, top: int, asked: Asked) -> None:
    """A table, or JSON, and the plots that were asked for."""
    from ..results.tables import as_json, show

    plot, out = asked.given.get("plot"), asked.given["out"]
    if plot is not None:
        result.plot(plot)
        for number, other in enumerate(getattr(result, "also", {}).values(), 2):
            other.plot(plot.with_stem(f"{plot.stem}-{number}"))
    if asked.given["json"]:
        show_json(as_json(result, top, out))
        return
    show(result, top, out)
    if asked.before is not None and asked.before == as_it_lies(out):
        print("(it was complete: loaded, nothing was run)")


def show_report(report, asked_json: bool) -> None:
    """What has to_json() and render()."""
    if asked_json:
        show_json(report.to_json())
    else:
        print(report.render())


def show_json(value) -> None:
    print(json.dumps(value, indent=1))
