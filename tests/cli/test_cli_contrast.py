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
