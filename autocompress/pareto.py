"""Dominance, fronts and hypervolume over arrays of objectives, all minimised."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is no worse than ``b`` anywhere and better somewhere (strict dominance).

    >>> dominates([1, 2], [1, 3]), dominates([1, 2], [1, 2])
    (True, False)
    """
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def pareto_mask(values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which rows of ``values`` ``[points, objectives]`` no other row dominates; equal rows are all kept.

    A row with a NaN is never on the front and dominates nothing.
    """
    table = _table(values)
    mask = np.zeros(len(table), dtype=bool)
    candidates = np.flatnonzero(~np.isnan(table).any(axis=1))
    # In lexicographic order a row can only be dominated by an earlier one, so the first one left is on the front.
    candidates = candidates[np.lexsort(table[candidates].T[::-1])]
    rest = table[candidates]
    while len(candidates):
        first = rest[0]
        mask[candidates[0]] = True
        equal = (rest == first).all(axis=1)
        mask[candidates[equal]] = True
        keep = (rest < first).any(axis=1)
        candidates, rest = candidates[keep], rest[keep]
    return mask


def distinct_mask(values: npt.ArrayLike, tolerance: float = 0.02) -> npt.NDArray[np.bool_]:
    """Which rows to keep so that no two lie within ``tolerance`` of each other on every axis.

    Closeness is relative to the larger of the two values.  Of points that count as one, the earlier row stays: put
    the better one first.
    """
    table = _table(values)
    mask = np.zeros(len(table), dtype=bool)
    for index, row in enumerate(table):
        kept = table[mask]
        scale = np.maximum(np.abs(kept), np.abs(row))
        mask[index] = not (np.abs(kept - row) <= tolerance * scale).all(axis=1).any()
    return mask


def hypervolume(values: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """The volume that the points ``[points, objectives]`` dominate, up to ``reference`` ``[objectives]``.

    Exact for up to four objectives.  Points that do not lie below the reference on every axis add nothing.

    >>> hypervolume([[0.0, 0.5], [0.5, 0.0]], [1.0, 1.0])
    0.75
    """
    corner = np.asarray(reference, dtype=np.float64)
    table = _table(values, columns=len(corner))
    if not 1 <= len(corner) <= 4:
        raise ValueError(f"hypervolume is for 1 to 4 objectives, not {len(corner)}")
    gains = corner - table[(table < corner).all(axis=1)]
    gains = gains[pareto_mask(-gains)]
    return _volume(np.unique(gains, axis=0))


def _table(values: npt.ArrayLike, columns: int | None = None) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.size == 0 and table.ndim < 2:
        return np.zeros((0, columns or 1))
    if table.ndim != 2 or (columns is not None and table.shape[1] != columns):
        raise ValueError(f"expected [points, {columns or 'objectives'}], got an array of shape {table.shape}")
    return table


def _volume(gains: Array) -> float:
    """The union of the boxes ``[0, gain]``; the rows are distinct and positive."""
    if len(gains) == 0:
        return 0.0
    dimensions = gains.shape[1]
    if dimensions == 1:
        return float(gains.max())
    if dimensions == 2:
        ordered = gains[np.argsort(-gains[:, 0])]
        heights = np.maximum.accumulate(ordered[:, 1])
        widths = ordered[:, 0] - np.append(ordered[1:, 0], 0.0)
        return float((widths * heights).sum())
    if dimensions == 3:
        return _volume_3d(gains)
    # Slices along the last axis: each point adds, for the depth below it, what its box adds to the slice's volume.
    ordered = gains[np.argsort(-gains[:, -1])]
    depths = ordered[:, -1] - np.append(ordered[1:, -1], 0.0)
    total = area = 0.0
    slices = ordered[:, :-1]
    for index, (point, depth) in enumerate(zip(slices, depths, strict=True)):
        shared = np.minimum(slices[:index], point)
        shared = np.unique(shared[pareto_mask(-shared)], axis=0) if index else shared
        area += float(point.prod()) - _volume(shared)
        total += depth * area
    return total


def _volume_3d(gains: Array) -> float:
    """Sweeps down the last axis, keeping the staircase of the other two sorted: x rising, y falling."""
    xs: list[float] = []
    ys: list[float] = []
    total = area = 0.0
    ordered = gains[np.argsort(-gains[:, 2])]
    depths = ordered[:, 2] - np.append(ordered[1:, 2], 0.0)
    for (x, y, _), depth in zip(ordered.tolist(), depths.tolist(), strict=True):
        position = bisect_left(xs, x)
        if position == len(xs) or ys[position] < y:
            # Steps that the new corner covers: x no larger, y no larger.  ys fall, so they end where ys exceed y.
            end = bisect_right(xs, x)
            start = end
            while start > 0 and ys[start - 1] <= y:
                start -= 1
            left = xs[start - 1] if start else 0.0
            added, edge = 0.0, left
            for step in range(start, end):
                added += (xs[step] - edge) * (y - ys[step])
                edge = xs[step]
            floor = ys[end] if end < len(ys) else 0.0
            added += (x - edge) * (y - floor)
            area += added
            xs[start:end], ys[start:end] = [x], [y]
        total += depth * area
    return total
