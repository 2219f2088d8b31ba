"""What commands print of a result, and what they write of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .asked import Asked, as_it_lies


def show_result(result, top: int, asked: Asked) -> None:
    """A table, or JSON, and the plots that were asked for."""
    from ..results.tables import as_json, show

    plot, out = asked.given.get("plot"), asked.given["out"]
    record_groups(result, asked)
    draw(result, plot)
    if asked.given["json"]:
        show_json(as_json(result, top, out))
        return
    show(result, top, out)
    if asked.before is not None and asked.before == as_it_lies(out):
        print("(it was complete: loaded, nothing was run)")


def record_groups(result, asked: Asked) -> None:
    """The groups that --group-by names, of a run that was finished without them or with others: into its record."""
    groups, out = asked.prompts_from.get("group_by"), asked.given["out"]
    before = result.record.get("prompts_from") or {}
    if groups is None or before.get("group_by") == groups:
        return
    from ..runs.folder import RunFolder

    for place, each in _folders(result, out):
        each.record["prompts_from"] = (each.record.get("prompts_from") or {}) | {"group_by": groups}
        folder = RunFolder(place, each.identity, each.record)
        try:
            folder.update(prompts_from=each.record["prompts_from"])
        finally:
            folder.close()


def _folders(result, out: Path) -> Iterator[tuple[Path, object]]:
    """A result, and those of further metrics and ablations, with the folders that they lie in."""
    from ..results.ships import ablation_place, also_place

    for number, main in enumerate([result, *getattr(result, "further", ())]):
        place = out / ablation_place(number) if number else out
        for at, each in enumerate([main, *getattr(main, "also", {}).values()]):
            yield place / also_place(at) if at else place, each


def draw(result, path: Path | None) -> None:
    """Its map; beside it, with numbers, those of further metrics, and, where prompts have groups, the maps of these."""
    if path is None:
        return
    from ..results.groups import recorded

    for number, each in enumerate([result, *getattr(result, "also", {}).values()], 1):
        place = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        each.plot(place)
        if hasattr(each, "by_group") and recorded(each.record) is not None:
            each.by_group().plot(place.with_stem(f"{place.stem}-groups"))
        for kind, dose in getattr(each, "doses", {}).items():
            if dose.heads:
                dose.plot(place.with_stem(f"{place.stem}-dose-{kind.replace(' ', '-')}"))
    if getattr(result, "control", None) is not None:
        draw(result.contrast(), path.with_stem(f"{path.stem}-contrast"))


def show_contrast(result, top: int, plot: Path | None, asked_json: bool) -> None:
    """The same of a contrast, which has no run folder of its own."""
    from rich.console import Console

    draw(result, plot)
    if asked_json:
        show_json(result.as_json(top))
    else:
        result.show(top, Console(highlight=False))


def show_report(report, asked_json: bool) -> None:
    """What has to_json() and render()."""
    if asked_json:
        show_json(report.to_json())
    else:
        print(report.render())


def show_json(value) -> None:
    print(json.dumps(value, indent=1))
