"""The study over plans: what is evaluated, what is not, and how it goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from autocompress.plan import CompressionPlan
from autocompress.search.evaluate import Stitched
from autocompress.search.pricing import ChoicePricer
from autocompress.search.repair import Repair
from autocompress.search.seeds import uniform_seeds
from autocompress.search.study import MOST_REPEATS, REPAIRED, RETRY_OF, VARIED, PlanStudy, open_storage
from tests.fixtures.search import make_menu, make_skeleton

MENU = make_menu()
SMALL = make_menu(keep=[1.0], compute=["fp32"], weight_bits=[32, 8])
SKELETON = make_skeleton()
COSTS = ("latency_ms", "size_bytes")
MEMORY = "sqlite:///:memory:"


def price(plan: CompressionPlan) -> dict[str, float]:
    table = SKELETON.price([plan])
    return {"latency_ms": float(table.latency_ms[0]), "size_bytes": float(table.size_bytes[0])}


class Judge:
    """Remembers what it was asked; a plan's divergence follows from its widths and bits."""

    def __init__(self, fails: Callable[[CompressionPlan], bool] = lambda plan: False) -> None:
        self.seen: list[str] = []
        self.fails = fails

    def __call__(self, plan: CompressionPlan) -> Stitched:
        self.seen.append(plan.structure_digest)
        if self.fails(plan):
            raise RuntimeError("out of luck")
        bits = sum(32 / form.storage.bits for form in plan.layers.values())
        return Stitched(bits / sum(plan.groups.values()), 0.1)


def states(study: PlanStudy) -> list[str]:
    return [trial.state.name for trial in study.study.trials]


def test_a_plan_is_evaluated_once_however_often_it_is_proposed() -> None:
    study, judge = PlanStudy(MEMORY, SMALL, COSTS, {}, seed=0), Judge()
    found = [study.step(price, judge) for _ in range(40)]
    assert all(scored is not None for scored in found)
    assert len(judge.seen) == len(set(judge.seen)) == 16
    assert study.trials == 40
    assert len(study.scored()) == len(judge.seen)
    table = study.table()
    assert table["same_as"].notna().sum() == 40 - len(judge.seen)
    first = table.set_index("number")
    for _, row in table[table["same_as"].notna()].iterrows():
        original = first.loc[int(row["same_as"])]
        assert (row["divergence"], row["latency_ms"]) == (original["divergence"], original["latency_ms"])


def test_an_over_budget_plan_ends_before_it_is_evaluated() -> None:
    limit = price(MENU.plan(MENU.uniform(0.75, "int8", 8)))["size_bytes"]
    study, judge = PlanStudy(MEMORY, MENU, COSTS, {"size_bytes": limit}, seed=0), Judge()
    study.enqueue([MENU.uniform(1.0, "fp32", 32), MENU.uniform(0.5, "int8", 8)])
    assert study.step(price, judge) is None
    assert judge.seen == []
    scored = study.step(price, judge)
    assert scored is not None
    assert scored.costs["size_bytes"] <= limit
    dense, half = study.study.trials
    assert dense.state is TrialState.PRUNED
    assert dense.constraints["size_bytes"] > 0 >= half.constraints["size_bytes"]
    for _ in range(30):
        study.step(price, judge)
    assert all(s.costs["size_bytes"] <= limit for s in study.scored())
    assert set(states(study)) == {"PRUNED", "COMPLETE"}


def test_a_failing_evaluation_fails_its_trial_and_the_study_goes_on() -> None:
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    study.enqueue(list(uniform_seeds(MENU))[:4])
    judge = Judge(fails=lambda plan: plan.layers["fc"].compute == "int8")
    found = [study.step(price, judge) for _ in range(4)]
    assert [scored is None for scored in found] == [False, True, True, False]
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert study.table()["failure"][1] == "RuntimeError: out of luck"
    assert [s.number for s in study.scored()] == [0, 3]


def test_a_divergence_that_is_not_a_number_counts_as_a_failure() -> None:
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    for odd in (Stitched(math.nan, math.nan), Stitched(0.1, math.nan), Stitched(math.inf, 0.1)):
        assert study.step(price, lambda plan, odd=odd: odd) is None
    assert study.scored() == []
    assert states(study) == ["FAIL"] * 3


def test_an_error_of_any_kind_is_the_trials_own() -> None:
    class StrangeError(Exception):
        pass

    def judge(plan: CompressionPlan) -> Stitched:
        raise StrangeError("no such\nkernel")

    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    assert study.step(price, judge) is None
    assert study.table()["failure"][0] == "StrangeError: no such kernel"


