"""Progress: lines now and then off a terminal, a live view on one, nothing when quiet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from autocompress import terminal
from autocompress.front import load_front
from autocompress.terminal import LiveProgress, PlainProgress, front_table, showing_progress
from tests.fixtures.runs import build_run, make_front


def drive(progress) -> None:
    progress.stage("database", 4)
    progress.advance(2)
    progress.note(loss=0.25)
    progress.stage("search")
    progress.note(seconds_left=61.4, front=make_front(9))
    progress.advance()


def test_plain_lines_are_few() -> None:
    stream = io.StringIO()
    with showing_progress(quiet=False, stream=stream) as progress:
        drive(progress)
    assert stream.getvalue() == "database ...\nsearch ...\n"


def test_plain_lines_tell_the_facts_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    drive(PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert "database: 2/4" in lines
    assert "database: 2/4 (loss 0.25)" in lines
    assert "search: 0 (1m1s left, 9 points on the front)" in lines


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with showing_progress(quiet=True, stream=stream) as progress:
        drive(progress)
    assert stream.getvalue() == ""


def test_live_view_has_the_stage_the_facts_and_the_best_points() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=110, color_system=None)
    with LiveProgress(console) as progress:
        drive(progress)
        console.print(progress._render())
    text = stream.getvalue()
    for expected in ("done: database", "search", "1m1s left", "best so far (9)", "validation accuracy", "reference"):
        assert expected in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_whole_at_any_width(tmp_path: Path, width: int) -> None:
    stream = io.StringIO()
    front = load_front(build_run(tmp_path / "run"))
    Console(file=stream, width=width).print(front_table(front, width))
    text = stream.getvalue()
    assert "…" not in text
    assert "4.7x" in text
    assert "all channels" in text
    assert "tied with" in text
    assert "Validation minus test accuracy over the 12 points:" in text
