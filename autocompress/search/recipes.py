"""Optuna's choice of how structures are recovered: distillation settings, and whether formats are trained for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from autocompress.plan import Recipe
from autocompress.search.study import FAILURE, open_storage, requeue_interrupted
from autocompress.spaces import Distillation

logger = logging.getLogger(__name__)

QAT = "qat"
"""What the trials of ``FormatsStudy`` choose."""


class RecipeStudy:
    """Optuna's choice of distillation settings; its objective is the share of the quality gap that stays open."""

    def __init__(self, storage: str, options: Distillation, seed: int, prefix: str = "") -> None:
        self.options = options
        self.study = _opened(storage, f"{prefix}recipes", seed)
        default = Recipe()
        first = {
            "alpha": _closest(options.alpha, default.alpha),
            "temperature": _closest(options.temperature, default.temperature),
            "feature_weight": _closest(options.feature_weight, default.feature_weight),
            "learning_rate": _closest(options.learning_rate, default.learning_rate),
        }
        self.default = Recipe(**first)
        self.study.enqueue_trial(first, skip_if_exists=True)

    def ask(self) -> tuple[optuna.Trial, Recipe]:
        """A trial and the recipe it stands for."""
        trial = self.study.ask()
        return trial, Recipe(
            alpha=trial.suggest_categorical("alpha", list(self.options.alpha)),
            temperature=trial.suggest_categorical("temperature", list(self.options.temperature)),
            feature_weight=trial.suggest_categorical("feature_weight", list(self.options.feature_weight)),
            learning_rate=trial.suggest_categorical("learning_rate", list(self.options.learning_rate)),
        )

    def tell(self, trial: optuna.Trial, open_share: float | None, key: str, failure: str = "") -> None:
        """Records how much of the gap stayed open; None, and why, for a recovery that failed."""
        _told(self.study, trial, open_share, key, failure)

    def best(self) -> Recipe:
        """The recipe that has closed the most so far; before there is any, the default as near as the space allows."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return Recipe(**min(done, key=lambda t: t.values[0]).params) if done else self.default


class FormatsStudy:
    """Optuna's choice whether 4-bit weights are trained with their rounding simulated (QAT), or rounded at the end.

    Simulation takes time from the float weights, so it is judged by what comes of both: the objective is the share of
    the quality gap that a turn's best model with such weights leaves open.
    """

    def __init__(self, storage: str, options: Distillation, seed: int, prefix: str = "") -> None:
        self.options = options
        self.study = _opened(storage, f"{prefix}formats", seed)
        for choice in options.qat:
            self.study.enqueue_trial({QAT: choice}, skip_if_exists=True)

    def ask(self) -> tuple[optuna.Trial, bool]:
        """A trial and what it chose."""
        trial = self.study.ask()
        return trial, bool(trial.suggest_categorical(QAT, list(self.options.qat)))

    def tell(self, trial: optuna.Trial, open_share: float | None, key: str) -> None:
        """Records how much of the gap stayed open; None where no such model came of the turn."""
        _told(self.study, trial, open_share, key)


def _opened(storage: str, name: str, seed: int) -> optuna.Study:
    """A study of the run, created or taken up."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=open_storage(storage), study_name=name, load_if_exists=True)
    requeue_interrupted(study)
    done = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed + 7919 * done, n_startup_trials=4)
    return study


def _told(study: optuna.Study, trial: optuna.Trial, value: float | None, key: str, failure: str = "") -> None:
    trial.set_user_attr("structure", key)
    if failure:
        trial.set_user_attr(FAILURE, failure)
    if value is None or not math.isfinite(value):
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def without_labels(options: Distillation) -> Distillation:
    """The settings where training samples have no targets: the teacher alone is followed."""
    if options.alpha != (1.0,):
        shown = ", ".join(f"{alpha:g}" for alpha in options.alpha)
        logger.info(
            "train has no targets: recovery follows the teacher alone (alpha 1), the space's alpha (%s) is left out",
            shown,
        )
    return options.model_copy(update={"alpha": (1.0,)})


def _closest(options: Sequence[float], wanted: float) -> float:
    return min(options, key=lambda value: abs(value - wanted))