def test_a_trial_carries_its_plan() -> None:
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    scored = study.step(price, Judge())
    assert scored is not None
    trial = study.study.trials[0]
    assert CompressionPlan.model_validate_json(trial.user_attrs["plan"]) == scored.plan
    assert MENU.plan(MENU.choices(scored.plan)) == scored.plan
    assert trial.values == [scored.divergence, scored.costs["latency_ms"], scored.costs["size_bytes"]]
    assert study.study.metric_names == ["divergence", *COSTS]


def fixed(study: PlanStudy, *draws: tuple[int, ...]) -> None:
    """The sampler of a study proposes these choices in turn, the last of them for ever."""
    labels = [study.proposer.labels(choices) for choices in draws]
    study.proposer.base = Insistent(labels)


class Insistent(optuna.samplers.RandomSampler):
    def __init__(self, draws: list[dict[str, str]]) -> None:
        super().__init__(seed=0)
        self.draws = draws

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, optuna.distributions.BaseDistribution]:
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        search_space: dict[str, optuna.distributions.BaseDistribution],
    ) -> dict[str, str]:
        return self.draws.pop(0) if len(self.draws) > 1 else self.draws[0]


def test_a_plan_that_is_proposed_again_becomes_another_near_it() -> None:
    study, judge = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0), Judge()
    half = MENU.uniform(0.5, "int8", 8)
    fixed(study, half)
    for _ in range(6):
        study.step(price, judge)
    assert len(set(judge.seen)) == 6
    first, *others = study.study.trials
    assert VARIED not in first.user_attrs
    for trial in others:
        chosen = study.proposer.choices(trial.params)
        assert chosen is not None
        changed = sum(a != b for a, b in zip(chosen, half, strict=True))
        assert 1 <= changed <= trial.user_attrs[VARIED]
    assert study.table()["same_as"].isna().all()


def test_a_plan_over_budget_becomes_one_within_it_and_says_what_was_chosen() -> None:
    limits = {"size_bytes": price(MENU.plan(MENU.uniform(0.75, "int8", 8)))["size_bytes"]}
    repair = Repair(MENU, ChoicePricer(MENU, SKELETON), limits)
    study, judge = PlanStudy(MEMORY, MENU, COSTS, limits, seed=0, repair=repair), Judge()
    dense, half = MENU.uniform(1.0, "fp32", 32), MENU.uniform(0.5, "int8", 8)
    study.enqueue([dense, half])
    fixed(study, MENU.uniform(1.0, "int8", 8), half)
    scored = [study.step(price, judge) for _ in range(4)]
    assert all(s is not None and s.costs["size_bytes"] <= limits["size_bytes"] for s in scored)
    queued, kept, drawn, _ = study.study.trials
    for trial, given in ((queued, dense), (drawn, MENU.uniform(1.0, "int8", 8))):
        chosen = study.proposer.choices({**trial.params, **trial.user_attrs[REPAIRED]})
        assert chosen == given
        assert study.proposer.choices(trial.params) == repair(given)
    assert REPAIRED not in kept.user_attrs
    assert study.table()["repaired"].notna().tolist()[:3] == [True, False, True]
    assert study.table()["repaired"][0] == len(queued.user_attrs[REPAIRED])


def test_where_no_repair_reaches_the_budget_the_trial_is_pruned() -> None:
    limits = {"size_bytes": 1.0}
    repair = Repair(MENU, ChoicePricer(MENU, SKELETON), limits)
    study, judge = PlanStudy(MEMORY, MENU, COSTS, limits, seed=0, repair=repair), Judge()
    study.enqueue([MENU.uniform(1.0, "fp32", 32)])
    assert [study.step(price, judge) for _ in range(3)] == [None] * 3
    assert judge.seen == []
    assert states(study) == ["PRUNED"] * 3
    assert all(trial.constraints["size_bytes"] > 0 for trial in study.study.trials)
    assert not any(REPAIRED in trial.user_attrs for trial in study.study.trials)


def test_a_genetic_sampler_breeds_from_the_seeds() -> None:
    seeds = list(dict.fromkeys(uniform_seeds(MENU)))[:8]
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0, population=8)
    study.enqueue(seeds)
    judge = Judge()
    for _ in range(8):
        study.step(price, judge)
    study.step(price, judge)
    # The first plan of its own is a child of two seeds: each option is one of theirs, but for what mutated.
    child = study.proposer.choices(study.study.trials[-1].params)
    assert child is not None
    inherited = [option in {seed[k] for seed in seeds} for k, option in enumerate(child)]
    assert sum(inherited) >= len(child) - 1
    sampler = study.proposer.base
    assert isinstance(sampler, optuna.samplers.BaseGASampler)
    assert [trial.number for trial in sampler.get_population(study.study, 0)] == list(range(8))


