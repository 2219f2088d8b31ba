"""docs/reliability.md has a row for every fault that the tests inject, and none besides."""

import re
from pathlib import Path

from tests.support.faults import FAULTS
from tools.fault_table import BEGIN, END, PAGE


def test_the_table_is_that_of_the_tests():
    part = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part.split("\n")
        if line.startswith("| ")
    ]
    assert [row[:2] for row in rows[1:]] == [list(pair) for pair in FAULTS.items()]
    assert all(int(times) > 0 and lost == "nothing" for _, _, times, lost in rows[1:])


def test_every_fault_has_a_test_that_injects_it():
    used = set()
    for path in Path(__file__).parent.glob("test_fault_*.py"):
        used |= set(re.findall(r'found\("([^"]+)"', path.read_text("utf-8")))
    assert used == FAULTS.keys()
