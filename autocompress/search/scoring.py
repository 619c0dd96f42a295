"""Statistics of delivered models: intervals, paired drops, ties, and one number for a whole front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autocompress.front import drop_between, error_of, latency_of, points_per_unit
from autocompress.pareto import hypervolume
from autocompress.plan import FrontPoint, Metric, SplitGap

Scores = npt.NDArray[np.float64]
Z95 = 1.959964

DROP_SPAN, SPEED_SPAN, SHRINK_SPAN = 10.0, 3.0, 5.0
"""The hypervolume's box: 10 points of quality, 8x faster, 32x smaller."""

GAP_DRAWS = 4000

_SHRINKING = frozenset({"size_bytes", "peak_memory_bytes"})


def interval(scores: Scores) -> tuple[float, float]:
    """A 95% interval of the mean: Wilson's for fractions of right and wrong, else the normal one."""
    n, mean = len(scores), float(scores.mean())
    if np.isin(scores, (0.0, 1.0)).all():
        centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    half = Z95 * float(scores.std()) / math.sqrt(n)
    return mean - half, mean + half


def paired_drop(reference: Scores, scores: Scores) -> tuple[float, float]:
    """A 95% interval of the mean loss against the reference on the same samples."""
    lost = reference - scores
    half = Z95 * float(lost.std(ddof=1)) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
    return float(lost.mean()) - half, float(lost.mean()) + half


def ties(scores: Mapping[str, Scores]) -> dict[str, tuple[str, ...]]:
    """For each point, those whose quality the validation samples cannot tell from its own."""
    found: dict[str, tuple[str, ...]] = {}
    for name, own in scores.items():
        close = []
        for other, theirs in scores.items():
            low, high = paired_drop(own, theirs)
            if other != name and low <= 0.0 <= high:
                close.append(other)
        found[name] = tuple(sorted(close))
    return found


def split_gap(validation: Sequence[Scores], test: Sequence[Scores]) -> SplitGap | None:
    """How much better a front looks on the samples that it was chosen on; None without points.

    Points answer the same samples, and much alike: what chance gives is drawn from a normal distribution with the
    covariance of their answers.  It is for people to read; no choice depends on it.

    Args:
        validation: one array of sample scores a point.
        test: likewise, in the same order.
    """
    if not validation:
        return None
    differences = np.array([float(v.mean() - t.mean()) for v, t in zip(validation, test, strict=True)])
    pooled = np.hstack([np.stack(validation), np.stack(test)])
    spread = np.atleast_2d(np.cov(pooled)) * (1 / len(validation[0]) + 1 / len(test[0]))
    half = Z95 * math.sqrt(max(float(spread.mean()), 0.0))
    draws = np.random.default_rng(0).multivariate_normal(np.zeros(len(spread)), spread, GAP_DRAWS, method="eigh")
    low, high = np.quantile(draws.max(axis=1), [0.025, 0.975])
    return SplitGap(
        mean=float(differences.mean()),
        mean_by_chance=(-half, half),
        largest=float(differences.max()),
        largest_by_chance=(float(low), float(high)),
    )


def loss_of(metric: Metric, quality: float) -> float:
    """What a search minimises: differences are drops as people read them, a hundredth for a point.

    >>> round(loss_of(Metric(), 0.93), 2), loss_of(Metric(name="mae", unit="", higher_is_better=False), 3.0)
    (0.07, 0.03)
    """
    return error_of(metric, quality) * points_per_unit(metric) / 100.0


def span_of(cost: str) -> float:
    """The box's extent along a cost, in halvings."""
    return SHRINK_SPAN if cost in _SHRINKING else SPEED_SPAN


def front_hypervolume(
    metric: Metric,
    reference: FrontPoint,
    points: Sequence[FrontPoint],
    objectives: Sequence[str] = ("error", "latency_ms", "size_bytes"),
) -> float:
    """The share of the box that a front dominates over its objectives, 0 to 1.

    Drops run from 0 to 10 points of validation quality; latency, energy and MACs to an eighth of the original's, size
    and memory to a thirty-second, by their logarithms.
    """
    rows = []
    for point in points:
        row = [_normalised(metric, reference, point, name) for name in objectives]
        if all(value is not None for value in row):
            rows.append(row)
    return hypervolume(np.array(rows, dtype=np.float64).reshape(-1, len(objectives)), [1.0] * len(objectives))


def _normalised(metric: Metric, reference: FrontPoint, point: FrontPoint, name: str) -> float | None:
    """An objective in the unit box; None where it is not known."""
    if name == "error":
        return max(0.0, drop_between(metric, reference, point, "validation")) / DROP_SPAN
    base, cost = (latency_of(p) if name == "latency_ms" else getattr(p, name) for p in (reference, point))
    if not base or not cost:
        return None
    return 1.0 - min(math.log2(base / cost) / span_of(name), 1.0)
