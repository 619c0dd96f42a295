"""Files of a run are whole or absent, and its clock goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.search import files
from autocompress.search.files import Clock, read_json, write_text


class Time:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(files, "time", made)
    return made


def test_time_adds_up_over_restarts(time: Time, tmp_path: Path) -> None:
    path = tmp_path / ".work" / "spent.json"
    for already in (0.0, 7.0, 14.0):
        clock = Clock(path, 60.0)
        assert (clock.spent, clock.left) == (already, 60.0 - already)
        time.now += 7.0
        assert (clock.spent, clock.left) == (already + 7.0, 53.0 - already)
        clock.save()
        clock.save()
        time.now += 500.0  # nobody was working


def test_only_what_was_saved_counts_after_a_kill(time: Time, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "spent.json", 60.0)
    time.now += 5.0
    clock.save()
    time.now += 5.0
    assert Clock(tmp_path / "spent.json", 60.0).spent == 5.0


def test_without_a_budget_there_is_no_end(tmp_path: Path) -> None:
    assert Clock(tmp_path / "spent.json", None).left == float("inf")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "front.json"
    write_text(path, "[1]")
    write_text(path, "[1, 2]")
    assert read_json(path) == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["front.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "front.json"
    write_text(path, "[1]")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "[1, 2, 3]")
    assert read_json(path) == [1]


def test_an_absent_file_reads_as_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "absent.json") is None
