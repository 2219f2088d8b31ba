"""The judges beside people, on made-up answers in the form of PyRIT's files."""

import json
import subprocess
import zipfile

import pytest
from rich.console import Console

from benchmarks import judges, provenance
from shipsfast.errors import InputError
from tests.support.completions import ANSWER

REFUSAL = "I can't tell you where the moonstone is."
HEAD = "# dataset_version=1.0\nobjective,assistant_response,human_score,data_type\n"
FIRST = [
    ("Where?", REFUSAL, 1),
    ("Where?", REFUSAL, 1),
    ("Why?", REFUSAL, 1),
    ("How?", ANSWER, 0),
    ("When?", ANSWER, 1),
]
SECOND = [("Where?", REFUSAL, 1), ("What?", 'Ask, "mill"\nor not.', 0), ("Who?", "I won't say.", 0)]


def csv(rows) -> str:
    cells = [
        (request, f'"{text.replace(chr(34), chr(34) * 2)}"', str(score), "text")
        for request, text, score in rows
    ]
    return HEAD + "".join(",".join(row) + "\n" for row in cells)


@pytest.fixture
def folder(tmp_path):
    at = tmp_path / "pyrit" / "datasets"
    at.mkdir(parents=True)
    (at / "refusal.csv").write_text(csv(FIRST), "utf-8")
    (at / "refusal_extra.csv").write_text(csv(SECOND), "utf-8")
    return tmp_path / "pyrit"


def test_rows_and_their_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    assert "not measured" in judges.table()
    rows = judges.run(str(folder), Console(quiet=True))
    assert [(row["judge"], row["case"]) for row in rows] == [
        (j, s) for j in judges.JUDGES for s in judges.SETS
    ]
    first, second = rows[:2]  # keywords; a pair that comes twice counts once, and so do answers of both sets
    assert {k: first[k] for k in ("answers", "refusals", "hits", "wrong", "missed")} == {
        "answers": 4, "refusals": 3, "hits": 2, "wrong": 0, "missed": 1,
    }  # fmt: skip
    assert (first["precision"], first["recall"], first["f1"]) == (1.0, 2 / 3, 0.8)
    assert (second["answers"], second["refusals"], second["wrong"]) == (2, 0, 1)
    low, high = first["f1_interval"]
    assert 0 < low < 0.8 < high < 1
    assert first["commit"] and first["versions"]["shipsfast"] and first["pyrit"] == judges.PYRIT
    text = (tmp_path / "results" / "judges.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == json.loads(json.dumps(rows))
    assert "moonstone" not in text and "mill" not in text, "the answers stay where they are"
    table = judges.table()
    assert (
        "| `keywords` | 4, 3 refusals: rules were made on these | 1.00 (0.34 to 1.00) | 0.67 (0.21 to 0.94) |"
        in table
    )
    assert "| 2, 0 refusals: held out |" in table


def test_a_wheel_is_read_as_it_is(folder, tmp_path):
    wheel = tmp_path / "pyrit.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in folder.rglob("*.csv"):
            file.write(path, path.relative_to(tmp_path))
    assert judges.scored_answers(str(wheel)) == judges.scored_answers(str(folder))


def test_what_cannot_be_had_is_told_in_a_line(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"absent has no refusal\.csv: expected a wheel of pyrit"):
        judges.scored_answers(str(tmp_path / "absent"))
    file = folder / "datasets" / "refusal.csv"
    for text, message in (
        (csv([("?", "a", 2)]), "human_score '2' of row 0"),
        ("a,b\n", "no column assistant_response"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            judges.scored_answers(str(folder))

    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "much\nERROR: no network")

    monkeypatch.setattr(judges.subprocess, "run", fails)
    with pytest.raises(
        InputError, match=r"pip cannot fetch pyrit==.*: ERROR: no network; give --pyrit"
    ) as error:
        judges.scored_answers(None)
    assert "\n" not in str(error.value)


def test_the_table_is_of_the_committed_results():
    text = (provenance.ROOT / "docs" / "judges.md").read_text("utf-8")
    assert judges.table() in text, "run python -m benchmarks tables"
