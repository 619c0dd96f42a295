"""Which structure to recover next: the forecast, the gain, and the study of recipes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.plan import Recipe
from autocompress.search.ladder import RecipeStudy, RecoveryForecast, box, gains_of
from autocompress.spaces import Distillation

MEMORY = "sqlite:///:memory:"
OPTIONS = Distillation(alpha=(0.5, 0.9), temperature=(2.0, 4.0), feature_weight=(0.0, 1.0), learning_rate=(1e-3, 4e-3))


# --------------------------------------------------------------------------------------------------------- forecast

observations = st.lists(st.tuples(st.floats(1e-4, 5.0), st.floats(-0.05, 0.9)), max_size=12)


@given(observations)
def test_more_divergence_never_promises_less_loss(seen: list[tuple[float, float]]) -> None:
    forecast = RecoveryForecast()
    for divergence, gap in seen:
        forecast.add(divergence, gap)
    predicted = forecast.predict(np.geomspace(1e-5, 10, 40))
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()
    assert (np.diff(predicted) >= -1e-15).all()


def test_without_observations_the_prior_speaks() -> None:
    assert RecoveryForecast().predict(np.array([0.1]))[0] == pytest.approx(0.02)


def test_observations_outweigh_the_prior() -> None:
    forecast = RecoveryForecast()
    for divergence in (0.01, 0.03, 0.1, 0.3, 1.0, 2.0):
        forecast.add(divergence, 0.2 * divergence**0.8)
    assert forecast.predict(np.array([0.2]))[0] == pytest.approx(0.2 * 0.2**0.8, rel=0.25)


def test_a_gain_in_quality_is_an_observation_too() -> None:
    better, worse = RecoveryForecast(), RecoveryForecast()
    better.add(0.1, -0.01)
    worse.add(0.1, 0.05)
    at = np.array([0.1])
    assert better.predict(at)[0] < RecoveryForecast().predict(at)[0] < worse.predict(at)[0]


# ------------------------------------------------------------------------------------------------------------- gains


def test_the_box_of_the_original_and_of_the_best() -> None:
    original = {"latency_ms": 1.0, "size_bytes": 1e6}
    assert box(0.0, original, original, 10.0) == [0.0, 1.0, 1.0]
    best = {"latency_ms": 1 / 8, "size_bytes": 1e6 / 32}
    assert box(0.05, best, original, 10.0) == pytest.approx([0.5, 0.0, 0.0])
    assert box(0.05, {"energy_mj": 0.5}, {"energy_mj": 1.0}, 10.0) == pytest.approx([0.5, 2 / 3])
    # Better than the original and beyond the box: no more is gained by it.
    assert box(-0.01, {"latency_ms": 1 / 64, "size_bytes": 1.0}, original, 10.0) == [0.0, 0.0, 0.0]
    slower = box(0.0, {"latency_ms": 2.0, "size_bytes": 1e6}, original, 10.0)
    assert slower[1] > 1.0


def test_a_gain_is_what_the_front_lacks() -> None:
    present = [[0.1, 0.5, 0.5]]
    candidates = [[0.2, 0.6, 0.6], [0.1, 0.4, 0.5], [0.1, 0.5, 0.2], [0.0, 1.2, 0.0]]
    assert gains_of(present, candidates) == pytest.approx([0.0, 0.9 * 0.1 * 0.5, 0.9 * 0.5 * 0.3, 0.0])
    assert gains_of([], candidates)[2] == pytest.approx(0.9 * 0.5 * 0.8)
    assert gains_of(present, []) == []


# ----------------------------------------------------------------------------------------------------------- recipes


def test_the_first_recipe_is_the_default_as_near_as_the_options_allow() -> None:
    study = RecipeStudy(MEMORY, OPTIONS, seed=0)
    default = Recipe()
    _, recipe = study.ask()
    assert recipe.alpha in OPTIONS.alpha
    for name in ("alpha", "temperature", "feature_weight", "learning_rate"):
        wanted = getattr(default, name)
        nearest = min(getattr(OPTIONS, name), key=lambda value, wanted=wanted: abs(value - wanted))
        assert getattr(recipe, name) == nearest


def test_the_best_recipe_is_the_one_that_left_least_open() -> None:
    study = RecipeStudy(MEMORY, OPTIONS, seed=0)
    # Of the default, what the space allows.
    assert study.best() == Recipe(alpha=0.5, temperature=2.0, feature_weight=0.0, learning_rate=4e-3)
    told = {}
    for index, share in enumerate((0.8, 0.3, None, math.nan, 0.5)):
        trial, recipe = study.ask()
        study.tell(trial, share, f"s{index}")
        told[index] = recipe
    best = study.best()
    assert {n: getattr(best, n) for n in OPTIONS.__class__.model_fields} == {
        n: getattr(told[1], n) for n in OPTIONS.__class__.model_fields
    }
    assert [trial.state.name for trial in study.study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_a_resumed_study_of_recipes_fails_what_was_left_running(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = RecipeStudy(url, OPTIONS, seed=0)
    trial, first = study.ask()
    study.tell(trial, 0.4, "a")
    study.ask()
    resumed = RecipeStudy(url, OPTIONS, seed=0)
    assert [trial.state.name for trial in resumed.study.trials] == ["COMPLETE", "FAIL"]
    assert resumed.best().alpha == first.alpha


@pytest.mark.parametrize(("other", "same"), [(5, True), (6, False)])
def test_a_seed_repeats_the_recipes(other: int, same: bool) -> None:
    found = []
    for seed in (5, other):
        study = RecipeStudy(MEMORY, OPTIONS, seed)
        recipes = []
        for index in range(8):
            trial, recipe = study.ask()
            study.tell(trial, 0.1 * index, "s")
            recipes.append(recipe)
        found.append(recipes)
    assert (found[0] == found[1]) is same
