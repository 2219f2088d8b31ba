"""`shipsfast contrast`, as users meet it."""

import inspect
import json

import pytest

from shipsfast.cli import runs
from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.results.contrast import contrast
from tests.support.command_line import refused, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of a few taboo and a few ordinary requests, by name."""
    import shipsfast
    from shipsfast.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    place, heads = tmp_path_factory.mktemp("runs"), [(0, None), (1, None)]
    for name, count in (("taboo", 8), ("ordinary", 6)):
        prompts = shipsfast.load_prompts(PROMPTS / f"{name}.csv")[:count]
        options = {"template": "chat", "heads": heads, "progress": False, "rescored": 0}
        shipsfast.scan(model, prompts, tokenizer, metric=["kl", "js"], out=place / name, **options)
    return place


def test_table_and_plots(capsys, folders, tmp_path):
    plot = tmp_path / "maps.png"
    status, text, err = run(
        capsys, "contrast", folders / "taboo", folders / "ordinary", "--top", 2, "--plot", plot
    )
    assert status == 0 and err == "", err
    assert text.startswith(
        "Contrast of 8 prompts (a) with 6 prompts (b): KL(base || ablated), nats, undifferentiated"
    )
    assert (
        "0-2" in text
        and "of 8 heads with q at most 0.05" in text
        and "3,003 relabellings (all there are)" in text
    )
    assert max(map(len, text.split("\nhead ")[0].splitlines()[1:6])) <= 80
    assert text.count("Contrast of") == 2 and "Jensen-Shannon" in text
    assert plot.exists() and (tmp_path / "maps-2.png").exists()


def test_json(capsys, folders):
    args = ("contrast", folders / "taboo", folders / "ordinary", "--json", "--top", 3)
    status, text, _ = run(capsys, *args, "--permutations", 500, "--seed", 4, "--statistic", "difference")
    found = json.loads(text)
    assert status == 0 and found["prompts"] == {"a": 8, "b": 6} and len(found["top"]) == 3
    asked = {
        "statistic": "difference",
        "alternative": "greater",
        "relabellings": 500,
        "exact": False,
        "seed": 4,
    }
    assert asked.items() <= found["test"].items()
    library = contrast(
        folders / "taboo", folders / "ordinary", statistic="difference", permutations=500, seed=4
    )
    assert found == json.loads(json.dumps(library.as_json(3)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["taboo"], "has no control: give a second scan"),
        (["taboo", "taboo"], "are scans of the same prompts"),
        (["taboo", "ordinary/also/1"], "differ in metric"),
        (["taboo", "none"], "is not a shipsfast run"),
        (["taboo", "ordinary", "--plot", "maps.txt"], "expected a name ending in .png"),
        (
            ["taboo", "ordinary", "--alternative", "more"],
            "alternative must be one of greater, less, two-sided",
        ),
    ],
)
def test_refusals(capsys, folders, args, words):
    args = [arg if arg.startswith("-") or "." in arg or arg == "more" else folders / arg for arg in args]
    assert words in refused(capsys, "contrast", *args, quiet=False)


def test_defaults_are_those_of_the_library():
    of_command, of_library = (inspect.signature(each).parameters for each in (runs.contrast, contrast))
    for name in ("alternative", "statistic", "permutations", "seed"):
        assert of_command[name].default == of_library[name].default


def test_scan_with_a_control(capsys, tmp_path):
    """One command scans both, and says what tells them apart."""
    out, plot = tmp_path / "run", tmp_path / "heads.png"
    asked = (
        "scan",
        MODEL,
        PROMPTS / "taboo.csv",
        "--limit",
        5,
        "--heads",
        "0,1",
        "--control",
        PROMPTS / "ordinary.csv",
    )
    status, text, err = run(capsys, *asked, "--out", out, "--plot", plot)
    assert status == 0, err
    assert "control: 48 prompts" in err and "control: 100%" in err  # where they are from; the progress bar
    assert "8 heads x 5 prompts" in text and "Contrast of 5 prompts (a) with 48 prompts (b)" in text
    assert plot.exists() and (tmp_path / "heads-contrast.png").exists()
    manifests = [json.loads((out / place / "run.json").read_text()) for place in ("", "control")]
    files = [manifest["prompts_from"]["file"] for manifest in manifests]
    assert [file.rsplit("/")[-1] for file in files] == ["taboo.csv", "ordinary.csv"]
    assert manifests[0]["prompts_from"]["control"] == manifests[1]["prompts_from"]

    status, text, _ = run(capsys, *asked, "--out", out, "--json", "--quiet", "--top", 2)
    found = json.loads(text)
    assert status == 0 and len(found["contrast"]["top"]) == 2 and found["control"]["prompts"] == 48
    status, text, _ = run(capsys, "contrast", out, "--json", "--top", 2)
    assert status == 0 and json.loads(text) == found["contrast"]
    assert run(capsys, "contrast", out, out / "control", "--json", "--top", 2)[1] == text


def test_plan_of_a_scan_with_a_control(capsys):
    asked = ("scan", MODEL, PROMPTS / "taboo.csv", "--limit", 5, "--plan", "--quiet")
    status, text, err = run(capsys, *asked, "--control", PROMPTS / "ordinary.csv", "--json")
    found = json.loads(text)
    assert status == 0 and (found["prompts"], found["control"]["prompts"]) == (5, 48), err
    status, text, _ = run(capsys, *asked, "--control", PROMPTS / "ordinary.csv")
    assert status == 0 and "and then the control prompts:\nscan of" in text
    assert json.loads(run(capsys, *asked, "--json")[1])["control"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--control", "taboo.csv"), "the control prompts are the prompts themselves"),
        (("--control", "ordinary.csv", "--limit", "1"), "at least two prompts of each"),
        (
            ("--control", "ordinary.csv", "--rank-by", "asr"),
            "--control of a scan is about scores of the next token",
        ),
        (("--control", "none.csv"), "none.csv"),
    ],
)
def test_control_is_refused(capsys, tmp_path, more, words):
    more = [PROMPTS / x if x.endswith(".csv") else x for x in more]
    assert words in refused(capsys, "scan", MODEL, PROMPTS / "taboo.csv", *more, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
