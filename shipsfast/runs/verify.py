"""`shipsfast verify RUN`: is a run folder what its manifest says, and is all there?

Reads everything and writes nothing. The schema that is checked is that of docs/run-folders.md.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..text import counted, one_line
from .identity import beside, control_of
from .kinds import CONTROL, COUNTED, KINDS, LABELS, ROOMS, Table
from .lock import NAME as LOCK
from .manifest import ABLATIONS, BACKUP, FURTHER, MANIFEST, SCHEMA, Part, find_parts, read_manifest
from .part_file import COLUMNS, NLL, TEXT, read_table

if TYPE_CHECKING:
    import pandas as pd

LINK = ("is a link, which a run never makes", "take it away, and run the same command again")
CONTINUE = "run the same command again to continue"


def verify(folder: str | Path) -> dict:
    """A report: verdict "sound", "damaged" or "unfinished"; problems, leftovers and unfinished, lists of {path, what, do}.

    Raises InputError if there is no run at all, or one of another schema.
    """
    folder = Path(folder)
    report = {
        "run_folder": str(folder), "kind": None, "status": None, "schema": SCHEMA, "parts": 0, "rows": 0,
        "marked": 0,
        "problems": [], "unfinished": [], "leftovers": [],
    }  # fmt: skip
    _folder(folder, report)
    report["verdict"] = "damaged" if report["problems"] else "unfinished" if report["unfinished"] else "sound"
    return report


def _folder(folder: Path, report: dict, nested: bool = False) -> dict | None:
    """The identity of the run, where it can be read."""
    again = "run the same command again: it computes what is damaged anew"

    def problem(path: Path, what: str, do: str = again) -> None:
        _tell(report, "problems", path, what, do)

    try:
        manifest = read_manifest(folder)
    except InputError as error:
        damaged = getattr(error, "problem", None)
        if damaged is None and not nested:
            raise
        text = (damaged or str(error)).removeprefix(f"{folder / MANIFEST} ").removeprefix("is ")
        problem(folder / MANIFEST, text, str(error).rsplit(": ", 1)[-1])
        try:
            manifest = read_manifest(folder, name=BACKUP)
        except InputError:
            return None
    else:
        try:
            copy = read_manifest(folder, name=BACKUP)
        except InputError:
            copy = None
        if copy is None or (manifest.get("status") == "complete" and copy != manifest):
            what, do = "is not a sound copy of the manifest", "nothing: it is only a spare"
            _tell(report, "leftovers", folder / BACKUP, what, do)
    identity = manifest["identity"]
    if not nested:
        report["kind"], report["status"] = identity.get("kind"), manifest.get("status")
    if identity.get("kind") not in KINDS:
        problem(folder / MANIFEST, f"holds a run of kind {identity.get('kind')!r}", "choose another folder")
        return None
    try:
        tables = KINDS[identity["kind"]].tables(identity, manifest)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        problem(
            folder / MANIFEST,
            f"does not describe its run ({type(error).__name__}: {error})",
            "scan again into a new folder",
        )
        return None
    parts = find_parts(manifest)
    report["parts"] += len(parts)
    report["rows"] += sum(part.rows for part in parts if part.room in COUNTED)
    for room, table in tables.items():
        _room(folder, room, table, [p for p in parts if p.room == room], manifest, problem, report)
    for part in parts:
        if part.room not in tables:
            problem(folder / part.file, f"does not belong to a run of kind {identity['kind']}")
    if manifest.get("status") != "complete":
        _tell(report, "unfinished", folder, "the run is not finished", CONTINUE)
    _leftovers(folder, parts, manifest, problem, report)
    inner = [
        (folder / room / str(number), f"the scores of a further {name}", beside(identity, what, number))
        for what, room, name in (
            ("further_metrics", FURTHER, "metric"),
            ("further_ablations", ABLATIONS, "ablation"),
        )
        for number in range(1, 1 + len(identity.get(what, [])))
    ]
    if identity["kind"] == "ships" and identity.get("control") is not None:
        inner.append((folder / CONTROL, "the scan of the control prompts", control_of(identity)))
    for place, what, asked in inner:
        room = place if place.parent == folder else place.parent
        if room.is_symlink():  # which was told already
            continue
        if place.is_symlink():
            problem(place, *LINK)
        elif (place / MANIFEST).is_file() or (place / BACKUP).is_file():
            own = _folder(place, report, nested=True)
            if own and {name: own.get(name) for name in (asked if room == place else own)} != asked:
                problem(place, f"is not {what}", "delete it, and run the same command again")
        elif manifest.get("status") == "complete":
            problem(place, f"is missing: {what}")
        else:
            _tell(report, "unfinished", place, "was not begun", CONTINUE)
    return identity


def _tell(report: dict, where: str, path: Path, what: str, do: str) -> None:
    report[where].append({"path": str(path), "what": what, "do": do})


def _room(folder, room: str, table: Table, parts: list[Part], manifest: dict, problem, report: dict) -> None:
    seen, rows = set(), 0
    for part in parts:
        place = folder / part.file
        data, what = part.read(folder)
        if what:
            problem(place, what)
            continue
        try:
            frame = read_table(io.BytesIO(data), table.columns, only=True)
        except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            problem(place, f"is not the table that belongs there ({one_line(str(error))})")
            continue
        found = list(_faults(frame, table, part))
        for what in found:
            problem(place, what)
        if found:
            continue
        at = set(zip(*(frame[name].tolist() for name in table.index), strict=True))
        base = {(-1,) * len(table.index)} if table.lowest < 0 else set()
        twice = at & seen - base
        if twice or len(at) != len(frame):
            problem(place, "holds rows that are there twice")
        if table.marks:
            report["marked"] += int(frame[table.value].isna().sum())
        seen |= at
        rows += len(at - base)
    if table.expected is not None and rows < table.expected and not _known(report, folder / room):
        missing = table.expected - rows
        where = _first_missing(seen, table)
        what = f"{missing} of {table.expected} rows are missing{where}"
        if manifest.get("status") == "complete":
            problem(folder / room, what)
        else:
            _tell(report, "unfinished", folder / room, what, CONTINUE)


def _known(report: dict, room: Path) -> bool:
    """Is something in that room already known to be damaged, which explains what is missing?"""
    return any(Path(entry["path"]).parent == room for entry in report["problems"])


def _first_missing(seen: set, table: Table) -> str:
    full = math.prod(table.index.values())
    if table.expected != full:
        return ""
    first = next(at for at in np.ndindex(*table.index.values()) if at not in seen)
    return f", the first is {', '.join(f'{name} {i}' for name, i in zip(table.index, first, strict=True))}"


def _faults(frame: pd.DataFrame, table: Table, part: Part) -> Iterator[str]:
    if len(frame) != part.rows:
        yield f"has {len(frame)} rows, and {part.rows} were written"
    for name in frame:
        if COLUMNS[name] == TEXT and not all(isinstance(x, str) for x in frame[name]):
            yield f"column {name} has gaps"
            return
    for name, count in table.index.items():
        values = frame[name]
        outside = values[(values < table.lowest) | (values >= count)]
        if len(outside):
            yield f"column {name} has {outside.iloc[0]}, expected {table.lowest} to {count - 1}"
    if table.value is not None:
        values = frame[table.value].to_numpy()
        if values.dtype != np.float64:
            yield f"column {table.value} is of type {values.dtype}, expected float64"
        elif np.isnan(values).any() and not table.marks:
            yield f"column {table.value} has values that are not numbers"
        elif ((values < table.low) | (values > table.high)).any():
            yield f"column {table.value} has values outside {table.low:g} to {table.high:g}"
    if "label" in frame and not set(frame["label"]) <= set(LABELS):
        yield f"column label has {min(set(frame['label']) - set(LABELS))!r}, expected {', '.join(LABELS)}"
    if "num_tokens" in frame and (frame["num_tokens"] < 0).any():
        yield "column num_tokens has negative values"
    if NLL in frame and not (frame[NLL] >= 0).all():
        yield f"column {NLL} has values that are not numbers of at least 0"
    if "text_sha256" in frame and not all(re.fullmatch("[0-9a-f]{64}", x) for x in frame["text_sha256"]):
        yield "column text_sha256 has values that are no SHA-256"


def _leftovers(folder: Path, parts: list[Part], manifest: dict, problem, report: dict) -> None:
    listed = {part.file for part in parts}
    for room in (folder, *(folder / name for name in (*ROOMS, FURTHER, ABLATIONS))):
        if room.is_symlink():
            problem(room, *LINK)
            continue
        if not room.is_dir() or (room != folder and (room / MANIFEST).is_file()):  # a run of its own
            continue
        for file in sorted(room.iterdir()):
            what = None
            if file.name.startswith(".") and file.name.endswith(".tmp"):
                what = "was being written when the run was killed"
            elif file.name.endswith(".damaged"):
                what = "is a damaged part, set aside"
            elif file == folder / LOCK:
                what = "is the lock of a run that is at work, or was killed"
            elif file.match("part-*.parquet") and f"{room.name}/{file.name}" not in listed:
                what = "is not one of the parts that the manifest lists"
                if manifest.get("status") == "complete":
                    problem(file, what, "run the same command again, which removes it")
                    continue
            if what:
                do = "nothing: the next run clears it away"
                if what.startswith("is a damaged"):
                    do = "delete it when you have seen it"
                _tell(report, "leftovers", file, what, do)


def render(report: dict) -> str:
    """The report as lines for a person."""
    lines = []
    for name in ("problems", "unfinished", "leftovers"):
        lines += [one_line(f"{entry['path']}: {entry['what']}; {entry['do']}") for entry in report[name]]
    count = f"{counted(report['parts'], 'part')}, {counted(report['rows'], 'row')}"
    if report["marked"]:
        count += f", {report['marked']} of them marked as not finite"
    verdict = {
        "sound": f"sound and complete: every file is as it was written ({count})",
        "damaged": f"damaged: {len(report['problems'])} of its files or rows are not as they should be ({count})",
        "unfinished": f"not finished: what is there is sound ({count})",
    }[report["verdict"]]
    return "\n".join([*lines, one_line(f"{report['run_folder']} is {verdict}")])
