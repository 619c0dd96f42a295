"""Every sampler that can be named drives a study: objectives, budgets, resuming, repeating, and menus with an end."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from autocompress.plan import CompressionPlan
from autocompress.search.context import prices
from autocompress.search.evaluate import Stitched
from autocompress.search.pricing import ChoicePricer
from autocompress.search.repair import Repair
from autocompress.search.samplers import SAMPLERS
from autocompress.search.study import MOST_REPEATS, REPAIRED, PlanStudy
from tests.fixtures.search import make_menu, make_skeleton

MENU = make_menu()
TINY = make_menu(keep=[1.0], compute=["fp32"], weight_bits=[32, 8])
SINGLE = make_menu(keep=[1.0], compute=["fp32"], weight_bits=[32])
SKELETON = make_skeleton()
COSTS = ("latency_ms", "size_bytes", "macs")
HALF = {name: cost / 2 for name, cost in prices(SKELETON, CompressionPlan()).items() if name in ("size_bytes", "macs")}
TRIALS = 15
"""Beyond the ten random ones that models begin with, and two generations of ``POPULATION``."""

POPULATION = 6


@pytest.fixture(params=list(SAMPLERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def price(plan: CompressionPlan) -> dict[str, float]:
    return prices(SKELETON, plan)


class Judge:
    """A divergence that widths and bits decide; remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[CompressionPlan] = []

    def __call__(self, plan: CompressionPlan) -> Stitched:
        self.seen.append(plan)
        bits = sum(32 / form.storage.bits for form in plan.layers.values())
        return Stitched(bits / sum(plan.groups.values()), 0.1)

    @property
    def digests(self) -> list[str]:
        return [plan.structure_digest for plan in self.seen]


def steps(study: PlanStudy, judge: Judge, count: int = TRIALS) -> None:
    for _ in range(count):
        study.step(price, judge)


def plans(study: PlanStudy) -> list[str]:
    return [trial.user_attrs["plan"] for trial in study.study.trials]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_objectives(name: str, objectives: int) -> None:
    costs = COSTS[: objectives - 1]
    study, judge = PlanStudy(InMemoryStorage(), MENU, costs, {}, seed=0, population=POPULATION, sampler=name), Judge()
    steps(study, judge)
    assert {trial.state for trial in study.study.trials} == {TrialState.COMPLETE}
    assert len(set(judge.digests)) == TRIALS
    assert all(len(trial.values) == objectives for trial in study.study.trials)


@pytest.mark.parametrize("objectives", [1, 3])
def test_plans_over_budget_are_learned_from_without_being_evaluated(name: str, objectives: int) -> None:
    costs = COSTS[: objectives - 1]
    study = PlanStudy(InMemoryStorage(), MENU, costs, HALF, seed=0, population=POPULATION, sampler=name)
    judge = Judge()
    study.enqueue([MENU.uniform(1.0, "fp32", 32), MENU.uniform(0.25, "int8", 8)])
    steps(study, judge, TRIALS + 5)
    trials = study.study.trials
    # A trial over budget at the least, one within it, and the same names on all.
    assert {trial.state for trial in trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    assert all(set(trial.constraints) == set(HALF) for trial in trials)
    for trial in trials:
        assert (trial.state is TrialState.PRUNED) == any(excess > 0 for excess in trial.constraints.values())
    assert all(price(plan)[cost] <= limit for plan in judge.seen for cost, limit in HALF.items())


def test_with_repair_every_trial_keeps_the_budgets(name: str) -> None:
    repair = Repair(MENU, ChoicePricer(MENU, SKELETON), HALF)
    study = PlanStudy(
        InMemoryStorage(), MENU, COSTS[:2], HALF, seed=0, population=POPULATION, sampler=name, repair=repair
    )
    judge = Judge()
    study.enqueue([MENU.uniform(1.0, "fp32", 32)])
    steps(study, judge)
    trials = study.study.trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len(set(judge.digests)) == TRIALS
    assert all(price(plan)[cost] <= limit for plan in judge.seen for cost, limit in HALF.items())
    assert any(REPAIRED in trial.user_attrs for trial in trials)
    # What is on a trial belongs together: parameters, plan, constraints.
    for trial, plan in zip(trials, judge.seen, strict=True):
        chosen = study.proposer.choices(trial.params)
        assert chosen is not None
        assert MENU.plan(chosen) == plan == CompressionPlan.model_validate_json(trial.user_attrs["plan"])
        assert trial.constraints == {cost: price(plan)[cost] / limit - 1 for cost, limit in HALF.items()}


def test_a_resumed_study_goes_on_with_other_plans(name: str, tmp_path: Path) -> None:
    url, judge = f"sqlite:///{tmp_path / 'study.db'}", Judge()

    def opened(sampler: str) -> PlanStudy:
        return PlanStudy(url, MENU, COSTS[:2], HALF, seed=0, population=POPULATION, sampler=sampler)

    # It may begin with another sampler.
    steps(opened("random"), judge, 6)
    steps(opened(name), judge, 6)
    study = opened(name)
    study.study.ask()
    study = opened(name)
    steps(study, judge, 6)
    assert study.trials == 19
    assert [trial.state for trial in study.study.trials].count(TrialState.FAIL) == 1
    assert len(set(judge.digests)) == len(judge.digests)
    assert len({trial.user_attrs["plan"] for trial in study.study.trials if "plan" in trial.user_attrs}) == 18


def test_a_seed_repeats_the_plans(name: str) -> None:
    found = []
    for seed in (3, 3, 4):
        repair = Repair(MENU, ChoicePricer(MENU, SKELETON), HALF)
        study = PlanStudy(
            InMemoryStorage(), MENU, COSTS[:2], HALF, seed=seed, population=POPULATION, sampler=name, repair=repair
        )
        steps(study, Judge())
        found.append(plans(study))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_menu_with_one_option_a_knob_ends(name: str) -> None:
    study, judge = PlanStudy(InMemoryStorage(), SINGLE, COSTS[:2], {}, seed=0, sampler=name), Judge()
    assert not study.exhausted
    steps(study, judge, 1)
    assert study.exhausted
    # Where a number of trials is asked for all the same, they cost nothing.
    steps(study, judge, 3)
    assert len(judge.seen) == 1
    assert [trial.state for trial in study.study.trials] == [TrialState.COMPLETE] * 4


def test_a_small_menu_is_tried_to_its_end(name: str) -> None:
    study, judge = (
        PlanStudy(InMemoryStorage(), TINY, COSTS[:2], {}, seed=0, population=POPULATION, sampler=name),
        Judge(),
    )
    while not study.exhausted and study.trials < 16 + MOST_REPEATS:
        study.step(price, judge)
    assert len(judge.digests) == len(set(judge.digests)) == study.proposer.plans == 16
    # Near the end the last plans are found by walking at random: a few trials may miss them.
    assert study.trials <= 32
