"""The embedded default, from nothing: the original is trained, the machine measured, the time budget kept."""

from __future__ import annotations

import json

import pytest

from autocompress.pareto import dominates
from tests.e2e.conftest import DIGITS_BUDGET_S, Run

BUSY_READ_S = 8.0
"""Reading resnet8 takes two or three seconds; far more says that other work has the processor."""


def test_the_original_is_trained_to_an_honest_level(digits: Run) -> None:
    front = digits.front
    assert (front.front.task, front.front.model) == ("digits", "resnet8")
    assert front.reference.test >= 0.97
    assert "training the original" in digits.result.err


def test_a_short_search_already_gives_a_front(digits: Run) -> None:
    front = digits.front
    values = {point.id: [point.objective(name) for name in front.front.objectives] for point in front.points}
    assert not any(dominates(a, b) for a in values.values() for b in values.values())
    # Of a slow machine's few models one may dominate the others.
    assert max(point.shrink for point in front.points if point.drop <= 2.0) >= 3.5


@pytest.mark.slow
def test_the_time_budget_is_kept(digits: Run) -> None:
    search = digits.front.front.search
    spent = json.loads((digits.path / ".work" / "spent.json").read_text(encoding="utf-8"))
    assert search.seconds <= spent + 1.0
    if search.stages["read"] > BUSY_READ_S:
        pytest.skip(f"the machine is too busy to time anything: reading the model took {search.stages['read']:.0f} s")
    # 10%, and a few seconds for what a short run cannot foresee where tests share the machine.
    assert search.seconds <= 1.1 * DIGITS_BUDGET_S + 5.0


def test_stages_account_for_the_time(digits: Run) -> None:
    search = digits.front.front.search
    assert set(search.stages) >= {"read", "search", "recover", "measure"}
    assert 0.8 * search.seconds <= sum(search.stages.values()) <= search.seconds + 1.0
