"""What a plan's divergence will be, from single swaps and from the plans that were evaluated so far.

Three parts, each drawn to the one before as long as little is known.  (1) A power mean of the swaps' divergences: sums
fall short where several changes meet, and a power of 0.8 followed true divergences a little better than 1 on the two
networks tried.
(2) A monotone curve from that mean to true divergences: they rise above it up to about 1 nat and saturate beyond.
(3) A Gaussian process over the swaps' logarithms: what is left is alike for plans that hurt the same knobs.

Interactions of neighbouring knobs measured by joint swaps (CLADO, 2307.05657) were tried and left out: they had no
consistent effect on random stitches, and the process learns from plans that are evaluated anyway
(``benchmarks/estimate.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autocompress.search.seeds import Sensitivity

Array = npt.NDArray[np.float64]
Choices = npt.NDArray[np.int64]

POWER = 0.8
FLOOR = 1e-4
"""Nats below which divergences are not told apart."""

SOFT = 1e-2
"""Nats of a swap from which its logarithm counts: smaller ones are alike to the process."""

KNOTS = (3e-3, 3e-2, 0.3, 3.0)
"""Nats at which the curve may bend."""

LEAST_SLOPE = 0.05
RIDGE_LEVEL, RIDGE_SLOPE, RIDGE_BEND = 0.01, 3.0, 1.0
"""How firmly the curve's level, slope and bends are drawn to the power mean's own, in observations."""

NOISE, SPREAD = 0.15, 0.4
"""Standard deviations, in logarithms, of what the process takes for noise and of what it explains."""

LENGTH = 2.0
"""The process's length scale for ten knobs; it grows with the root of their number, as distances do."""

MOST_SEEN = 256
"""Evaluated plans that are learned from, the latest: a fit's time grows with the cube of their number."""

FEWEST_SEEN = 5
DIGITS = 4
PRIOR_ERROR, LEAST_ERROR = 0.5, 0.05


class DivergenceEstimate:
    """Predicts the divergence of stitched plans given as choices.

    Attributes:
        error: the standard deviation of the logarithm of true over estimated divergence, from evaluated plans each left
            out in turn.

    >>> estimate = DivergenceEstimate(Sensitivity((np.array([0.0, 0.1]), np.array([0.0, 0.2]))))
    >>> estimate(np.array([[0, 0], [1, 0]]))
    array([0. , 0.1])
    """

    def __init__(self, sensitivity: Sensitivity) -> None:
        rows = sensitivity.divergence
        widest = max(len(row) for row in rows)
        table = np.zeros((len(rows), widest))
        for row, own in zip(rows, table, strict=True):
            own[: len(row)] = np.maximum(row, 0.0)  # rounding takes divergences of nearly nothing below it
        self._power = table**POWER
        self._place = np.log(table + SOFT)
        self._length = LENGTH * (len(rows) / 10) ** 0.5
        self._knobs = np.arange(len(rows))
        self._grid = np.linspace(np.log(FLOOR), np.log(1e3), 256)
        self._curve = self._grid
        self._seen: Array = np.zeros((0, len(rows)))
        self._weights: Array = np.zeros(0)
        self.error = PRIOR_ERROR

    def __call__(self, choices: npt.ArrayLike) -> Array:
        """Divergences in nats.

        Args:
            choices: the option of each knob, ints ``[plans, knobs]``.
        """
        chosen = np.asarray(choices, dtype=np.int64)
        level = self._level(chosen)
        logs = np.interp(np.log(np.maximum(level, FLOOR)), self._grid, self._curve)
        if len(self._seen):
            logs = logs + self._kernel(self._place[self._knobs, chosen], self._seen) @ self._weights
        # A plan that changes nothing diverges by nothing, whatever was learned.
        return _rounded(np.where(level > 0, np.exp(np.minimum(logs, np.log(1e3))), 0.0))

    def learn(self, choices: npt.ArrayLike, divergences: Sequence[float]) -> None:
        """Replaces what was learned by what all these evaluated plans say.

        Args:
            choices: ints ``[plans, knobs]``, in the order of evaluation.
            divergences: their true divergences in nats.
        """
        chosen = np.asarray(choices, dtype=np.int64).reshape(-1, len(self._knobs))[-MOST_SEEN:]
        true = np.asarray(divergences, dtype=np.float64)[-MOST_SEEN:]
        level = self._level(chosen)
        told = level > FLOOR
        if told.sum() < FEWEST_SEEN:
            return
        logs, targets = np.log(level[told]), np.log(np.maximum(true[told], FLOOR))
        self._curve = self._fitted_curve(logs, targets)
        left = targets - np.interp(logs, self._grid, self._curve)
        self._seen = self._place[self._knobs, chosen[told]]
        inverse = np.linalg.inv(self._kernel(self._seen, self._seen) + NOISE**2 * np.eye(len(left)))
        self._weights = inverse @ left
        # What each would have been predicted at without itself, in closed form.
        out = self._weights / np.diag(inverse)
        self.error = float(np.clip(_rounded(np.sqrt(np.mean(out**2))), LEAST_ERROR, 2 * PRIOR_ERROR))

    def _level(self, chosen: Choices) -> Array:
        return np.asarray(self._power[self._knobs, chosen].sum(axis=1) ** (1 / POWER))

    def _fitted_curve(self, logs: Array, targets: Array) -> Array:
        ridge = np.diag([RIDGE_LEVEL, RIDGE_SLOPE, *(RIDGE_BEND for _ in KNOTS)])
        basis = _basis(logs)
        weights = np.linalg.solve(basis.T @ basis + ridge, basis.T @ (targets - logs))
        curve = self._grid + _basis(self._grid) @ weights
        steps = np.maximum(np.diff(curve), LEAST_SLOPE * np.diff(self._grid))
        # Anchored where the data lie, not at an end that a wrong slope would have moved.
        middle = int(np.searchsorted(self._grid, np.median(logs)))
        rising = np.concatenate([[0.0], np.cumsum(steps)])
        return np.asarray(rising - rising[middle] + curve[middle])

    def _kernel(self, a: Array, b: Array) -> Array:
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
        return np.asarray(SPREAD**2 * np.exp(-np.maximum(squares, 0.0) / (2 * self._length**2)))


def _basis(logs: Array) -> Array:
    """``[n, 2 + knots]``: level, slope about 0.1 nats, and a bend at each knot."""
    bends = [np.maximum(logs - np.log(knot), 0.0) for knot in KNOTS]
    return np.stack([np.ones_like(logs), logs - np.log(0.1), *bends], axis=1)


def _rounded(values: npt.ArrayLike) -> Array:
    """To a few significant digits: the last ones of a sum differ from machine to machine, and choices must not."""
    given = np.asarray(values, dtype=np.float64)
    size = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(given), 1e-12))))
    return np.asarray(np.rint(given * size) / size)
