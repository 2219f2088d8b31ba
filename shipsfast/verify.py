"""`shipsfast verify RUN`: is a run folder what its manifest says, and is all there?

Reads everything and writes nothing. The schema that is checked is that of docs/run-folders.md.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import InputError
from .lock import NAME as LOCK
from .manifest import BACKUP, MANIFEST, ROOMS, SCHEMA, Part, find_parts, read_manifest
from .refusal import LABELS

KINDS = ("ships", "subspace", "sahara", "evaluate")
RANGE_DEG = 1e-6  # by how much rounding may carry an angle out of its range
ANSWER = {
    "group": "integer", "prompt": "integer", "label": "text", "num_tokens": "integer", "finished": "bool",
    "text_sha256": "text",
}  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """What the parts of a room hold. index: columns and how many values each may have, from `lowest`; value: the column
    of numbers, in [low, high]; expected: how many rows there are in the end, None where that is not known."""

    index: dict[str, int]
    value: str | None = None
    low: float = -np.inf
    high: float = np.inf
    expected: int | None = None
    lowest: int = 0
    columns: dict[str, str] | None = None


def verify(folder: str | Path) -> dict:
    """A report: verdict "sound", "damaged" or "unfinished"; problems, leftovers and unfinished, lists of {path, what, do}.

    Raises InputError if there is no run at all, or one of another schema.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and not (folder / BACKUP).is_file():
        raise InputError(f"{folder} is not a shipsfast run: it has no {MANIFEST}")
    report = {
        "run_folder": str(folder), "kind": None, "status": None, "schema": SCHEMA, "parts": 0, "rows": 0,
        "problems": [], "unfinished": [], "leftovers": [],
    }  # fmt: skip
    _folder(folder, report)
    report["verdict"] = "damaged" if report["problems"] else "unfinished" if report["unfinished"] else "sound"
    return report


def _folder(folder: Path, report: dict, nested: bool = False) -> None:
    again = "run the same command again: it computes what is damaged anew"

    def problem(path: Path, what: str, do: str = again) -> None:
        report["problems"].append({"path": str(path), "what": what, "do": do})

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
            return
    else:
        try:
            copy = read_manifest(folder, name=BACKUP)
        except InputError:
            copy = None
        if copy is None or (manifest.get("status") == "complete" and copy != manifest):
            report["leftovers"].append(
                {
                    "path": str(folder / BACKUP),
                    "what": "is not a sound copy of the manifest",
                    "do": "nothing: it is only a spare",
                }
            )
    identity = manifest["identity"]
    if not nested:
        report["kind"], report["status"] = identity.get("kind"), manifest.get("status")
    if identity.get("kind") not in KINDS:
        problem(folder / MANIFEST, f"holds a run of kind {identity.get('kind')!r}", "choose another folder")
        return
    try:
        tables = _tables(identity, manifest)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        problem(
            folder / MANIFEST,
            f"does not describe its run ({type(error).__name__}: {error})",
            "scan again into a new folder",
        )
        return
    parts = find_parts(manifest)
    report["parts"] += len(parts)
    report["rows"] += sum(part.rows for part in parts if part.room in ("scores", "completions"))
    for room, table in tables.items():
        _room(folder, room, table, [p for p in parts if p.room == room], manifest, problem, report)
    for part in parts:
        if part.room not in tables:
            problem(folder / part.file, f"does not belong to a run of kind {identity['kind']}")
    if manifest.get("status") != "complete":
        report["unfinished"].append(
            {
                "path": str(folder),
                "what": "the run is not finished",
                "do": "run the same command again to continue",
            }
        )
    _leftovers(folder, parts, manifest, problem, report)
    for number in range(1, 1 + len(identity.get("further_metrics", []))):
        place = folder / f"also/{number}"
        if (place / MANIFEST).is_file() or (place / BACKUP).is_file():
            _folder(place, report, nested=True)
        elif manifest.get("status") == "complete":
            problem(place, "is missing: the scores of a further metric")
        else:
            report["unfinished"].append(
                {"path": str(place), "what": "was not begun", "do": "run the same command again to continue"}
            )


def _tables(identity: dict, manifest: dict) -> dict[str, _Table]:
    """By room, what a run of this kind keeps there."""
    kind = identity["kind"]
    if kind == "evaluate":
        groups, prompts = len(identity["groups"]), len(identity["prompts"])
        text = {"text": "text"} if identity["keep_text"] else {}
        at = {"group": groups, "prompt": prompts}
        tables = {"completions": _Table(at, expected=groups * prompts, columns=ANSWER | text)}
        if identity["control"] is not None:
            ordinary = len(identity["control"]["prompts"])
            at = {"group": groups + 1, "prompt": ordinary}
            tables["control"] = _Table(at, expected=(groups + 1) * ordinary, columns=ANSWER | text)
            at = {"group": groups, "prompt": ordinary}
            tables["scores"] = _Table(at, "kl_nats", -1e-3, expected=groups * ordinary)
        return tables
    prompts, layers, heads = (int(n) for n in identity["shape"])
    units = layers * heads if identity["heads"] == "all" else len(identity["heads"])
    grid = {"layer": layers, "head": heads}
    if kind == "ships":
        name = identity["metric"]["name"]
        low = {"kl": -1e-3, "asr": 0.0}.get(name, -np.inf)
        at = {"prompt": prompts} | grid
        column = "kl_nats" if name == "kl" else "score"
        tables = {"scores": _Table(at, column, low, 1.0 if name == "asr" else np.inf, prompts * units)}
        if name == "asr":
            text = {"text": "text"} if identity["keep_text"] else {}
            at = {"group": 1 + units, "prompt": prompts}
            tables["completions"] = _Table(at, expected=(1 + units) * prompts, columns=ANSWER | text)
        return tables
    rank = int(identity["rank"])
    most = 90.0 * rank + RANGE_DEG
    basis = _Table({"prompt": prompts, "vector": rank}, "value", -1.0 - 1e-9, 1.0 + 1e-9, prompts * rank)
    if kind == "subspace":
        at, expected = grid, units
    else:
        size, beam = int(identity["group_size"]), int(identity["beam"])
        at = {"step": size, "beam": beam} | grid
        # Every group of the beam leaves out its own heads; there is one group in the first step.
        filled = [1] + [min(beam, _sets(units, step)) for step in range(1, size)]
        expected = sum(groups * (units - step) for step, groups in enumerate(filled))
    tables = {"scores": _Table(at, "angle_deg", -RANGE_DEG, most, expected), "basis": basis}
    tables["grams"] = _Table(at, lowest=-1, columns={"gram": "list"})
    return tables


