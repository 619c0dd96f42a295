"""The hypervolume that candidates are expected to add to a front, for thousands of candidates whose quality is a guess.

A candidate's costs are known and its drop is not, so what it adds is a function of its drop: over each cell of a grid
on the cost axes, the room between its drop and the least drop of a point that reaches the cell.  With the front's own
costs as grid lines that is exact; a front with more points than lines is rounded to the nearest line.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LINES = {1: 256, 2: 48, 3: 16}
"""Grid lines on each axis, by the number of cost axes."""

LEVELS = 40
"""Drops at which gains are reckoned; between them they are interpolated."""

CHUNK, RECKONED = 512, 256


class GainTable:
    """What a candidate adds to the points present, in the unit box where all axes are to be small.

    Args:
        present: ``[points, 1 + costs]``, the drop first.

    >>> table = GainTable(np.array([[0.0, 0.5], [0.5, 0.0]]))
    >>> table.gains(np.array([[0.25]]), np.array([[0.25]]))
    array([0.0625])
    """

    def __init__(self, present: npt.ArrayLike) -> None:
        points = np.asarray(present, dtype=np.float64)
        points = points[(points < 1.0).all(axis=1)]
        axes = points.shape[1] - 1
        inner = [_thinned(np.maximum(points[:, 1 + axis], 0.0), LINES[axes]) for axis in range(axes)]
        self._lines = [np.unique(np.concatenate([[0.0], lines, [1.0]])) for lines in inner]
        room = np.ones([len(lines) - 1 for lines in self._lines])
        for point in points:
            nearest = [int(np.abs(lines - c).argmin()) for lines, c in zip(self._lines, point[1:], strict=True)]
            reached = tuple(slice(place, None) for place in nearest)
            room[reached] = np.minimum(room[reached], max(point[0], 0.0))
        self._levels = np.unique(np.concatenate([[0.0], _thinned(room.ravel(), LEVELS), [1.0]]))
        self._heights = np.maximum(room[..., None] - self._levels, 0.0)

    def gains(self, drops: npt.ArrayLike, costs: npt.ArrayLike) -> Array:
        """The expected gain of each candidate.

        Args:
            drops: ``[candidates, samples]``: equally likely drops of each.
            costs: ``[candidates, costs]``.
        """
        given, axes = np.asarray(drops, dtype=np.float64), np.asarray(costs, dtype=np.float64)
        parts = [self._some(given[i : i + CHUNK], axes[i : i + CHUNK]) for i in range(0, len(given), CHUNK)]
        return np.asarray(np.concatenate(parts)) if parts else np.zeros(0)

    def _some(self, drops: Array, costs: Array) -> Array:
        covered = [
            np.clip(lines[1:] - np.maximum(lines[:-1], cost[:, None]), 0.0, None)
            for lines, cost in zip(self._lines, costs.T, strict=True)
        ]
        first, *rest = covered
        volume = first @ self._heights.reshape(first.shape[1], -1)
        for lengths in rest:
            # One axis after another is summed away; the levels stay last.
            volume = np.einsum("cn,cnr->cr", lengths, volume.reshape(len(costs), lengths.shape[1], -1))
        return np.asarray(_interpolated(np.clip(drops, 0.0, 1.0), self._levels, volume).mean(axis=1))


def greedy(present: npt.ArrayLike, drops: npt.ArrayLike, costs: npt.ArrayLike, count: int) -> list[int]:
    """The candidates that together promise the most, one after another; those that add nothing are left out.

    Args:
        present: ``[points, 1 + costs]``.
        drops: ``[candidates, samples]``, sorted along the samples; a chosen one counts with its middle drop.
        costs: ``[candidates, costs]``.
        count: how many to choose at most.
    """
    points, given, axes = (np.asarray(values, dtype=np.float64) for values in (present, drops, costs))
    chosen: list[int] = []
    bounds = _settled(GainTable(points).gains(given, axes))
    while len(chosen) < count and len(bounds):
        if chosen:
            bounds = _reckoned_again(GainTable(points), bounds, given, axes)
        best = int(bounds.argmax())
        if bounds[best] <= 0.0:
            break
        chosen.append(best)
        bounds[best] = 0.0
        points = np.vstack([points, [given[best, given.shape[1] // 2], *axes[best]]])
    return chosen


def _reckoned_again(table: GainTable, bounds: Array, drops: Array, costs: Array) -> Array:
    """Gains brought up to date as far as is needed to know the largest: they only fall as points are added."""
    bounds = bounds.copy()
    order = np.argsort(-bounds, kind="stable")
    for start in range(0, len(order), RECKONED):
        some = order[start : start + RECKONED]
        if start and bounds[some[0]] <= bounds[order[:start]].max():
            break
        bounds[some] = np.minimum(bounds[some], _settled(table.gains(drops[some], costs[some])))
    return bounds


def _settled(gains: Array) -> Array:
    """Without last digits, which differ from machine to machine: ties then go to the earlier candidate everywhere."""
    return np.round(gains, 7)


def _thinned(values: Array, most: int) -> Array:
    found = np.unique(values)
    return found if len(found) <= most else np.unique(np.quantile(found, np.linspace(0.0, 1.0, most)))


def _interpolated(at: Array, levels: Array, values: Array) -> Array:
    """Each row of ``values`` ``[n, levels]`` at the places of the same row of ``at`` ``[n, samples]``."""
    above = np.clip(np.searchsorted(levels, at), 1, len(levels) - 1)
    share = (at - levels[above - 1]) / (levels[above] - levels[above - 1])
    rows = np.arange(len(values))[:, None]
    return np.asarray(values[rows, above - 1] * (1.0 - share) + values[rows, above] * share)
