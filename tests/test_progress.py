"""Bars: drawn over on a terminal, lines now and then in a log."""

import io
import sys

import pytest

import shipsfast
from shipsfast import progress
from shipsfast.progress import Bar
from tests.support.models import build


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_at_the_start_and_at_the_end(capsys):
    with Bar(total=10_000, desc="scan", unit="heads x prompts", things=500) as bar:
        for _ in range(10_000):
            bar.update()
    text = capsys.readouterr().err
    first, last = text.splitlines()
    assert first == "scan:   0%, 0 of 500 heads x prompts, 00:00 so far, ? left"
    assert last.startswith("scan: 100%, 500 of 500 heads x prompts, 00:0") and last.endswith("00:00 left")
    assert "\r" not in text


def test_and_one_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with Bar(total=4, desc="sahara", unit="heads x prompts") as bar:
        for done in range(4):
            bar.set_description(f"sahara, head {done + 1} of 4", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[2].startswith("sahara, head 2 of 4:  50%, 2 of 4 heads x prompts") and 5 <= len(lines) <= 6


def test_where_it_stopped_is_the_last_line(capsys):
    with pytest.raises(KeyError), Bar(total=8, desc="generate", unit="answers") as bar:
        bar.update(2)
        raise KeyError
    assert "25%, 2 of 8 answers" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_is_drawn_over(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    with Bar(total=3, desc="scan", unit="heads x prompts", things=60, mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    text = sys.stderr.getvalue()
    assert text.count("\r") >= 4 and text.count("\n") == 1
    assert "scan:  67%|" in text and "| 40 of 60 heads x prompts [" in text


def test_nothing_to_do_and_nothing_asked_for_show_nothing(capsys):
    assert list(Bar([], desc="generate", unit="groups")) == []
    with Bar(total=0, desc="scan", unit="heads x prompts"), Bar(total=3, unit="answers", progress=False):
        pass
    assert capsys.readouterr().err == ""


def test_a_scan_counts_heads_and_prompts(capsys):
    shipsfast.scan(build(), [[5, 6, 7, 8], [5, 6, 9]], rows_per_block=5)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("scan:   0%, 0 of 24 heads x prompts")
    assert last.startswith("scan: 100%, 24 of 24 heads x prompts")
