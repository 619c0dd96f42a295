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

from autocompress.plan import CompressionPlan
from autocompress.search.evaluate import Stitched
from autocompress.search.menu import Menu

logger = logging.getLogger(__name__)

PLAN = "plan"
ERROR = "stitched_error"
SAME_AS = "same_as"
RETRY_OF = "retry_of"
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
        name = f"plans-{menu.digest}"
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
        self.tried: dict[tuple[int, ...], float | None] = {}
        """Choices of every trial, those that wait among them, in order; with the divergence where there is one."""
        self._options = [{o.label: i for i, o in enumerate(knob.options)} for knob in menu.knobs]
        for trial in self.study.get_trials(deepcopy=False):
            labels = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if all(knob.name in labels for knob in menu.knobs):
                chosen = tuple(own[labels[k.name]] for k, own in zip(menu.knobs, self._options, strict=True))
                self._note(chosen, trial.values[0] if trial.state is TrialState.COMPLETE else None)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            plan = CompressionPlan.model_validate_json(trial.user_attrs[PLAN])
            self._known.setdefault(plan.structure_digest, trial)

    def enqueue(self, seeds: Iterable[Sequence[int]]) -> None:
        """Puts plans at the head of the queue, once each."""
        for choices in seeds:
            self._note(tuple(choices), None)
            labels = {k.name: k.options[c].label for k, c in zip(self.menu.knobs, choices, strict=True)}
            self.study.enqueue_trial(labels, skip_if_exists=True)

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
        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return len(self.study.get_trials(deepcopy=False, states=ended))

    def step(
        self,
        price: Callable[[CompressionPlan], Mapping[str, float]],
        evaluate: Callable[[CompressionPlan], Stitched],
    ) -> Scored | None:
        """Runs one trial; None where it broke a budget or failed."""
        trial = self.study.ask()
        choices = tuple(
            own[trial.suggest_categorical(knob.name, list(own))]
            for knob, own in zip(self.menu.knobs, self._options, strict=True)
        )
        self._note(choices, None)
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
                if not math.isfinite(result.divergence):
                    raise ArithmeticError(f"divergence {result.divergence}")
        except (RuntimeError, ValueError, ArithmeticError) as error:
            logger.warning("trial %d failed: %s", trial.number, error)
            trial.set_user_attr("failure", f"{type(error).__name__}: {error}"[:500])
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
        "failure": trial.user_attrs.get("failure"),
        "seconds": trial.user_attrs.get("seconds"),
        **trial.params,
    }
