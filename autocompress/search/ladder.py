"""Which structures to recover next: those that promise the most hypervolume once they are recovered."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import TrialState

from autocompress.pareto import hypervolume
from autocompress.plan import Recipe
from autocompress.search.scoring import span_of
from autocompress.search.study import FAILURE, open_storage
from autocompress.spaces import Distillation

logger = logging.getLogger(__name__)

PRIOR_GAP, PRIOR_POWER = 0.02, 0.5
"""Expected loss of quality after recovery at a divergence of 0.1 nats, and its growth with divergence."""


@dataclass(frozen=True)
class Observation:
    """A structure that was recovered: its divergence before, and the quality it lost against the original after."""

    divergence: float
    gap: float


class RecoveryForecast:
    """Predicts what a structure loses after recovery from its divergence before: ``gap = a divergence^b``.

    Rankings before recovery mislead mostly in scale, not in order; the curve is refitted after every recovery, in
    logarithms, drawn towards the prior by two pseudo-observations.
    """

    def __init__(self) -> None:
        self._seen: list[Observation] = []

    def add(self, divergence: float, gap: float) -> None:
        self._seen.append(Observation(divergence, gap))

    def predict(self, divergence: np.ndarray) -> np.ndarray:
        """Expected loss of quality, as a fraction."""
        prior = [(0.01, PRIOR_GAP * 0.1**PRIOR_POWER), (1.0, PRIOR_GAP * 10**PRIOR_POWER)]
        points = prior + [(o.divergence, o.gap) for o in self._seen if o.divergence > 1e-4]
        x = np.log([max(d, 1e-4) for d, _ in points])
        y = np.log([max(g, 5e-4) for _, g in points])
        weights = np.array([0.5, 0.5] + [1.0] * (len(points) - 2))
        slope, offset = np.polyfit(x, y, 1, w=weights)
        slope = float(np.clip(slope, 0.1, 1.5))
        offset = float(np.average(y - slope * x, weights=weights))
        return np.asarray(np.exp(offset + slope * np.log(np.maximum(divergence, 1e-4))))


def box(drop: float, costs: Mapping[str, float], reference: Mapping[str, float], span: float) -> list[float]:
    """A point in the unit box of ``scoring.front_hypervolume``, one axis a cost behind the drop's.

    Args:
        drop: of quality, as a fraction.
        costs: by name.
        reference: the original's costs.
        span: the drop in points that is worth nothing.
    """
    axes = cost_axes(np.array([list(costs.values())]), list(costs), reference)[0]
    return [max(0.0, drop) * 100.0 / span, *axes.tolist()]


def cost_axes(costs: np.ndarray, names: Sequence[str], reference: Mapping[str, float]) -> np.ndarray:
    """The axes of ``box`` behind the drop's.

    Args:
        costs: ``[points, names]``.
        names: of the columns.
        reference: the original's costs.
    """
    spans = np.array([span_of(name) for name in names])
    whole = np.array([max(reference[name], 1e-12) for name in names])
    gains = np.log2(whole / np.maximum(costs, 1e-12)) / spans
    return np.asarray(1.0 - np.minimum(gains, 1.0))


def gains_of(present: Sequence[Sequence[float]], candidates: Sequence[Sequence[float]]) -> list[float]:
    """The hypervolume that each candidate alone adds to the points present."""
    if not candidates:
        return []
    corner = [1.0] * len(candidates[0])
    base = hypervolume(np.array(present).reshape(-1, len(corner)), corner)
    return [hypervolume(np.array([*present, c]), corner) - base for c in candidates]


class RecipeStudy:
    """Optuna's choice of distillation settings; its objective is the share of the quality gap that stays open."""

    def __init__(self, storage: str, options: Distillation, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.options = options
        self.study = optuna.create_study(storage=open_storage(storage), study_name="recipes", load_if_exists=True)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
        done = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + 7919 * done, n_startup_trials=4)
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
        trial.set_user_attr("structure", key)
        if failure:
            trial.set_user_attr(FAILURE, failure)
        if open_share is None or not math.isfinite(open_share):
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, open_share)

    def best(self) -> Recipe:
        """The recipe that has closed the most so far; before there is any, the default as near as the space allows."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return Recipe(**min(done, key=lambda t: t.values[0]).params) if done else self.default


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
