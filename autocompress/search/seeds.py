"""Plans to start from: uniform ones, and a front by dynamic programming over sensitivities (SPDY, 2201.13096)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autocompress.plan import CompressionPlan, Compute
from autocompress.progress import Progress
from autocompress.search.menu import Menu, Option

Array = npt.NDArray[np.float64]
Pricer = Callable[[npt.NDArray[np.int64]], Array]
"""Gives the costs ``[plans, resources]`` of choices ``[plans, knobs]``."""

Judge = Callable[[Sequence[CompressionPlan]], Iterable[tuple[int, float]]]
"""Gives the index of each plan with its divergence, in any order."""

BINS = 400


@dataclass(frozen=True)
class Sensitivity:
    """How much worse the model gets when one knob alone takes an option: one array of divergences a knob."""

    divergence: tuple[Array, ...]

    def estimate(self, choices: Sequence[int]) -> float:
        """The sum over knobs: near the truth while losses are small; ``DivergenceEstimate`` does better."""
        return float(sum(row[choice] for row, choice in zip(self.divergence, choices, strict=True)))


def measure_sensitivity(menu: Menu, judge: Judge, progress: Progress) -> Sensitivity:
    """Evaluates each width and each format of each knob on its own; an option counts as the sum of its two parts."""
    dense, swaps = base_options(menu), single_swaps(menu)
    progress.stage("sensitivity", len(swaps))
    plans = [menu.plan_of([*dense[:index], option, *dense[index + 1 :]]) for index, option in swaps]
    losses: dict[tuple[int, Option], float] = {}
    for place, divergence in judge(plans):
        # Rounded, because the last digits differ from process to process and the seeds should not.
        losses[swaps[place]] = float(f"{divergence:.3g}")
        progress.advance()
    rows = []
    for index, (knob, whole) in enumerate(zip(menu.knobs, dense, strict=True)):
        parts = [(Option(option.keep, whole.format), Option(whole.keep, option.format)) for option in knob.options]
        rows.append(np.array([sum(losses.get((index, part), 0.0) for part in pair) for pair in parts]))
    return Sensitivity(tuple(rows))


def single_swaps(menu: Menu) -> list[tuple[int, Option]]:
    """(knob, option) of everything that is evaluated on its own: each width in the best format, each format whole."""
    swaps: list[tuple[int, Option]] = []
    for index, (knob, whole) in enumerate(zip(menu.knobs, base_options(menu), strict=True)):
        # Built as they are: a menu that was pruned may hold a width in one format and not in the other.
        widths = [Option(keep, whole.format) for keep in sorted({o.keep for o in knob.options if o.keep is not None})]
        formats = [Option(whole.keep, form) for form in dict.fromkeys(o.format for o in knob.options)]
        swaps += [(index, option) for option in (*widths, *formats) if option != whole]
    return swaps


def base_options(menu: Menu) -> list[Option]:
    """The options of the plan that single changes are measured against: whole, in the best format on the menu."""
    choices = menu.uniform(1.0, "fp32", 32)
    return [knob.options[choice] for knob, choice in zip(menu.knobs, choices, strict=True)]


def knapsack(losses: Sequence[Array], costs: Sequence[Array], budgets: Sequence[float]) -> list[tuple[int, ...]]:
    """For each budget the choices of least total loss whose total cost does not exceed it, by dynamic programming.

    Args:
        losses: one array a knob, the loss of each option.
        costs: the same shape, non-negative.
        budgets: total costs allowed; the largest sets the resolution (1/400 of it).

    Returns:
        One tuple of option indices for each budget that can be met.

    >>> knapsack([np.array([0.0, 1.0]), np.array([0.0, 5.0])], [np.array([2.0, 1.0]), np.array([2.0, 1.0])], [3.0])
    [(1, 0)]
    """
    step = max(budgets) / BINS
    # Costs are rounded up: a budget met on the grid is met in truth.
    grid = [np.ceil(np.asarray(cost) / step - 1e-9).astype(int) for cost in costs]
    best = np.zeros(BINS + 1)
    picks: list[npt.NDArray[np.int64]] = []
    for loss, cost in zip(losses, grid, strict=True):
        table = np.full((len(loss), BINS + 1), np.inf)
        for option, (value, bins) in enumerate(zip(loss, cost, strict=True)):
            if bins <= BINS:
                table[option, bins:] = best[: BINS + 1 - bins] + value
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    found: list[tuple[int, ...]] = []
    for budget in budgets:
        place = int(budget / step + 1e-9)
        if not np.isfinite(best[place]):
            continue
        choices = []
        for pick, cost in zip(reversed(picks), reversed(grid), strict=True):
            option = int(pick[place])
            choices.append(option)
            place -= int(cost[option])
        found.append(tuple(reversed(choices)))
    return found


def dp_surface(menu: Menu, sensitivity: Sensitivity, price: Pricer, mixtures: int = 5) -> list[tuple[int, ...]]:
    """Choices spread over the front in all resources: a ``dp_front`` for each resource and for mixtures of two.

    A plan that is the best for a mixture of the resources is one that no plan beats in both.  Each resource counts as
    a share of the dense plan's.

    Args:
        menu: the knobs.
        sensitivity: of each option.
        price: gives all resources.
        mixtures: fronts for each pair of resources, those of one resource alone counted.
    """
    dense = price(np.array([menu.uniform(1.0, "fp32", 32)]))[0]
    count = len(dense)
    weights = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        for share in np.linspace(0.0, 1.0, mixtures)[1:-1]:
            weights.append(tuple(float({i: share, j: 1.0 - share}.get(k, 0.0)) for k in range(count)))
    found: dict[tuple[int, ...], None] = {}
    for mixture in weights:
        scale = np.array(mixture) / np.maximum(dense, 1e-12)

        def mixed(choices: npt.NDArray[np.int64], scale: Array = scale) -> Array:
            return np.asarray(price(choices) @ scale)

        found |= dict.fromkeys(dp_front(menu, sensitivity, mixed))
    return list(found)


def dp_front(
    menu: Menu, sensitivity: Sensitivity, price: Callable[[npt.NDArray[np.int64]], Array], count: int = 8
) -> list[tuple[int, ...]]:
    """Choices along one resource, from cheap to dear.

    Costs are not additive (a layer's time depends on both its widths), so each option's cost is its marginal one,
    taken about a middling plan and then again about the plan that was found.

    Args:
        menu: the knobs.
        sensitivity: of each option.
        price: the cost ``[plans]`` of choices ``[plans, knobs]``.
        count: budgets, from tight to wide.
    """
    found: dict[tuple[int, ...], None] = {}
    middle = menu.uniform(0.5, "int8", 8)
    around = _marginal_costs(menu, middle, price)
    for share in np.geomspace(0.06, 0.9, count):
        costs = around
        chosen: list[tuple[int, ...]] = []
        for repeat in range(2):
            if repeat:
                costs = _marginal_costs(menu, chosen[0], price)
            # Between the cheapest and the dearest: of a small model's latency much is the same whatever is chosen.
            low, high = (sum(float(end(row)) for row in costs) for end in (np.min, np.max))
            chosen = knapsack(sensitivity.divergence, costs, [low + float(share) * (high - low)])
            if not chosen:
                break
        if chosen:
            found[chosen[0]] = None
    return list(found)


def _marginal_costs(menu: Menu, centre: Sequence[int], price: Callable[[npt.NDArray[np.int64]], Array]) -> list[Array]:
    """What each option of each knob costs beside ``centre``'s others, an equal share of the rest included."""
    sizes = [len(knob.options) for knob in menu.knobs]
    choices = np.tile(np.array(centre, dtype=np.int64), (1 + sum(sizes), 1))
    choices[1:][np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)] = np.concatenate(
        [np.arange(size) for size in sizes]
    )
    base, *prices = price(choices).tolist()
    starts = np.cumsum([0, *sizes])
    rows = [np.array(prices[start : start + size]) for start, size in zip(starts, sizes, strict=False)]
    # Each knob carries its marginal saving and an equal share of what no knob accounts for.
    rows = [row - row.min() for row in rows]
    rest = max(0.0, base - sum(float(row[c]) for row, c in zip(rows, centre, strict=True)))
    return [row + rest / len(rows) for row in rows]


FORMATS: tuple[tuple[Compute, int], ...] = (("fp32", 32), ("int8", 8), ("int8", 4), ("fp32", 8), ("fp32", 4))


SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.0)


def uniform_seeds(menu: Menu, shares: Sequence[float] = SHARES) -> Iterator[tuple[int, ...]]:
    """Dense, uniform int8 and 4-bit, uniform widths in each format, and the narrowest the menu has."""
    for share in shares:
        for compute, bits in FORMATS:
            yield menu.uniform(share, compute, bits)
