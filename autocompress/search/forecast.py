"""What a structure is expected to lose, from its size before it is trained and from its training after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FLOOR = 0.01
"""Losses are compared by the logarithm of this much more than they are: near zero, and below it, they differ little."""

PRIOR = np.array([np.log(FLOOR), -0.08, -0.08, 0.9, -0.45, -0.05])
"""Expected weights of a constant, the halvings of MACs and of parameters (negative: fewer is worse), the share of the
residual blocks that left, the rung, and the rung times the halvings of MACs: small structures gain less by each."""

PRIOR_DEVIATION = np.array([0.3, 0.06, 0.06, 0.6, 0.15, 0.03])
NOISE = 0.2
"""Standard deviation of a structure's logarithm about what its size says."""


class CapacityForecast:
    """Predicts the loss of a structure at a rung: the logarithm is linear in those of MACs and parameters and in depth,
    and falls from rung to rung by a step that depends on the MACs.

    What was measured corrects a prior by Bayesian linear regression (Bishop, Pattern Recognition and Machine Learning,
    3.3).  Each rung trains longer than the one before it.

    >>> forecast = CapacityForecast()
    >>> small, large = forecast.predict([0.02, 0.2], [0.02, 0.2], [0.5, 0.5], 1)
    >>> bool(small > large)
    True
    """

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._logs: list[float] = []
        self._solved: Array | None = None

    def add(self, macs: float, parameters: float, left_out: float, rung: int, gap: float) -> None:
        """Notes what a structure lost.

        Args:
            macs: multiply-accumulates, as a share of the original's.
            parameters: likewise.
            left_out: share of the residual blocks that can leave which did.
            rung: after which it was measured.
            gap: quality below the original's, as a fraction.
        """
        self._rows.append(_features([macs], [parameters], [left_out], rung)[0])
        self._logs.append(_log(gap))
        self._solved = None

    def predict(
        self, macs: Sequence[float], parameters: Sequence[float], left_out: Sequence[float], rung: int
    ) -> Array:
        """Expected loss of quality of structures ``[n]`` at a rung, as a fraction."""
        return np.asarray(np.exp(_features(macs, parameters, left_out, rung) @ self._weights()) - FLOOR)

    def promoted(self, gap: float, macs: float, share: float = 1.0) -> float:
        """The loss of a structure one rung up, or a share of that rung's way, from its loss now.

        Args:
            gap: its loss now, as a fraction.
            macs: its multiply-accumulates, as a share of the original's.
            share: of the rung's way.
        """
        *_, rungs, rungs_by_macs = self._weights()
        slope = min(float(rungs + rungs_by_macs * np.log2(macs)), 0.0)
        return float(np.exp(_log(gap) + slope * np.log2(1.0 + share)) - FLOOR)

    def _weights(self) -> Array:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def _solve(self) -> Array:
        precision = np.diag(PRIOR_DEVIATION**-2.0)
        target = precision @ PRIOR
        if self._rows:
            rows, logs = np.stack(self._rows), np.array(self._logs)
            precision = precision + rows.T @ rows / NOISE**2
            target = target + rows.T @ logs / NOISE**2
        return np.asarray(np.linalg.solve(precision, target))


def doubted(gap: float, doubt: float) -> float:
    """A loss whose logarithm is off by a doubt.

    >>> round(doubted(0.03, 0.2), 4), doubted(0.0, -0.2)
    (0.0389, 0.0)
    """
    return max(float(np.exp(_log(gap) + doubt)) - FLOOR, 0.0)


def _log(gap: float) -> float:
    return float(np.log(max(gap + FLOOR, 0.2 * FLOOR)))


def _features(macs: Sequence[float], parameters: Sequence[float], left_out: Sequence[float], rung: int) -> Array:
    columns = [np.ones(len(macs)), np.log2(macs), np.log2(parameters), np.asarray(left_out)]
    return np.stack([*columns, np.full(len(macs), rung - 1.0), (rung - 1.0) * columns[1]], axis=1)