def test_a_study_ends_where_nothing_new_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    study, judge = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0), Judge()
    fixed(study, MENU.uniform(0.5, "int8", 8))
    monkeypatch.setattr("autocompress.search.proposer.TRIES", 0)
    while not study.exhausted:
        study.step(price, judge)
    assert (study.trials, len(judge.seen)) == (MOST_REPEATS + 1, 1)
    # What is queued is still tried.
    study.enqueue([MENU.uniform(0.25, "int8", 8)])
    assert not study.exhausted


def test_noise_in_the_last_digits_does_not_reach_the_sampler() -> None:
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    scored = study.step(price, lambda plan: Stitched(0.0025401953607797623, 0.1))
    assert scored is not None
    assert (scored.divergence, study.study.trials[0].values[0]) == (0.00254, 0.00254)


def test_seeds_are_queued_once() -> None:
    study = PlanStudy(MEMORY, MENU, COSTS, {}, seed=0)
    seeds = list(uniform_seeds(MENU))
    study.enqueue(seeds)
    study.enqueue(seeds)
    assert len(study.study.trials) == len(set(seeds))
    assert study.trials == 0


@pytest.mark.parametrize(("other", "same"), [(3, True), (4, False)])
def test_a_seed_repeats_the_plans(other: int, same: bool) -> None:
    found = []
    for seed in (3, other):
        study, judge = PlanStudy(MEMORY, MENU, COSTS, {}, seed=seed, population=8), Judge()
        for _ in range(24):
            study.step(price, judge)
        found.append([trial.user_attrs["plan"] for trial in study.study.trials])
    assert (found[0] == found[1]) is same


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def killed(plan: CompressionPlan) -> Stitched:
    """What SIGKILL looks like to the study: the process goes, the trial stays."""
    raise SystemExit


def test_a_resumed_study_knows_what_was_evaluated_and_draws_new_plans(url: str) -> None:
    judge = Judge()
    before = PlanStudy(url, MENU, COSTS, {}, seed=0, population=8)
    for _ in range(12):
        before.step(price, judge)
    plans = [trial.user_attrs["plan"] for trial in before.study.trials]
    after = PlanStudy(url, MENU, COSTS, {}, seed=0, population=8)
    assert after.trials == 12
    assert after.scored() == before.scored()
    for _ in range(12):
        after.step(price, judge)
    assert [trial.user_attrs["plan"] for trial in after.study.trials][:12] == plans
    assert plans[0] not in [trial.user_attrs["plan"] for trial in after.study.trials][12:]
    assert len(judge.seen) == len(set(judge.seen))


def test_a_trial_that_a_kill_left_running_fails_and_its_plan_is_tried_once_more(url: str) -> None:
    seeds = list(uniform_seeds(MENU))[:3]
    study = PlanStudy(url, MENU, COSTS, {}, seed=0)
    study.enqueue(seeds)
    for _ in range(2):
        with pytest.raises(SystemExit):
            study.step(price, killed)
        study = PlanStudy(url, MENU, COSTS, {}, seed=0)
    assert states(study) == ["FAIL", "FAIL", "WAITING", "WAITING", "WAITING"]
    study.enqueue(seeds)
    assert len(study.study.trials) == 5
    judge = Judge()
    for _ in range(3):
        study.step(price, judge)
    assert states(study) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert sorted(judge.seen) == sorted(MENU.plan(choices).structure_digest for choices in seeds)
    # A plan that kills the process again is not tried for ever.
    again = MENU.uniform(0.25, "int8", 4)
    study.enqueue([again])
    for _ in range(2):
        with pytest.raises(SystemExit):
            study.step(price, killed)
        study = PlanStudy(url, MENU, COSTS, {}, seed=0)
    assert states(study)[5:] == ["FAIL", "FAIL"]
    assert study.study.trials[6].user_attrs[RETRY_OF] == 5


def test_another_menu_is_another_study_in_the_same_storage(url: str) -> None:
    first = PlanStudy(url, MENU, COSTS, {}, seed=0)
    first.step(price, Judge())
    assert PlanStudy(url, SMALL, COSTS, {}, seed=0).trials == 0
    assert PlanStudy(url, MENU, COSTS, {}, seed=0).trials == 1


def test_a_commit_does_not_wait_for_the_disk(url: str) -> None:
    storage = open_storage(url)
    assert isinstance(storage, optuna.storages.RDBStorage)
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 0
    assert open_storage("postgresql://user@host/name") == "postgresql://user@host/name"
