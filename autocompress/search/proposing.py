"""What a run's proposals are made from: its menu, its prices, its budgets and what a drop is worth in it."""

from __future__ import annotations

import numpy as np

from autocompress.search.context import Context
from autocompress.search.estimate import DivergenceEstimate
from autocompress.search.gain import LINES
from autocompress.search.ladder import RecoveryForecast, cost_axes
from autocompress.search.pricing import NamedPrices
from autocompress.search.propose import Boxes, Proposals
from autocompress.search.seeds import Sensitivity, dp_surface, uniform_seeds


def make_proposals(context: Context, sensitivity: Sensitivity) -> Proposals:
    """Proposals for one run, their first pools seeded with uniform plans and by dynamic programming."""
    menu, skeleton = context.menu, context.original.skeleton
    forecast = RecoveryForecast()

    def drop(divergences: np.ndarray) -> np.ndarray:
        # By the root, so that the cheap end counts too, and of the loss that is left after recovery.
        expected = forecast.predict(np.asarray(divergences, dtype=np.float64))
        return np.asarray(np.sqrt(expected * 100.0 / context.widest_drop))

    counted = context.costs[: len(LINES)]

    def axes(costs: np.ndarray) -> np.ndarray:
        return cost_axes(costs, counted, context.reference)

    names = tuple(dict.fromkeys([*counted, *context.hard]))
    seeds = [*uniform_seeds(menu), *dp_surface(menu, sensitivity, NamedPrices(menu, skeleton, context.costs))]
    return Proposals(
        menu,
        DivergenceEstimate(sensitivity),
        NamedPrices(menu, skeleton, names),
        len(counted),
        context.hard,
        Boxes(drop, axes),
        seeds,
        context.config.seed,
    )
