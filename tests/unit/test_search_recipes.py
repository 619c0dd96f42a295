"""How structures are recovered: the studies of recipes and of formats."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autocompress.plan import Recipe
from autocompress.search.recipes import FormatsStudy, RecipeStudy
from autocompress.spaces import Distillation

MEMORY = "sqlite:///:memory:"
OPTIONS = Distillation(alpha=(0.5, 0.9), temperature=(2.0, 4.0), feature_weight=(0.0, 1.0), learning_rate=(1e-3, 4e-3))
CHOSEN = ("alpha", "temperature", "feature_weight", "learning_rate")


def test_the_first_recipe_is_the_default_as_near_as_the_options_allow() -> None:
    study = RecipeStudy(MEMORY, OPTIONS, seed=0)
    default = Recipe()
    _, recipe = study.ask()
    assert recipe.alpha in OPTIONS.alpha
    for name in CHOSEN:
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
    assert all(getattr(best, name) == getattr(told[1], name) for name in CHOSEN)
    assert [trial.state.name for trial in study.study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_a_resumed_study_of_recipes_begins_again_with_what_was_left_running(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = RecipeStudy(url, OPTIONS, seed=0)
    trial, first = study.ask()
    study.tell(trial, 0.4, "a")
    _, second = study.ask()
    resumed = RecipeStudy(url, OPTIONS, seed=0)
    assert [trial.state.name for trial in resumed.study.trials] == ["COMPLETE", "FAIL", "WAITING"]
    assert resumed.best().alpha == first.alpha
    assert resumed.ask()[1] == second


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


def test_both_ways_to_formats_are_tried_and_the_better_one_is_kept_to() -> None:
    study = FormatsStudy(MEMORY, OPTIONS, seed=0)
    chosen = []
    for index in range(24):
        trial, qat = study.ask()
        chosen.append(qat)
        # Now and then nothing comes of a turn.
        study.tell(trial, None if index % 6 == 5 else 0.4 if qat else 0.9, "s")
    assert chosen[:2] == [True, False]
    assert sum(chosen[8:]) > 10
    assert sum(trial.state.name == "FAIL" for trial in study.study.trials) == 4


@pytest.mark.parametrize("only", [True, False])
def test_a_space_may_settle_how_formats_are_reached(only: bool) -> None:
    study = FormatsStudy(MEMORY, Distillation(qat=(only,)), seed=0)
    asked = [study.ask() for _ in range(3)]
    assert [qat for _, qat in asked] == [only] * 3
