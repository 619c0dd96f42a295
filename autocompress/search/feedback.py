"""Measurements of delivered models, fed back into the prices of the search that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from autocompress.hardware.calibration import Observation
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, FrontPoint, Original
from autocompress.search.files import read_json, write_text

MOST_REMEMBERED = 5000
"""Measurements kept for other searches of the same model; the oldest make room."""


class Feedback:
    """Corrects a skeleton with everything measured so far: the anchors, then the delivered models.

    Prices change when ``apply`` is called, and then only.  Kept in the run directory, so that a resumed run prices as
    before.  The first measurement of a structure is also kept in the cache and used from then on, so that the same
    seed and number of trials give the same prices, and so the same choices, again.

    Args:
        skeleton: of the original model.
        anchors: what it was calibrated on; the original itself among them.
        own: the file in the run directory.
        shared: the file in the cache.
    """

    def __init__(self, skeleton: Skeleton, anchors: Sequence[Observation], own: Path, shared: Path) -> None:
        self.skeleton, self.anchors, self._own, self._shared = skeleton, list(anchors), own, shared
        stored = read_json(own) or []
        self.observations = [Observation(CompressionPlan.model_validate(plan), ms, size) for plan, ms, size in stored]
        self._seen = {seen.plan.structure_digest for seen in [*self.anchors, *self.observations]}
        whole = (seen for seen in self.anchors if not seen.plan.groups and not seen.plan.layers)
        self._dense_ms = next((seen.latency_ms for seen in whole), None)

    def take(self, points: Iterable[FrontPoint], reference: FrontPoint) -> int:
        """Remembers the measurements of points of the original model; gives how many were new.

        Latencies count relative to the original's, measured in turn with them: a machine that is slower now than it
        was when the anchors were measured says nothing about a model.
        """
        now = reference.latency_ms.measured
        drift = self._dense_ms / now if self._dense_ms and now else 1.0
        known: dict[str, list[float]] = read_json(self._shared) or {}
        fresh = 0
        for point in points:
            measured, plan = point.latency_ms.measured, point.plan
            if measured is None or not isinstance(plan.base, Original) or plan.structure_digest in self._seen:
                continue
            digest = plan.structure_digest
            ms, size = known.setdefault(digest, [measured * drift, float(point.size_bytes)])
            self._seen.add(digest)
            self.observations.append(Observation(plan, ms, size))
            fresh += 1
        if fresh:
            write_text(self._shared, json.dumps(dict(list(known.items())[-MOST_REMEMBERED:])))
            rows = [(o.plan.model_dump(mode="json"), o.latency_ms, o.size_bytes) for o in self.observations]
            write_text(self._own, json.dumps(rows))
        return fresh

    def apply(self) -> None:
        """Prices follow everything measured so far."""
        if self.observations:
            self.skeleton.calibrate([*self.anchors, *self.observations])
