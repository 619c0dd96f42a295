"""What a candidate would add to the front that was asked for, whatever the front is drawn over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from autocompress.search.ladder import box, gains_of
from autocompress.search.scoring import DROP_SPAN

WIDEST_DROP = 30.0
"""Points of quality at which a candidate is worth nothing to the front."""

NEAR = 0.9
"""Share of the drop's axis up to the span of the hypervolume that is reported."""

DROP_DOUBT = 0.5
"""Standard deviation of the logarithm of a predicted drop: by how much formats and training move it."""

LEAST_DROP = 1e-4
"""A drop as a fraction below which a candidate is as good as the original."""


@dataclass(frozen=True)
class Outcome:
    """What a candidate is expected to be.

    Attributes:
        drop: of quality against the original, as a fraction.
        costs: by name.
    """

    drop: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Gains:
    """Compares candidates by the hypervolume they would add.

    Quality is one axis where the front trades it off.  Where it is only bound by a budget it is none: a candidate then
    counts by what it saves, times the chance that it keeps the budget, so that nothing is paid for quality that nobody
    asked for.  Where nothing but quality is asked for, the most accurate candidate gains most.

    Args:
        axes: the front's costs.
        quality: whether the front is drawn over the error, too.
        reference: the original's costs; a cost that an outcome does not name counts as the original's.
        drop_limit: the budget on the drop in points; None without one.
    """

    axes: tuple[str, ...]
    quality: bool
    reference: Mapping[str, float]
    drop_limit: float | None = None

    def best(self, present: Sequence[Outcome], candidates: Sequence[Outcome]) -> tuple[int, float]:
        """The candidate that adds the most to what is present, and how much; not positive where none adds anything."""
        gains = self.each(present, candidates)
        index = int(np.argmax(gains))
        return index, gains[index]

    def each(self, present: Sequence[Outcome], candidates: Sequence[Outcome]) -> list[float]:
        """What each candidate alone adds to what is present."""
        if not self.axes:
            least = min((outcome.drop for outcome in present), default=1.0)
            return [least - candidate.drop for candidate in candidates]
        if self.quality:
            return gains_of([self._row(o) for o in present], [self._row(o) for o in candidates])
        kept = [self._savings(o) for o in present if self.chance(o.drop) >= 0.5]
        gains = gains_of(kept, [self._savings(o) for o in candidates])
        return [gain * self.chance(candidate.drop) for gain, candidate in zip(gains, candidates, strict=True)]

    def chance(self, drop: float) -> float:
        """How likely a model keeps the budget on the drop that is expected to lose ``drop``, a fraction."""
        if self.drop_limit is None:
            return 1.0
        limit = max(self.drop_limit / 100.0, LEAST_DROP)
        return NormalDist().cdf((math.log(limit) - math.log(max(drop, LEAST_DROP))) / DROP_DOUBT)

    def _row(self, outcome: Outcome) -> list[float]:
        """The drop counts as in the hypervolume that is reported, with a little room beyond for what is cheaper yet."""
        points = 100.0 * max(outcome.drop, 0.0)
        if self.drop_limit is not None:
            return box(outcome.drop, self._known(outcome), self.reference, self.drop_limit or 1.0)
        axis = float(np.interp(points, [0.0, DROP_SPAN, WIDEST_DROP], [0.0, NEAR, 1.0]))
        return box(axis / 100.0, self._known(outcome), self.reference, 1.0)

    def _savings(self, outcome: Outcome) -> list[float]:
        return box(0.0, self._known(outcome), self.reference, 1.0)[1:]

    def _known(self, outcome: Outcome) -> dict[str, float]:
        return {name: outcome.costs.get(name, self.reference[name]) for name in self.axes}
