"""Optuna drives: one multi-objective study over the menu, its trials carrying their plans."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import pandas as pd
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from autocompress.plan import CompressionPlan, digest_of
from autocompress.search.evaluate import Stitched
from autocompress.search.failures import is_expected, reason_of
from autocompress.search.menu import Menu
from autocompress.search.pricing import Choices
from autocompress.search.proposer import Proposer
from autocompress.search.repair import Repair
from autocompress.search.samplers import AUTO, SamplerSettings, make_sampler

logger = logging.getLogger(__name__)

PLAN = "plan"
ERROR = "stitched_error"
SAME_AS = "same_as"
RETRY_OF = "retry_of"
ADOPTED = "adopted_from"
FAILURE = "failure"
REPAIRED = "repaired"
"""What the sampler or the seeds had chosen where a budget made it another plan: the knobs that differ."""

VARIED = "varied"
"""How many knobs were changed at random because the plan had been evaluated before."""

DIGITS = 3
POPULATION = 32

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

MOST_REPEATS = 100
"""Trials in a row that bring no new plan, after which a study has nothing left to find."""


class _Connection(sqlite3.Connection):
    """Leaves it to the system when a commit reaches the disk, which takes longer than evaluating a candidate does.

    A killed process loses nothing by it; only a machine that loses power could.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=OFF")


def open_storage(url: str | BaseStorage) -> BaseStorage | str:
    """The storage of an Optuna URL, or an open one; a file of SQLite does not wait for the disk at every commit."""
    if isinstance(url, BaseStorage) or not url.startswith("sqlite:///"):
        return url
    return RDBStorage(url, engine_kwargs={"connect_args": {"factory": _Connection}})


@dataclass(frozen=True)
class Scored:
    """A trial that was evaluated: its plan, its divergence from the original, and its predicted costs."""

    number: int
    plan: CompressionPlan
    divergence: float
    error: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Adopted:
    """A plan that another study evaluated, with its choices from this menu and its costs as they are predicted now."""

    plan: CompressionPlan
    choices: tuple[int, ...]
    divergence: float
    error: float
    costs: Mapping[str, float]
    origin: str


