"""What the pages say of the tree is so."""

import re
import tomllib

import pytest

from tests.support.places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = ("", "shipsfast")  # docs/design.md and its like leave the second out
FILE = re.compile(r"`((?:\w+/)+[\w.-]+\.(?:py|md|sh|cpp|cuh?|h|jinja))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    named = set(FILE.findall(page.read_text()))
    absent = [name for name in named if not any((ROOT / place / name).is_file() for place in PLACES)]
    assert not absent


def test_the_picture_has_every_room_from_top_to_bottom():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = contract["layers"][
        1 : contract["layers"].index("kernels") + 1
    ]  # below and above are single files
    picture = (ROOT / "docs" / "design.md").read_text().split("```")[1].splitlines()
    lines = [re.findall(r"\w+", line[:34]) for line in picture]
    at = [
        [row for row, names in enumerate(lines) if room in names]
        for layer in layers
        for room in re.findall(r"\w+", layer)
    ]
    assert all(len(rows) == 1 for rows in at)
    assert at == sorted(at)
