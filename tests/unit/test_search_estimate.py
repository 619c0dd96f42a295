"""The estimate of divergences: exact where losses add up, drawn to what was evaluated, rounded for repeatability."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.search.estimate import FLOOR, POWER, DivergenceEstimate
from autocompress.search.seeds import Sensitivity


def make_sensitivity(knobs: int, options: int, seed: int = 0) -> Sensitivity:
    """Divergences over four decades; the first option changes nothing."""
    rng = np.random.default_rng(seed)
    return Sensitivity(tuple(np.append(0.0, 10.0 ** rng.uniform(-4, 0, options - 1)) for _ in range(knobs)))


def draw(knobs: int, options: int, count: int, seed: int = 1) -> np.ndarray:
    """Plans that change few knobs, and plans that change many."""
    rng = np.random.default_rng(seed)
    changed = rng.random((count, knobs)) < rng.random((count, 1))
    return np.where(changed, rng.integers(options, size=(count, knobs)), 0)


def test_a_single_swap_is_what_was_measured_and_several_are_a_power_mean() -> None:
    estimate = DivergenceEstimate(Sensitivity((np.array([0.0, 0.1]), np.array([0.0, 0.2, 0.5]))))
    found = estimate(np.array([[0, 0], [1, 0], [0, 2], [1, 1]]))
    assert found[0] == 0.0
    assert found[1:3] == pytest.approx([0.1, 0.5], rel=1e-3)
    assert found[3] == pytest.approx((0.1**POWER + 0.2**POWER) ** (1 / POWER), rel=1e-3)


def test_knobs_may_have_different_numbers_of_options() -> None:
    rows = (np.array([0.0]), np.array([0.0, 0.3, 0.1, 0.2]), np.array([0.0, 0.4]))
    found = DivergenceEstimate(Sensitivity(rows))(np.array([[0, 3, 1]]))
    assert found == pytest.approx([(0.2**POWER + 0.4**POWER) ** (1 / POWER)], rel=1e-3)


def test_too_few_plans_teach_nothing() -> None:
    estimate = DivergenceEstimate(make_sensitivity(6, 4))
    choices = draw(6, 4, 50)
    before = estimate(choices)
    estimate.learn(choices[:3], [1.0, 2.0, 3.0])
    assert (estimate(choices) == before).all()


def error(estimate: DivergenceEstimate, choices: np.ndarray, true: np.ndarray) -> float:
    told = (true > FLOOR) & (estimate(choices) > FLOOR)
    return float(np.sqrt(np.mean(np.log(estimate(choices)[told] / true[told]) ** 2)))


@pytest.mark.parametrize("shape", ["risen", "saturated"])
def test_learning_finds_the_curve(shape: str) -> None:
    """Truths that rise above the sum, or level off, as the divergences of stitched models do."""
    sensitivity = make_sensitivity(12, 8)
    choices = draw(12, 8, 300)
    total = DivergenceEstimate(sensitivity)(choices)
    true = 2.0 * total**1.1 if shape == "risen" else total / (1.0 + total / 1.5)
    estimate = DivergenceEstimate(sensitivity)
    before = error(estimate, choices[40:], true[40:])
    estimate.learn(choices[:40], true[:40].tolist())
    assert error(estimate, choices[40:], true[40:]) < 0.35 * before
    assert estimate.error < 0.3


def test_learning_finds_the_knob_that_hurts_more_than_it_did_alone() -> None:
    sensitivity = make_sensitivity(12, 8)
    choices = draw(12, 8, 400)
    total = DivergenceEstimate(sensitivity)(choices)
    true = total * np.where(sensitivity.divergence[3][choices[:, 3]] > 0.01, 2.5, 1.0)
    estimate = DivergenceEstimate(sensitivity)
    estimate.learn(choices[:120], true[:120].tolist())
    assert error(estimate, choices[120:], true[120:]) < 0.75 * float(np.log(2.5)) / 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 60))
def test_more_damage_in_one_knob_never_looks_better_by_the_curve(seed: int, count: int) -> None:
    """Whatever noise was learned, the curve rises: more of the same damage is never estimated at less."""
    rng = np.random.default_rng(seed)
    sensitivity = make_sensitivity(5, 4, seed)
    estimate = DivergenceEstimate(sensitivity)
    estimate.learn(draw(5, 4, count, seed), (10.0 ** rng.uniform(-4, 1, count)).tolist())
    assert (np.diff(estimate._curve) > 0).all()
    found = estimate(draw(5, 4, 50, seed + 1))
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_a_plan_that_changes_nothing_is_never_harmful() -> None:
    estimate = DivergenceEstimate(make_sensitivity(6, 4))
    choices = draw(6, 4, 60)
    estimate.learn(choices, [5.0] * 60)
    assert estimate(np.zeros((1, 6), dtype=int)) == 0.0


def test_last_digits_of_the_truth_do_not_show() -> None:
    sensitivity, choices = make_sensitivity(20, 10), draw(20, 10, 400)
    true = DivergenceEstimate(sensitivity)(choices) * 1.5
    one, other = DivergenceEstimate(sensitivity), DivergenceEstimate(sensitivity)
    one.learn(choices[:100], true[:100].tolist())
    other.learn(choices[:100], (true[:100] * (1 + 1e-13)).tolist())
    assert (one(choices) == other(choices)).all()
    assert one.error == other.error
