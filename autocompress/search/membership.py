"""Which of the candidates that keep the budgets make up the front, over one objective or several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autocompress.pareto import distinct_mask, pareto_mask

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ALIKE = 0.02
"""Relative difference up to which two values of an objective count as one."""


def front_mask(values: Array, errors: Sequence[float]) -> Mask:
    """Which candidates are on the front.

    Of several objectives that is what no other candidate dominates.  Of a single one it is the best candidate, with
    those that are within 2% of it and have the better quality: a difference that small is no reason to lose accuracy.

    Args:
        values: ``[candidates, objectives]``, minimised; of candidates alike, the first is preferred.
        errors: of the candidates, whether an objective or not.
    """
    count = len(values)
    if count == 0 or values.shape[1] > 1:
        return pareto_mask(values) if count else np.zeros(0, dtype=bool)
    column = values[:, 0]
    close = np.flatnonzero(column <= column.min() + ALIKE * abs(column.min()))
    if (column == np.asarray(errors)).all():
        close = close[column[close] == column.min()][:1]
    mask = np.zeros(count, dtype=bool)
    mask[close[pareto_mask(np.column_stack([column[close], np.asarray(errors)[close]]))]] = True
    return mask


def apart_mask(values: Array, errors: Sequence[float], standing: Sequence[bool]) -> Mask:
    """Which points of a front to keep so that no two lie within 2% of each other on every objective.

    Those that stand on the published front go before the others, and the earlier before the later: a front that was
    published loses no point to one that is a little worse somewhere, unless what dominates the point is alike to
    another.  Of a single objective the best value goes first, and points count as apart that differ in quality.
    """
    if len(values) == 0:
        return np.zeros(0, dtype=bool)
    if values.shape[1] > 1:
        table, order = values, np.argsort(~np.asarray(standing, dtype=bool), kind="stable")
    else:
        table, order = np.column_stack([values, errors]), np.argsort(values[:, 0], kind="stable")
    mask = np.zeros(len(values), dtype=bool)
    mask[order] = distinct_mask(table[order], ALIKE)
    return mask
