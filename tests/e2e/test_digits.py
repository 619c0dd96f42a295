"""The embedded default, from nothing: the original is trained, the machine measured, the time budget kept."""

from __future__ import annotations

import json

import pytest

from autocompress.front import LoadedFront, load_front
from autocompress.pareto import dominates
from tests.e2e.tools import CommandLine, Result

BUDGET_S = 25.0


@pytest.fixture(scope="module")
def digits(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedFront, Result]:
    path = tmp_path_factory.mktemp("digits") / "run"
    result = cli("search", "--task", "digits", "--time-budget", f"{BUDGET_S:g}s", "--seed", "0", "--out", path)
    assert result.code == 0, result.err
    return load_front(path), result


def test_the_original_is_trained_to_an_honest_level(digits: tuple[LoadedFront, Result]) -> None:
    front, result = digits
    assert (front.front.task, front.front.model) == ("digits", "resnet8")
    assert front.reference.test >= 0.97
    assert "training the original" in result.err


def test_a_short_search_already_gives_a_front(digits: tuple[LoadedFront, Result]) -> None:
    front, _ = digits
    assert len(front.points) >= 3
    values = {point.id: [point.objective(name) for name in front.front.objectives] for point in front.points}
    assert not any(dominates(a, b) for a in values.values() for b in values.values())
    assert max(point.shrink for point in front.points if point.drop <= 2.0) >= 3.5


def test_the_time_budget_is_kept(digits: tuple[LoadedFront, Result]) -> None:
    front, _ = digits
    spent = json.loads((front.path / ".work" / "spent.json").read_text(encoding="utf-8"))
    assert front.front.search.seconds <= spent + 1.0
    # 10%, and two seconds for what no plan of a short run can foresee on a busy machine.
    assert front.front.search.seconds <= 1.1 * BUDGET_S + 2.0


def test_stages_account_for_the_time(digits: tuple[LoadedFront, Result]) -> None:
    front, _ = digits
    stages = front.front.search.stages
    assert set(stages) >= {"read", "search", "recover", "measure"}
    assert 0.8 * front.front.search.seconds <= sum(stages.values()) <= front.front.search.seconds + 1.0
