"""What a structure is expected to lose, from its size before it is trained and from its training after."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FLOOR = 0.01
"""Losses are compared by the logarithm of this much more than they are: near zero, and below it, they differ little."""

PRIOR = np.array([np.log(FLOOR), -0.3, -0.3, -0.35])
"""Expected weights of a constant, the halvings of MACs and of parameters (negative: fewer is worse), and the rung."""

PRIOR_DEVIATION = np.array([0.4, 0.12, 0.12, 0.15])
NOISE = 0.2
"""Standard deviation of a structure's logarithm about what its size says."""


class CapacityForecast:
    """Predicts the loss of a structure at a rung: its logarithm is linear in the logarithms of MACs and parameters.

    What was measured corrects a prior by Bayesian linear regression (Bishop, Pattern Recognition and Machine Learning,
    3.3).  A rung trains for twice the time of the one before it.

    >>> forecast = CapacityForecast()
    >>> small, large = forecast.predict([0.02, 0.2], [0.02, 0.2], 1)
    >>> bool(small > large)
    True
    """

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._logs: list[float] = []

    def add(self, macs: float, parameters: float, rung: int, gap: float) -> None:
        """Notes what a structure lost.

        Args:
            macs: multiply-accumulates, as a share of the original's.
            parameters: likewise.
            rung: after which it was measured.
            gap: quality below the original's, as a fraction.
        """
        self._rows.append(_features(np.array([macs]), np.array([parameters]), rung)[0])
        self._logs.append(_log(gap))

    def predict(self, macs: npt.ArrayLike, parameters: npt.ArrayLike, rung: int) -> Array:
        """Expected loss of quality of structures ``[n]`` at a rung, as a fraction."""
        rows = _features(np.asarray(macs, dtype=np.float64), np.asarray(parameters, dtype=np.float64), rung)
        return np.asarray(np.exp(rows @ self._weights()) - FLOOR)

    def promoted(self, gap: float, share: float = 1.0) -> float:
        """The loss of a structure one rung up, or a share of that rung's way, from its loss now."""
        slope = min(float(self._weights()[3]), 0.0)
        return float(np.exp(_log(gap) + slope * np.log2(1.0 + share)) - FLOOR)

    def _weights(self) -> Array:
        precision = np.diag(PRIOR_DEVIATION**-2.0)
        target = precision @ PRIOR
        if self._rows:
            rows, logs = np.stack(self._rows), np.array(self._logs)
            precision = precision + rows.T @ rows / NOISE**2
            target = target + rows.T @ logs / NOISE**2
        return np.asarray(np.linalg.solve(precision, target))


def _log(gap: float) -> float:
    return float(np.log(max(gap + FLOOR, 0.2 * FLOOR)))


def _features(macs: Array, parameters: Array, rung: int) -> Array:
    ones = np.ones_like(macs)
    return np.stack([ones, np.log2(macs), np.log2(parameters), (rung - 1.0) * ones], axis=1)