def requeue_interrupted(study: optuna.Study) -> None:
    """Ends trials that a killed process left running, for nobody will finish them, and queues their choices again.

    Once only, since they may be what killed the process.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        choices = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if choices and RETRY_OF not in trial.user_attrs:
            study.enqueue_trial(choices, user_attrs={RETRY_OF: trial.number})


class PlanStudy:
    """A persistent study over plans.

    Args:
        storage: an Optuna storage or its URL.
        menu: the knobs.
        costs: cost objectives beside the divergence, in order.
        limits: budgets by cost name.
        seed: of the sampler.
        population: of a genetic sampler.
        sampler: a name of ``autocompress list samplers``; a study may go on with another than it began with.
        repair: makes plans over budget into others that keep it; without, they end before any evaluation.
        prefix: of the study's name, where several runs share a storage.
    """

    def __init__(
        self,
        storage: str | BaseStorage,
        menu: Menu,
        costs: Sequence[str],
        limits: Mapping[str, float],
        seed: int,
        population: int = POPULATION,
        sampler: str = AUTO,
        repair: Repair | None = None,
        prefix: str = "",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.menu, self.costs, self.limits = menu, tuple(costs), dict(limits)
        # Over other costs or under other limits the same trials would have other values and states.
        self.name = name = f"{prefix}plans-{digest_of([menu.digest, self.costs, self.limits])}"
        self.study = optuna.create_study(
            storage=open_storage(storage),
            study_name=name,
            load_if_exists=True,
            directions=["minimize"] * (1 + len(costs)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(["divergence", *costs])
        # A resumed sampler must not replay the random choices that the first one made.
        stream = seed + 7919 * len(self.study.get_trials(deepcopy=False))
        base = make_sampler(sampler, sampler_settings(menu, len(self.costs), stream, population))
        self.proposer = Proposer(base, menu, repair, stream)
        self.study.sampler = self.proposer
        requeue_interrupted(self.study)
        self._known: dict[str, FrozenTrial] = {}
        self.tried: dict[tuple[int, ...], float | None] = {}
        """Choices of every trial, those that wait among them, in order; with the divergence where there is one."""
        for trial in self.study.get_trials(deepcopy=False):
            chosen = self.proposer.choices({**trial.system_attrs.get("fixed_params", {}), **trial.params})
            if chosen is not None:
                self._note(chosen, trial.values[0] if trial.state is TrialState.COMPLETE else None)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            self._known.setdefault(plan.structure_digest, trial)
        for trial in self.study.get_trials(deepcopy=False, states=ENDED):
            ended = self.proposer.choices(trial.params)
            if ended is not None:
                self.proposer.seen.add(ended)
        self._repeats = 0

    def enqueue(self, seeds: Iterable[Sequence[int]]) -> None:
        """Puts plans at the head of the queue, once each; those over budget as others near them that keep it."""
        for seed in seeds:
            drawn = tuple(int(choice) for choice in seed)
            choices = self.proposer.within(drawn)
            self._note(choices, None)
            attributes = {REPAIRED: self._differing(drawn, choices)} if choices != drawn else None
            self.study.enqueue_trial(self.proposer.labels(choices), attributes, skip_if_exists=True)

    @property
    def exhausted(self) -> bool:
        """Whether every plan of the menu was tried, or nothing new was found for long; what is queued goes before."""
        if len(self.proposer.seen) < self.proposer.plans and self._repeats < MOST_REPEATS:
            return False
        return not self.waiting

    def adopt(self, known: Iterable[Adopted]) -> None:
        """Takes over plans that another study evaluated: they are not evaluated again, and count as candidates."""
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            knob.name: optuna.distributions.CategoricalDistribution([option.label for option in knob.options])
            for knob in self.menu.knobs
        }
        for item in known:
            trial = optuna.trial.create_trial(
                values=[item.divergence, *(item.costs[name] for name in self.costs)],
                params={k.name: k.options[c].label for k, c in zip(self.menu.knobs, item.choices, strict=True)},
                distributions=distributions,
                user_attrs={PLAN: item.plan.model_dump_json(), ERROR: item.error, ADOPTED: item.origin},
            )
            self.study.add_trial(trial)
            self.proposer.seen.add(tuple(item.choices))
            self._note(tuple(item.choices), item.divergence)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            self._known.setdefault(plan.structure_digest, trial)

    @property
    def adopted(self) -> int:
        """Trials that were taken over from another study."""
        return sum(ADOPTED in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def _note(self, choices: tuple[int, ...], divergence: float | None) -> None:
        if self.tried.get(choices) is None:
            self.tried[choices] = divergence

    @property
    def evaluated(self) -> dict[tuple[int, ...], float]:
        """Divergences by choices, in the order in which the choices were first made."""
        return {choices: value for choices, value in self.tried.items() if value is not None}

    @property
    def waiting(self) -> int:
        """Plans in the queue."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    @property
    def trials(self) -> int:
        """Trials that have ended."""
        return len(self.study.get_trials(deepcopy=False, states=ENDED))

    def step(
        self,
        price: Callable[[CompressionPlan], Mapping[str, float]],
        evaluate: Callable[[CompressionPlan], Stitched],
    ) -> Scored | None:
        """Runs one trial; None where it broke a budget or failed."""
        trial = self.study.ask()
        choices = self._chosen(trial)
        self._note(choices, None)
        plan = self.menu.plan(choices)
        trial.set_user_attr(PLAN, plan.model_dump_json())
        started = time.monotonic()
        costs = price(plan)
        broken = False
        for name, limit in self.limits.items():
            # Those of the plan that is evaluated, which the trial's parameters are (see ``Proposer``); every name on
            # every trial, before any way out: a Gaussian process cannot do with some.
            excess = costs[name] / limit - 1.0
            trial.set_constraint(name, excess)
            broken = broken or excess > 0
        if broken:
            self.study.tell(trial, state=TrialState.PRUNED)
            return None
        known = self._known.get(plan.structure_digest)
        try:
            if known is not None:
                result = Stitched(known.values[0], known.user_attrs[ERROR])
                trial.set_user_attr(SAME_AS, known.number)
            else:
                result = evaluate(plan)
                if not (math.isfinite(result.divergence) and math.isfinite(result.error)):
                    raise ArithmeticError(f"divergence {result.divergence}, error {result.error}")
        except Exception as error:
            # Whatever it is, it is this candidate's: the others are not lost for it.
            logger.warning("trial %d failed: %s", trial.number, error, exc_info=not is_expected(error))
            trial.set_user_attr(FAILURE, reason_of(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        trial.set_user_attr(ERROR, result.error)
        trial.set_user_attr("seconds", time.monotonic() - started)
        # The last digits differ from process to process (sums depend on where memory lies); a sampler that saw them
        # would now and then choose other plans.
        divergence = float(f"{result.divergence:.{DIGITS}g}")
        told = self.study.tell(trial, [divergence, *(costs[name] for name in self.costs)])
        self._known.setdefault(plan.structure_digest, told)
        self._note(choices, divergence)
        return Scored(trial.number, plan, divergence, result.error, costs)

    def _chosen(self, trial: optuna.Trial) -> Choices:
        """The options of a new trial, and on the trial how it came by them."""
        labels = {
            knob.name: trial.suggest_categorical(knob.name, [option.label for option in knob.options])
            for knob in self.menu.knobs
        }
        choices = self.proposer.choices(labels)
        assert choices is not None
        proposal = self.proposer.last
        if proposal is not None and proposal.repaired:
            trial.set_user_attr(REPAIRED, self._differing(proposal.drawn, choices))
        if proposal is not None and proposal.varied:
            trial.set_user_attr(VARIED, proposal.varied)
        self._repeats = self._repeats + 1 if choices in self.proposer.seen else 0
        self.proposer.seen.add(choices)
        return choices

    def _differing(self, drawn: Choices, choices: Choices) -> dict[str, str]:
        """The labels of ``drawn`` where the two differ."""
        kept = self.proposer.labels(choices)
        return {name: label for name, label in self.proposer.labels(drawn).items() if label != kept[name]}

    def table(self) -> pd.DataFrame:
        """Every trial in a row: its state, its values as predicted and as stitched, and its choices."""
        return pd.DataFrame([_row(trial, self.costs) for trial in self.study.get_trials(deepcopy=False)])

    def scored(self) -> list[Scored]:
        """Every distinct plan that was evaluated and keeps the budgets."""
        found = []
        for trial in self._known.values():
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            costs = dict(zip(self.costs, trial.values[1:], strict=True))
            found.append(Scored(trial.number, plan, trial.values[0], trial.user_attrs[ERROR], costs))
        return sorted(found, key=lambda s: s.number)


def sampler_settings(menu: Menu, costs: int, seed: int = 0, population: int = POPULATION) -> SamplerSettings:
    """What a sampler of a menu is made for, with the divergence as an objective beside the costs."""
    free = sum(len(knob.options) > 1 for knob in menu.knobs)
    return SamplerSettings(seed=seed, population=population, objectives=1 + costs, knobs=free)


def _row(trial: FrozenTrial, costs: Sequence[str]) -> dict[str, object]:
    values = trial.values or [None] * (1 + len(costs))
    return {
        "number": trial.number,
        "state": trial.state.name,
        "divergence": values[0],
        "error": trial.user_attrs.get(ERROR),
        **dict(zip(costs, values[1:], strict=True)),
        "same_as": trial.user_attrs.get(SAME_AS),
        "repaired": len(trial.user_attrs[REPAIRED]) if REPAIRED in trial.user_attrs else None,
        "failure": trial.user_attrs.get(FAILURE),
        "seconds": trial.user_attrs.get("seconds"),
        **trial.params,
    }
