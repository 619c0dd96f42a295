"""Moves a plan that breaks hard budgets to one near it that keeps them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autocompress.search.menu import Menu, Option
from autocompress.search.pricing import ChoicePricer, Choices, Floats, Ints, neighbours
from autocompress.search.seeds import Sensitivity, uniform_seeds

MOST_PRICED = 20_000
"""Neighbours priced for one plan: a fifth of a second for a network of fifty layers."""

SHARE = 0.5
"""Of the excess that is worked off before prices are taken anew."""

MARGIN = 1e-9
"""By which a repaired plan keeps its budgets, so that rounding cannot make it break one."""

LEAST_HARM = 1e-3
"""Estimates of harm below this tell nothing apart."""


class Repair:
    """Reduces the excess of a plan over its budgets where that harms least: greedily, one option of a knob at a time.

    Args:
        menu: the knobs.
        pricer: predicts the costs of choices.
        limits: budgets by cost name.
        sensitivity: the harm that each option does; by channels removed and bits taken away where it is not known.
    """

    def __init__(
        self,
        menu: Menu,
        pricer: ChoicePricer,
        limits: Mapping[str, float],
        sensitivity: Sensitivity | None = None,
    ) -> None:
        self.pricer, self.limits = pricer, dict(limits)
        self._sizes = [len(knob.options) for knob in menu.knobs]
        self._uniform: Ints = np.array(list(dict.fromkeys(uniform_seeds(menu))), dtype=np.int64)
        self._harm = structural_harm(menu) if sensitivity is None else list(sensitivity.divergence)

    def excess(self, choices: Ints) -> Floats:
        """How far each row of ``choices`` lies over its budgets: the sum of the relative excesses, 0 within them."""
        costs = self.pricer(choices)
        over = [np.maximum(costs[name] / limit - 1.0 + MARGIN, 0.0) for name, limit in self.limits.items()]
        return np.asarray(np.sum(over, axis=0), dtype=float) if over else np.zeros(len(choices))

    def __call__(self, choices: Choices) -> Choices | None:
        """The choices themselves where they keep the budgets, else others near them that do; None where none is found.

        Moves that together work off half of the excess are made at once, those that reduce it most for their harm
        first: a plan far over budget takes few rounds.  Where no single move helps (an int8 layer between float ones
        costs conversions on both sides), it starts over from the least harmful uniform plan within the budgets.  What
        turns out not to be needed is taken back in the end.
        """
        excess = self._excess_of(choices)
        if excess == 0.0:
            return choices
        found = self._descended(choices, excess) or self._anchor()
        return None if found is None else self._taken_back(found, choices)

    def _descended(self, choices: Choices, excess: float) -> Choices | None:
        """Moves until the budgets are kept; None where no move helps any more or too many were priced."""
        priced = 0
        while excess > 0.0:
            rows = neighbours(choices, self._sizes)
            priced += len(rows)
            if priced > MOST_PRICED or not len(rows):
                return None
            left = self.excess(rows)
            if left.min() >= excess:
                return None
            choices, excess = self._moved(choices, rows, left, excess)
        return choices

    def _anchor(self) -> Choices | None:
        """The uniform plan that harms least of those within the budgets."""
        kept = self._uniform[self.excess(self._uniform) == 0.0]
        if not len(kept):
            return None
        harm = [sum(float(row[c]) for row, c in zip(self._harm, choices, strict=True)) for choices in kept]
        return _as_choices(kept[int(np.argmin(harm))])

    def _taken_back(self, choices: Choices, wanted: Choices) -> Choices:
        """Gives knobs their old options again, the most harmful changes first, as long as the budgets are kept."""
        while differing := [k for k, (now, old) in enumerate(zip(choices, wanted, strict=True)) if now != old]:
            rows = np.array([[*choices[:k], wanted[k], *choices[k + 1 :]] for k in differing], dtype=np.int64)
            undone = np.array([self._harm[k][choices[k]] - self._harm[k][wanted[k]] for k in differing])
            undone[self.excess(rows) > 0.0] = -np.inf
            best = int(np.argmax(undone))
            if undone[best] == -np.inf:
                break
            choices = _as_choices(rows[best])
        return choices

    def _moved(self, choices: Choices, rows: Ints, left: Floats, excess: float) -> tuple[Choices, float]:
        """The choices after some of the best neighbours' moves, and their excess, which is less than before."""
        useful = np.flatnonzero(left < excess)
        gains = excess - left[useful]
        knobs = (rows[useful] != choices).argmax(axis=1)
        options = rows[useful, knobs]
        harm = np.array([self._harm[k][o] - self._harm[k][choices[k]] for k, o in zip(knobs, options, strict=True)])
        order = np.argsort(-gains / np.maximum(harm, LEAST_HARM), kind="stable")
        moves, worked_off = dict[int, int](), 0.0
        for index in order:
            if worked_off >= SHARE * excess:
                break
            if int(knobs[index]) not in moves:
                moves[int(knobs[index])] = int(options[index])
                worked_off += float(gains[index])
        if len(moves) > 1:
            together = tuple(moves.get(knob, choice) for knob, choice in enumerate(choices))
            after = self._excess_of(together)
            if after < excess:
                return together, after
        # One move is enough; or, as costs do not simply add up, several would undo each other.
        best = int(useful[order[0]])
        return _as_choices(rows[best]), float(left[best])

    def _excess_of(self, choices: Choices) -> float:
        return float(self.excess(np.array([choices], dtype=np.int64))[0])


def _as_choices(row: Ints) -> Choices:
    return tuple(int(choice) for choice in row)


def structural_harm(menu: Menu) -> list[Floats]:
    """A stand-in for the sensitivity: the share of channels taken away, and what coarse numbers cost in general."""
    return [
        np.array([_harm_of(option, max(o.keep or 1 for o in knob.options)) for option in knob.options])
        for knob in menu.knobs
    ]


def _harm_of(option: Option, size: int) -> float:
    lost = 0.0 if option.keep is None else 1.0 - option.keep / size
    rounding = 0.1 * (4.0 / option.format.storage.bits) ** 2
    return lost + rounding + (0.02 if option.format.compute != "fp32" else 0.0)