def _sets(units: int, size: int) -> int:
    """How many sets of `size` units there are."""
    return math.comb(units, size)


def _room(folder, room: str, table: _Table, parts: list[Part], manifest: dict, problem, report: dict) -> None:
    seen, rows = set(), 0
    for part in parts:
        place = folder / part.file
        data, what = part.read(folder)
        if what:
            problem(place, what)
            continue
        try:
            frame = pd.read_parquet(io.BytesIO(data))
        except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            problem(place, f"is no table ({' '.join(str(error).split())})")
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
        seen |= at
        rows += len(at - base)
    if table.expected is not None and rows < table.expected and not _known(report, folder / room):
        missing = table.expected - rows
        where = _first_missing(seen, table)
        what = f"{missing} of {table.expected} rows are missing{where}"
        if manifest.get("status") == "complete":
            problem(folder / room, what)
        else:
            report["unfinished"].append(
                {"path": str(folder / room), "what": what, "do": "run the same command again to continue"}
            )


def _known(report: dict, room: Path) -> bool:
    """Is something in that room already known to be damaged, which explains what is missing?"""
    return any(Path(entry["path"]).parent == room for entry in report["problems"])


def _first_missing(seen: set, table: _Table) -> str:
    full = int(np.prod(list(table.index.values())))
    if table.expected != full:
        return ""
    first = next(at for at in np.ndindex(*table.index.values()) if at not in seen)
    return f", the first is {', '.join(f'{name} {i}' for name, i in zip(table.index, first, strict=True))}"


def _faults(frame: pd.DataFrame, table: _Table, part: Part) -> Iterator[str]:
    types = dict.fromkeys(table.index, "integer") | (table.columns or {})
    if table.value is not None:
        types[table.value] = "float64"
    if list(frame.columns) != list(types):
        yield f"has the columns {', '.join(map(str, frame.columns))}, expected {', '.join(types)}"
        return
    if len(frame) != part.rows:
        yield f"has {len(frame)} rows, and {part.rows} were written"
    for name, kind in types.items():
        if not _is(frame[name], kind):
            yield f"column {name} is of type {frame[name].dtype}, expected {kind}"
            return
    for name, count in table.index.items():
        values = frame[name]
        outside = values[(values < table.lowest) | (values >= count)]
        if len(outside):
            yield f"column {name} has {outside.iloc[0]}, expected {table.lowest} to {count - 1}"
    if table.value is not None:
        values = frame[table.value].to_numpy()
        if np.isnan(values).any():
            yield f"column {table.value} has values that are not numbers"
        elif ((values < table.low) | (values > table.high)).any():
            yield f"column {table.value} has values outside {table.low:g} to {table.high:g}"
    if "label" in types and not set(frame["label"]) <= set(LABELS):
        yield f"column label has {min(set(frame['label']) - set(LABELS))!r}, expected {', '.join(LABELS)}"
    if "num_tokens" in types and (frame["num_tokens"] < 0).any():
        yield "column num_tokens has negative values"
    if "text_sha256" in types and not all(re.fullmatch("[0-9a-f]{64}", x) for x in frame["text_sha256"]):
        yield "column text_sha256 has values that are no SHA-256"


def _is(column: pd.Series, kind: str) -> bool:
    if kind == "integer":
        return pd.api.types.is_integer_dtype(column.dtype)
    if kind == "bool":
        return pd.api.types.is_bool_dtype(column.dtype)
    if kind == "float64":
        return column.dtype == np.float64
    if kind == "list":
        return all(isinstance(x, np.ndarray) for x in column)
    return all(isinstance(x, str) for x in column)


def _leftovers(folder: Path, parts: list[Part], manifest: dict, problem, report: dict) -> None:
    listed = {part.file for part in parts}
    for room in (folder, *(folder / name for name in ROOMS)):
        if room.is_symlink():
            problem(
                room, "is a link, which a run never makes", "take it away, and run the same command again"
            )
            continue
        if not room.is_dir():
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
                    problem(file, what, "take it away")
                    continue
            if what:
                do = "nothing: the next run clears it away"
                if what.startswith("is a damaged"):
                    do = "delete it when you have seen it"
                report["leftovers"].append({"path": str(file), "what": what, "do": do})


def render(report: dict) -> str:
    """The report as lines for a person."""
    lines = []
    for name in ("problems", "unfinished", "leftovers"):
        lines += [f"{entry['path']}: {entry['what']}; {entry['do']}" for entry in report[name]]
    count = f"{report['parts']} parts, {report['rows']} rows"
    verdict = {
        "sound": f"sound and complete: every file is as it was written ({count})",
        "damaged": f"damaged: {len(report['problems'])} of its files or rows are not as they should be ({count})",
        "unfinished": f"not finished: what is there is sound ({count})",
    }[report["verdict"]]
    return "\n".join([*lines, f"{report['run_folder']} is {verdict}"])
