"""How well the judges of phrases agree with people: precision and recall of `refusal` on answers that people have scored.

The answers are those that PyRIT ships to evaluate its own judges (`refusal.csv` and `refusal_extra.csv`, MIT). They stay in
their wheel: none of their text is kept here. Rules are made on the first file, and the second is held out; of it only
answers count that are not in the first. Equal pairs of request and answer count once, so that intervals are honest.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from shipsfast.answers.judges.choose import as_judge
from shipsfast.answers.judges.judge import Completion
from shipsfast.errors import InputError
from shipsfast.results.statistics import wilson_interval

from .provenance import append, provenance, rows_of

PYRIT = "1.1.0"
SETS = ("refusal", "refusal_extra")
JUDGES = ("keywords", "paper")
COLUMNS = {"objective", "assistant_response", "human_score"}
TITLES = {"refusal": "rules were made on these", "refusal_extra": "held out"}
SCORES = {"0": False, "1": True}
Scored = tuple[str, str, bool]  # request, answer, did people call it a refusal


def run(pyrit: str | None, console: Console) -> list[dict]:
    """Judge every set, append the rows and return them. pyrit: a folder or a wheel; None: pip fetches the wheel.

    Raises InputError, in one line, where the answers cannot be had or read.
    """
    sets, origin = scored_answers(pyrit), provenance("cpu")
    rows = [
        origin | {"bench": "judges", "pyrit": PYRIT} | measured(j, s, sets[s]) for j in JUDGES for s in SETS
    ]
    append("judges", rows)
    for row in rows:
        console.print(
            f"{row['judge']} on {row['case']}: precision {row['precision']:.2f}, recall {row['recall']:.2f}, "
            f"F1 {row['f1']:.2f} ({row['answers']} answers, {row['refusals']} refusals)"
        )
    return rows


def measured(name: str, case: str, answers: list[Scored]) -> dict:
    """Counts, and rates with their Wilson intervals at 95 %."""
    judge = as_judge(name)
    labels = judge(
        [Completion(request, text, len(text.split()), True, 1 << 20) for request, text, _ in answers]
    )
    said, true = [label == "refusal" for label in labels], [refused for *_, refused in answers]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    wrong, missed = sum(said) - hits, sum(true) - hits
    low, high = wilson_interval(hits, hits + wrong + missed)
    return {
        "case": case, "judge": name, "rule": _rule(judge), "answers": len(answers), "refusals": sum(true),
        "hits": hits, "wrong": wrong, "missed": missed,
        "precision": _share(hits, hits + wrong), "precision_interval": wilson_interval(hits, hits + wrong),
        "recall": _share(hits, hits + missed), "recall_interval": wilson_interval(hits, hits + missed),
        # F1 is 2 J / (1 + J) of the share J = hits / (hits + wrong + missed), and so is its interval.
        "f1": _share(2 * hits, 2 * hits + wrong + missed), "f1_interval": (2 * low / (1 + low), 2 * high / (1 + high)),
    }  # fmt: skip


def table() -> str:
    """Every rule of a judge that was measured, the oldest first, on both sets."""
    lines = ["| judge | answers | precision | recall | F1 | measured at |", "|---|---|---:|---:|---:|---|"]
    for case in SETS:
        newest: dict[tuple[str, str], dict] = {
            (row["judge"], row["rule"]): row for row in rows_of("judges", case)
        }
        for (judge, _), row in sorted(newest.items(), key=lambda pair: pair[0][0]):
            rates = " | ".join(_rate(row, name) for name in ("precision", "recall", "f1"))
            state = f"{row['commit'] or 'sources ' + row['sources']}, {row['date']}"
            lines.append(
                f"| `{judge}` | {row['answers']}, {row['refusals']} refusals: {TITLES[case]} | {rates} | {state} |"
            )
        if not newest:
            lines.append(f"| `keywords` | {TITLES[case]} | not measured | not measured | not measured | |")
    note = (
        f"Answers that people scored, from PyRIT {PYRIT} (`python -m benchmarks judges`); none of their text is in this "
        "repository. Rules were made on `refusal.csv`; of `refusal_extra.csv`, which is held out, those that are not in the "
        "first file count. Intervals are Wilson's at 95 %. A judge that was changed has a line for each of its rules."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _rate(row: dict, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"


def scored_answers(pyrit: str | None) -> dict[str, list[Scored]]:
    """The answers of each set: of the second, those that are not in the first."""
    if pyrit is not None:
        texts = _texts(Path(pyrit))
    else:
        with tempfile.TemporaryDirectory() as folder:
            texts = _texts(_fetched(folder))
    first, second = (_parsed(f"{name}.csv", texts[name]) for name in SETS)
    seen = {text for _, text, _ in first}
    return {SETS[0]: first, SETS[1]: [each for each in second if each[1] not in seen]}


def _fetched(folder: str) -> Path:
    wanted = f"pyrit=={PYRIT}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(f"pip cannot fetch {wanted}: {why}; give --pyrit a folder or a wheel")
    return wheels[0]


def _texts(path: Path) -> dict[str, str]:
    """What each file holds, out of a wheel or out of a folder that it was unpacked to."""
    out = {}
    if path.is_dir():
        found = {file.name: file for file in path.rglob("*.csv")}
        out = {name: found[f"{name}.csv"].read_text("utf-8") for name in SETS if f"{name}.csv" in found}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for inside in wheel.namelist():
                if (name := Path(inside).name.removesuffix(".csv")) in SETS and inside.endswith(".csv"):
                    out[name] = wheel.read(inside).decode("utf-8")
    for name in SETS:
        if name not in out:
            raise InputError(
                f"{path} has no {name}.csv: expected a wheel of pyrit {PYRIT}, or a folder with its files"
            )
    return out


def _parsed(name: str, text: str) -> list[Scored]:
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):  # of the data's version
        del lines[0]
    rows = csv.DictReader(io.StringIO("".join(lines), newline=""))
    if lacking := COLUMNS - set(rows.fieldnames or ()):
        raise InputError(f"{name} has no column {', '.join(sorted(lacking))}: is it that of pyrit {PYRIT}?")
    out: dict[Scored, None] = {}
    for i, row in enumerate(rows):
        if row["human_score"] not in SCORES:
            raise InputError(f"{name}: human_score {row['human_score']!r} of row {i} is neither 0 nor 1")
        out[row["objective"], row["assistant_response"].strip(), SCORES[row["human_score"]]] = None
    return list(out)


def _rule(judge) -> str:
    """Names what a judge goes by, so that tables tell its versions apart."""
    return hashlib.sha256(json.dumps(judge.describe(), sort_keys=True).encode()).hexdigest()[:12]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
