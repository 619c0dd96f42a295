"""What a structure is expected to lose once it is recovered, and the box in which candidates are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.search.gain import GainTable
from autocompress.search.scoring import span_of

NEAR, FARTHEST = 0.995, 2.0
"""Savings up to the end of the reported hypervolume's box fill this share of an axis; the rest is for up to so many
times as many halvings.  Without it a search would be done once a front fills the box; with a tenth of each axis, it
would spend much of its time beyond."""

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
    """A point in the unit box that gains are reckoned in, one axis a cost behind the drop's.

    Args:
        drop: of quality, as a fraction.
        costs: by name.
        reference: the original's costs.
        span: the drop in points that is worth nothing.
    """
    axes = cost_axes(np.array([list(costs.values())]), list(costs), reference)[0]
    return [max(0.0, drop) * 100.0 / span, *axes.tolist()]


def cost_axes(costs: np.ndarray, names: Sequence[str], reference: Mapping[str, float]) -> np.ndarray:
    """The axes of ``box`` behind the drop's: those of ``scoring.front_hypervolume``, with room beyond their ends.

    >>> eight_times, sixteen_times = cost_axes(np.array([[1.0], [0.5]]), ["latency_ms"], {"latency_ms": 8.0}).round(3)
    >>> float(eight_times[0]), float(sixteen_times[0])
    (0.005, 0.003)

    Args:
        costs: ``[points, names]``.
        names: of the columns.
        reference: the original's costs.
    """
    spans = np.array([span_of(name) for name in names])
    whole = np.array([max(reference[name], 1e-12) for name in names])
    gains = np.log2(whole / np.maximum(costs, 1e-12)) / spans
    beyond = NEAR + (1.0 - NEAR) * (gains - 1.0) / (FARTHEST - 1.0)
    return np.asarray(1.0 - np.minimum(np.minimum(NEAR * gains, beyond), 1.0))


def gains_of(present: Sequence[Sequence[float]], candidates: Sequence[Sequence[float]]) -> list[float]:
    """The hypervolume that each candidate alone adds to the points present, in the unit box."""
    if not candidates:
        return []
    rows = np.array(candidates, dtype=np.float64)
    points = np.array(present, dtype=np.float64).reshape(-1, rows.shape[1])
    if rows.shape[1] == 1:
        return [float(gain) for gain in np.maximum(points.min(initial=1.0) - rows[:, 0], 0.0)]
    return [float(gain) for gain in GainTable(points).gains(rows[:, :1], rows[:, 1:])]
