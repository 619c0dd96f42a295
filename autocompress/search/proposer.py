"""Stands between a sampler and the study: what is proposed keeps the budgets and was not evaluated before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.search.menu import Menu
from autocompress.search.pricing import Choices
from autocompress.search.repair import Repair

TRIES = 20
"""Single knobs changed at random to leave a plan that was evaluated before."""


@dataclass(frozen=True)
class Proposal:
    """How a trial came by its choices.

    Attributes:
        drawn: the sampler's own choices.
        choices: those that are evaluated.
        repaired: whether a budget made the difference.
        varied: knobs changed at random because the plan was known.
    """

    drawn: Choices
    choices: Choices
    repaired: bool
    varied: int


class Proposer(BaseSampler):
    """Any Optuna sampler over a menu, with its draws repaired and repetitions varied *before* they are the trial's.

    So the parameters on a trial are those of its plan, and its values and constraints belong to them: crossover hands
    on what was evaluated, and a model of the objectives or of the constraints is fitted to true pairs.  Parameters as
    drawn beside the values of the repaired plan would teach a model a projection instead of a model's costs, and a
    genetic sampler would breed from genes that were never expressed and be repaired again and again.  The price is that
    no sampler sees how far outside it drew; it needs not learn that a region is forbidden that it cannot enter.

    Args:
        base: the sampler.
        menu: the knobs.
        repair: of plans over budget; none where there are no budgets.
        seed: of the random changes.
    """

    def __init__(self, base: BaseSampler, menu: Menu, repair: Repair | None, seed: int) -> None:
        self.base, self.menu, self.repair = base, menu, repair
        self.seen: set[Choices] = set()
        self.last: Proposal | None = None
        self._labels = {knob.name: tuple(option.label for option in knob.options) for knob in menu.knobs}
        self._space: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(labels) for name, labels in self._labels.items() if len(labels) > 1
        }
        self._free = [k for k, knob in enumerate(menu.knobs) if len(knob.options) > 1]
        self._draw = np.random.default_rng(seed)

    @property
    def plans(self) -> int:
        """How many plans the menu has."""
        return math.prod(len(labels) for labels in self._labels.values())

    def labels(self, choices: Sequence[int]) -> dict[str, str]:
        """Choices as the parameters of a trial."""
        return {name: labels[c] for (name, labels), c in zip(self._labels.items(), choices, strict=True)}

    def choices(self, params: Mapping[str, object]) -> Choices | None:
        """The parameters of a trial as choices; None where a knob is missing."""
        if not self._labels.keys() <= params.keys():
            return None
        return tuple(labels.index(str(params[name])) for name, labels in self._labels.items())

    def within(self, choices: Choices) -> Choices:
        """The choices after repair; as they are where they cannot be repaired."""
        repaired = None if self.repair is None else self.repair(choices)
        return choices if repaired is None else repaired

    # ------------------------------------------------------------------------------------- as Optuna calls it

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.last = None
        self.base.before_trial(study, trial)
        if isinstance(self.base, BaseGASampler):
            # A trial whose parameters are all given never asks the sampler, so a genetic one would leave it out of
            # every generation and begin with random plans beside the seeds rather than with the seeds.
            self.base.get_trial_generation(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = self.base.infer_relative_search_space(study, trial)
        params = dict(self.base.sample_relative(study, trial, known))
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self.base.sample_independent(study, trial, name, distribution)
        if trial.system_attrs.get("fixed_params"):
            # Part of what a kill left behind: the given parameters win over whatever is made of the others.
            return params
        drawn = self.choices({**{name: labels[0] for name, labels in self._labels.items()}, **params})
        assert drawn is not None
        self.last = self._proposal(drawn)
        return {name: label for name, label in self.labels(self.last.choices).items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.base.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.base.reseed_rng()
        self._draw = np.random.default_rng()

    # ------------------------------------------------------------------------------------------------- making

    def _proposal(self, drawn: Choices) -> Proposal:
        """Repairs, and walks on at random from a plan that was evaluated before; the last step may be known, too."""
        choices, varied = self.within(drawn), 0
        repaired = choices != drawn
        while choices in self.seen and varied < TRIES and len(self.seen) < self.plans:
            start, varied = self._neighbour(choices), varied + 1
            choices = self.within(start)
            repaired = repaired or choices != start
        return Proposal(drawn, choices, repaired, varied)

    def _neighbour(self, choices: Choices) -> Choices:
        knob = int(self._draw.choice(self._free))
        # One of the other options: the current one's place is skipped.
        option = int(self._draw.integers(len(self.menu.knobs[knob].options) - 1))
        return (*choices[:knob], option + (option >= choices[knob]), *choices[knob + 1 :])
