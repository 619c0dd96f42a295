"""A search killed at random moments and resumed loses nothing, repeats nothing and keeps its budgets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.kill_resume import Interrupted, Stage, leftovers, trials_of
from tests.e2e.conftest import Run
from tests.e2e.tools import CommandLine

SPACE = """
description: few options, so that recovery is short
keep: [0.25, 0.5, 1.0]
weight_bits: [32, 8]
"""
MAX_SIZE_MB, MAX_DROP = 0.012, 5.0


def killed_and_resumed(cli: CommandLine, folder: Path, kills: int, longest_s: float) -> Interrupted:
    """A budgeted search killed so many times and then left to end; every leg is checked as it ends."""
    space = folder / "few.yaml"
    space.write_text(SPACE, encoding="utf-8")
    options = [*cli.own_task, "--trials", "40", "--space", str(space), "--quiet"]
    options += ["--max-size-mb", str(MAX_SIZE_MB), "--max-drop", str(MAX_DROP)]
    search = Interrupted(folder / "run", options, cli.environment)
    moments = random.Random(kills)
    stages: tuple[Stage, ...] = ("work", "start", "recover")
    for number in range(kills):
        leg = search.go(moments.uniform(0.1, longest_s), stages[number % 3])
        assert (leg.lost, leg.broken) == (0, ""), leg
    leg = search.go(kill_after=None)
    assert (leg.lost, leg.broken, leg.status, leg.ended_by) == (0, "", "complete", "itself"), leg
    return search


def check(search: Interrupted) -> None:
    assert search.evaluated_twice == []
    assert leftovers(search.run) == []
    (plans,) = (found for name, found in trials_of(search.run).items() if name.startswith("plans-"))
    assert len(plans) >= 40
    # A plan that was being evaluated when the process was killed was tried again.
    interrupted = sum(trial.state == "FAIL" for trial in plans)
    assert interrupted <= len(search.legs) - 1


@pytest.fixture(scope="module")
def search(run: Run, cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    return killed_and_resumed(cli, tmp_path_factory.mktemp("kills"), kills=3, longest_s=5.0)


def test_three_kills(search: Interrupted) -> None:
    check(search)


def test_budgets_hold_on_every_file_that_is_shipped(search: Interrupted) -> None:
    from autocompress.front import load_front

    front = load_front(search.run)
    assert front.front.constraints == {"size_bytes": MAX_SIZE_MB * 1e6, "drop": MAX_DROP}
    assert len(front.points) >= 1
    for point in front.points:
        assert point.onnx_path.stat().st_size <= MAX_SIZE_MB * 1e6
        assert point.drop <= MAX_DROP
        assert point.info.feasible
    # Plans over the size were moved to others that keep it, or ended before they were evaluated.
    (plans,) = (found for name, found in trials_of(search.run).items() if name.startswith("plans-"))
    assert any(trial.state == "PRUNED" or trial.repaired for trial in plans)


@pytest.mark.slow
def test_ten_kills(run: Run, cli: CommandLine, tmp_path: Path) -> None:
    check(killed_and_resumed(cli, tmp_path, kills=10, longest_s=4.0))
