"""Plans to start from: dynamic programming against brute force, and seeds that lie on the menu."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.pareto import dominates
from autocompress.plan import CompressionPlan
from autocompress.progress import SilentProgress
from autocompress.search import engine
from autocompress.search.engine import Engine
from autocompress.search.menu import format_of
from autocompress.search.pricing import NamedPrices
from autocompress.search.repair import structural_harm
from autocompress.search.seeds import (
    BINS,
    FORMATS,
    Sensitivity,
    dp_front,
    dp_surface,
    knapsack,
    measure_sensitivity,
    single_swaps,
    uniform_seeds,
)
from tests.fixtures.search import make_menu, make_skeleton

MENU = make_menu()

knobs = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 160)), min_size=1, max_size=4), min_size=1, max_size=5
)


def brute_force(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float) -> float:
    totals = [
        sum(loss[i] for loss, i in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(loss)) for loss in losses))
        if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
    ]
    return min(totals, default=np.inf)


@given(knobs, st.lists(st.integers(1, BINS), max_size=4))
def test_knapsack_is_exact_on_its_grid(table: list[list[tuple[int, int]]], budgets: list[int]) -> None:
    losses = [np.array([loss for loss, _ in rows], dtype=float) for rows in table]
    costs = [np.array([cost for _, cost in rows], dtype=float) for rows in table]
    limits = [float(BINS), *map(float, budgets)]
    best = [brute_force(losses, costs, limit) for limit in limits]
    met = [(limit, loss) for limit, loss in zip(limits, best, strict=True) if np.isfinite(loss)]
    found = knapsack(losses, costs, limits)
    assert len(found) == len(met)
    for choices, (limit, loss) in zip(found, met, strict=True):
        assert sum(row[i] for row, i in zip(losses, choices, strict=True)) == loss
        assert sum(row[i] for row, i in zip(costs, choices, strict=True)) <= limit


@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_knapsack_between_grid_points_keeps_the_budget_and_is_near_the_best(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    losses = [rng.random(3) for _ in range(4)]
    costs = [rng.random(3) for _ in range(4)]
    budget = share * sum(float(row.max()) for row in costs)
    found = knapsack(losses, costs, [budget])
    # Costs are rounded up to the grid: at most one step a knob is lost.
    narrower = brute_force(losses, costs, budget * (1 - len(costs) / BINS))
    if not found:
        assert np.isinf(narrower)
        return
    assert sum(row[i] for row, i in zip(costs, found[0], strict=True)) <= budget * (1 + 1e-9)
    loss = sum(row[i] for row, i in zip(losses, found[0], strict=True))
    assert brute_force(losses, costs, budget) <= loss <= narrower + 1e-12


def test_budgets_that_cannot_be_met_give_nothing() -> None:
    rows = [np.array([0.0, 1.0])], [np.array([5.0, 3.0])]
    assert knapsack(*rows, [2.0, 4.0, 5.0]) == [(1,), (0,)]


# ------------------------------------------------------------------------------------------------------ sensitivity


def divergence(plan: CompressionPlan) -> float:
    """Losses that add up: a little for each channel that is gone and each bit below 32."""
    gone = sum(group.size - plan.groups[group.id] for group in MENU.graph.groups)
    formats = sum((32 - form.storage.bits) / 100 + (form.compute == "int8") / 50 for form in plan.layers.values())
    return 0.01 * gone + formats


def test_sensitivity_of_losses_that_add_up_is_the_loss() -> None:
    judged: list[CompressionPlan] = []

    def judge(plans: Sequence[CompressionPlan]) -> Iterator[tuple[int, float]]:
        judged.extend(plans)
        # In any order: what begins to differ last may be judged first.
        return reversed([(index, divergence(plan)) for index, plan in enumerate(plans)])

    found = measure_sensitivity(MENU, judge, SilentProgress())
    assert [len(row) for row in found.divergence] == [len(knob.options) for knob in MENU.knobs]
    # Widths and formats apart, not every pair of them.
    assert len(judged) < sum(len(knob.options) for knob in MENU.knobs)
    rng = np.random.default_rng(0)
    for _ in range(20):
        choices = [int(rng.integers(len(knob.options))) for knob in MENU.knobs]
        assert found.estimate(choices) == pytest.approx(divergence(MENU.plan(choices)))
    assert found.estimate(MENU.uniform(1.0, "fp32", 32)) == 0.0


@pytest.mark.parametrize(("pass_s", "left_s", "stands_in"), [(1.0, 30.0, True), (1.0, 1e4, False), (0.0, 30.0, False)])
def test_where_measuring_takes_too_long_what_is_taken_away_stands_in(
    pass_s: float, left_s: float, stands_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 6 < len(single_swaps(MENU)) < 2000
    clock = SimpleNamespace(spent=0.0, left=left_s)

    def quick(_: CompressionPlan) -> None:
        clock.spent += pass_s

    (tmp_path / ".work").mkdir()
    measured = Sensitivity(tuple(np.full(len(knob.options), 0.25) for knob in MENU.knobs))
    monkeypatch.setattr(engine, "measure_sensitivity", lambda *_: measured)
    run = SimpleNamespace(run=tmp_path, clock=clock, progress=SilentProgress())
    context = SimpleNamespace(menu=MENU, evaluator=SimpleNamespace(quick=quick), timed=True)
    found = Engine._sensitivity(run, context)  # type: ignore[arg-type]
    expected = structural_harm(MENU) if stands_in else measured.divergence
    assert all((row == other).all() for row, other in zip(found.divergence, expected, strict=True))
    # A longer leg of the run measures what a shorter one did not.
    assert (tmp_path / ".work" / "sensitivity.json").exists() != stands_in


# ------------------------------------------------------------------------------------------------------------ seeds


@pytest.fixture(scope="module")
def sensitivity() -> Sensitivity:
    return measure_sensitivity(MENU, lambda plans: enumerate(map(divergence, plans)), SilentProgress())


@pytest.mark.parametrize("resource", ["latency_ms", "size_bytes", "macs"])
def test_the_front_by_dynamic_programming_runs_from_cheap_to_dear(sensitivity: Sensitivity, resource: str) -> None:
    skeleton = make_skeleton()

    def price(choices: np.ndarray) -> np.ndarray:
        return np.asarray(getattr(skeleton.price([MENU.plan(row) for row in choices]), resource), dtype=float)

    found = dp_front(MENU, sensitivity, price)
    assert len(found) >= 6
    assert len(set(found)) == len(found)
    for choices in found:
        assert all(0 <= choice < len(knob.options) for choice, knob in zip(choices, MENU.knobs, strict=True))
    costs = price(np.array(found))
    losses = [sensitivity.estimate(choices) for choices in found]
    assert losses == sorted(losses, reverse=True)
    # Conversions between number formats make a latency anything but additive.
    if resource != "latency_ms":
        assert list(costs) == sorted(costs)


def test_uniform_seeds_begin_with_dense_and_int8() -> None:
    seeds = list(uniform_seeds(MENU))
    assert seeds[0] == MENU.uniform(1.0, "fp32", 32)
    assert seeds[1] == MENU.uniform(1.0, "int8", 8)
    assert len(set(seeds)) >= 5 * len(FORMATS)
    whole = {group.id: group.size for group in MENU.graph.groups}
    formats = [set(MENU.plan(choices).layers.values()) for choices in seeds if MENU.plan(choices).groups == whole]
    assert {(*found,) for found in formats} >= {(format_of(*form),) for form in FORMATS}


def test_seeds_for_two_resources_hold_those_for_each_and_some_between(sensitivity: Sensitivity) -> None:
    skeleton = make_skeleton()
    names = ("macs", "size_bytes")
    price = NamedPrices(MENU, skeleton, names)
    found = dp_surface(MENU, sensitivity, price)
    assert len(found) == len(set(found))
    alone = [set(dp_front(MENU, sensitivity, lambda c, i=i: price(c)[:, i])) for i in range(2)]  # type: ignore[misc]
    assert alone[0] | alone[1] <= set(found)
    between = set(found) - alone[0] - alone[1]
    assert len(between) >= 4
    # Some of them are beaten by no seed of one resource: in loss and both costs at once.
    losses = {c: [sensitivity.estimate(c), *price([c])[0]] for c in found}
    others = [losses[c] for c in alone[0] | alone[1]]
    free = [c for c in between if not any(dominates(o, losses[c]) for o in others)]
    assert len(free) >= 3
