"""What a candidate is worth under fronts of every shape: with quality, without it, and of quality alone."""

from __future__ import annotations

import pytest

from autocompress.search.gains import Gains, Outcome
from autocompress.search.ladder import NEAR, box, gains_of

REFERENCE = {"latency_ms": 1.0, "size_bytes": 1e6, "macs": 1e6, "peak_memory_bytes": 1e5, "energy_mj": 1.0}
AXES = ("latency_ms", "size_bytes")


def outcome(drop: float, **costs: float) -> Outcome:
    return Outcome(drop, {**REFERENCE, **costs})


def test_with_quality_traded_off_a_gain_is_hypervolume_in_the_box() -> None:
    gains = Gains(("latency_ms",), True, REFERENCE, drop_limit=10.0)
    fast, faster = outcome(0.025, latency_ms=0.5), outcome(0.09, latency_ms=0.25)
    rows = [box(0.025, {"latency_ms": 0.5}, REFERENCE, 10.0), box(0.09, {"latency_ms": 0.25}, REFERENCE, 10.0)]
    assert gains.each([], [fast, faster]) == pytest.approx(gains_of([], rows))
    assert gains.best([], [fast, faster]) == (0, pytest.approx(0.75 * NEAR / 3))
    assert gains.best([fast], [fast])[1] == 0.0


def test_without_a_budget_on_the_drop_more_than_the_box_holds_counts_a_little() -> None:
    gains = Gains(("latency_ms",), True, REFERENCE)
    near, far, lost = (gains.each([], [outcome(drop, latency_ms=0.125)])[0] for drop in (0.05, 0.2, 0.4))
    assert near == pytest.approx(0.55 * NEAR, rel=1e-3)
    assert 0.0 < far < 0.1
    assert lost == 0.0


def test_savings_beyond_the_box_count_a_little_so_that_a_search_goes_on_for_them() -> None:
    fastest = Gains(("latency_ms",), False, REFERENCE, drop_limit=1.0)
    full, beyond = outcome(0.0, latency_ms=1 / 8), outcome(0.0, latency_ms=1 / 16)
    assert 0.0 < fastest.best([full], [beyond])[1] < 0.1
    traded = Gains(AXES, True, REFERENCE)
    full, smaller = (outcome(0.0, latency_ms=1 / 8, size_bytes=1e6 / times) for times in (32, 64))
    assert 0.0 < traded.best([full], [smaller])[1] < 0.1
    assert traded.best([smaller], [full])[1] == 0.0


def test_what_is_not_named_costs_as_much_as_the_original() -> None:
    gains = Gains(AXES, True, REFERENCE)
    assert gains.best([], [Outcome(0.0, {"latency_ms": 0.125})])[1] == 0.0


def test_quality_that_is_only_bound_is_not_paid_for() -> None:
    bound = Gains(("latency_ms",), False, REFERENCE, drop_limit=1.0)
    accurate, edge = outcome(0.0, latency_ms=0.5), outcome(0.005, latency_ms=0.35)
    assert bound.best([], [accurate, edge])[0] == 1
    traded = Gains(("latency_ms",), True, REFERENCE, drop_limit=1.0)
    assert traded.best([], [accurate, edge])[0] == 0


def test_a_saving_counts_by_the_chance_that_the_budget_is_kept() -> None:
    gains = Gains(("latency_ms",), False, REFERENCE, drop_limit=1.0)
    assert gains.chance(0.01) == pytest.approx(0.5)
    assert gains.chance(-0.01) > 0.999
    assert gains.chance(0.05) < 0.001
    hopeless, modest = outcome(0.2, latency_ms=0.125), outcome(0.004, latency_ms=0.8)
    assert gains.best([], [hopeless, modest])[0] == 1
    # What broke the budget stands in nobody's way.
    assert gains.best([hopeless], [modest])[1] == pytest.approx(gains.best([], [modest])[1])
    assert gains.best([outcome(0.001, latency_ms=0.8)], [modest])[1] == 0.0


def test_four_costs_are_all_reckoned_with() -> None:
    names = ("latency_ms", "size_bytes", "macs", "energy_mj")
    gains = Gains(names, False, REFERENCE, drop_limit=1.0)
    whole = outcome(-1.0, latency_ms=0.125, size_bytes=1e6 / 32, macs=1e6 / 8, energy_mj=0.125)
    assert gains.best([], [whole])[1] == pytest.approx(NEAR**4, abs=1e-3)
    half = outcome(-1.0, latency_ms=0.125, size_bytes=1e6 / 32, macs=1e6 / 8, energy_mj=0.125**0.5)
    assert gains.best([], [half, whole]) == (1, pytest.approx(NEAR**4, abs=1e-3))
    assert gains.best([half], [whole])[1] == pytest.approx(NEAR**4 / 2, abs=1e-3)


def test_of_quality_alone_the_most_accurate_comes_next() -> None:
    gains = Gains((), True, REFERENCE, drop_limit=None)
    candidates = [outcome(0.05, size_bytes=1.0), outcome(0.01), outcome(0.02)]
    assert gains.best([], candidates)[0] == 1
    assert gains.best([outcome(0.03)], candidates) == (1, pytest.approx(0.02))
    assert gains.best([outcome(0.0)], candidates)[1] < 0


def test_without_a_drop_to_spare_only_the_original_quality_will_do() -> None:
    gains = Gains(("latency_ms",), False, REFERENCE, drop_limit=0.0)
    assert gains.chance(0.01) < 1e-6
    assert gains.chance(0.0) == pytest.approx(0.5)
