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

logger = logging.getLogger(__name__)

PLAN = "plan"
ERROR = "stitched_error"
SAME_AS = "same_as"
RETRY_OF = "retry_of"
ADOPTED = "adopted_from"
FAILURE = "failure"
DIGITS = 3


class _Connection(sqlite3.Connection):
    """Leaves it to the system when a commit reaches the disk, which takes longer than evaluating a candidate does.

    A killed process loses nothing by it; only a machine that loses power could.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=OFF")


def open_storage(url: str) -> BaseStorage | str:
    """The storage of an Optuna URL; a file of SQLite does not wait for the disk at every commit."""
    if not url.startswith("sqlite:///"):
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


class PlanStudy:
    """A persistent study over plans.

    Args:
        storage: an Optuna storage URL.
        menu: the knobs.
        costs: cost objectives beside the divergence, in order.
        limits: budgets by cost name.
        seed: of the sampler.
        population: of NSGA-II.
    """

    def __init__(
        self,
        storage: str,
        menu: Menu,
        costs: Sequence[str],
        limits: Mapping[str, float],
        seed: int,
        population: int = 32,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.menu, self.costs, self.limits = menu, tuple(costs), dict(limits)
        # Over other costs or under other limits the same trials would have other values and states.
        self.name = name = f"plans-{digest_of([menu.digest, self.costs, self.limits])}"
        self.study = optuna.create_study(
            storage=open_storage(storage),
            study_name=name,
            load_if_exists=True,
            directions=["minimize"] * (1 + len(costs)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(["divergence", *costs])
        done = len(self.study.get_trials(deepcopy=False))
        # A resumed sampler must not replay the random choices that the first one made.
        self.study.sampler = optuna.samplers.NSGAIISampler(seed=seed + 7919 * done, population_size=population)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Left behind by a killed process: nobody will finish it.  Its plan is queued again, but once only, since it
            # may be what killed the process.
            self.study.tell(trial.number, state=TrialState.FAIL)
            choices = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if choices and RETRY_OF not in trial.user_attrs:
                self.study.enqueue_trial(choices, user_attrs={RETRY_OF: trial.number})
        self._known: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            self._known.setdefault(plan.structure_digest, trial)

    def enqueue(self, seeds: Iterable[Sequence[int]]) -> None:
        """Puts plans at the head of the queue, once each."""
        for choices in seeds:
            labels = {k.name: k.options[c].label for k, c in zip(self.menu.knobs, choices, strict=True)}
            self.study.enqueue_trial(labels, skip_if_exists=True)

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
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            self._known.setdefault(plan.structure_digest, trial)

    @property
    def adopted(self) -> int:
        """Trials that were taken over from another study."""
        return sum(ADOPTED in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    @property
    def trials(self) -> int:
        """Trials that have ended."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return len(self.study.get_trials(deepcopy=False, states=ended))

    def step(
        self,
        price: Callable[[CompressionPlan], Mapping[str, float]],
        evaluate: Callable[[CompressionPlan], Stitched],
    ) -> Scored | None:
        """Runs one trial; None where it broke a budget or failed."""
        trial = self.study.ask()
        choices = []
        for knob in self.menu.knobs:
            labels = [option.label for option in knob.options]
            choices.append(labels.index(trial.suggest_categorical(knob.name, labels)))
        plan = self.menu.plan(choices)
        trial.set_user_attr(PLAN, plan.model_dump_json())
        started = time.monotonic()
        costs = price(plan)
        broken = False
        for name, limit in self.limits.items():
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
        return Scored(trial.number, plan, divergence, result.error, costs)

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


def _row(trial: FrozenTrial, costs: Sequence[str]) -> dict[str, object]:
    values = trial.values or [None] * (1 + len(costs))
    return {
        "number": trial.number,
        "state": trial.state.name,
        "divergence": values[0],
        "error": trial.user_attrs.get(ERROR),
        **dict(zip(costs, values[1:], strict=True)),
        "same_as": trial.user_attrs.get(SAME_AS),
        "failure": trial.user_attrs.get(FAILURE),
        "seconds": trial.user_attrs.get("seconds"),
        **trial.params,
    }
