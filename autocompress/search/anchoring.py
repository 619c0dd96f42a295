"""Fits the cost model to one model: a few of its plans are exported and measured, once, and remembered."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from autocompress.config import RunConfig
from autocompress.export.onnx import write_onnx
from autocompress.hardware.anchors import anchor_plans
from autocompress.hardware.profile import HardwareProfile
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, digest_of
from autocompress.progress import Progress
from autocompress.runtime.timing import measure_latency
from autocompress.search.bases import Base
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.feedback import Feedback, Observation
from autocompress.search.files import read_json, write_text
from autocompress.search.menu import Menu
from autocompress.search.pruning import covering
from autocompress.tasks.cache import cache_directory

logger = logging.getLogger(__name__)

ANCHOR_SECONDS = 0.4
MOST_EXTRA = 4
"""Anchors beside the usual ones, for kernels that the profile has never measured."""


def calibrate(
    base: Base,
    evaluator: StitchedEvaluator,
    menu: Menu,
    profile: HardwareProfile,
    config: RunConfig,
    run: Path,
    progress: Progress,
) -> Feedback:
    """Calibrates the base's prices on measured anchors; gives what later measurements are fed into.

    The measurements are kept in the run directory, so that a resumed run prices as before, and in the cache, so that a
    second search of the same model with the same seed prices, and therefore chooses, exactly as the first.
    """
    plans = anchor_plans(base.graph, seed=0)
    extra = unmeasured_plans(menu, base.skeleton, plans)
    own = run / ".work" / "anchors.json"
    given = [base.graph.model_dump(mode="json"), profile.model_dump(mode="json"), config.threads, config.batch]
    key = digest_of([*given, *(plan.structure_digest for plan in extra)])
    shared = cache_directory() / "anchors" / f"{key}.json"
    stored = read_json(own) or read_json(shared)
    if stored is None:
        stored = _measure([*plans, *extra], evaluator, config, progress)
        write_text(shared, json.dumps(stored))
    write_text(own, json.dumps(stored))
    anchors: list[Observation] = [(CompressionPlan.model_validate(plan), ms, size) for plan, ms, size in stored]
    base.skeleton.calibrate(anchors)
    logger.info("cost model calibrated on %d artifacts, %d for kernels never measured", len(anchors), len(extra))
    seen = run / ".work" / "observations.json"
    return Feedback(base.skeleton, anchors, seen, cache_directory() / "anchors" / f"{key}-delivered.json")


def unmeasured_plans(menu: Menu, skeleton: Skeleton, anchors: Sequence[CompressionPlan]) -> list[CompressionPlan]:
    """Plans of the menu that run kernel classes which neither the profile nor an anchor covers."""
    covered = {kind for plan in anchors for kind in _unmodelled(skeleton, plan)}
    found: list[CompressionPlan] = []
    for choices in covering(menu):
        plan = menu.plan(choices)
        news = _unmodelled(skeleton, plan) - covered
        if news:
            covered |= news
            found.append(plan)
    return found[:MOST_EXTRA]


def _unmodelled(skeleton: Skeleton, plan: CompressionPlan) -> set[str]:
    """The kernel classes of a plan that the profile has never measured."""
    return {text.rpartition(" (")[2] for text in skeleton.estimate(plan).unmodelled}


def _measure(
    plans: Sequence[CompressionPlan], evaluator: StitchedEvaluator, config: RunConfig, progress: Progress
) -> list[tuple[object, float, int]]:
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        files, sizes = {}, {}
        progress.stage("anchors", len(plans))
        for index, plan in enumerate(plans):
            path = Path(folder) / f"{index}.onnx"
            sizes[str(index)] = write_onnx(evaluator.database.stitch(plan), path, {"autocompress.plan": plan.digest})
            files[str(index)] = path
            progress.advance()
        stats = measure_latency(
            files, threads=config.threads, batch=config.batch, seconds_each=ANCHOR_SECONDS, progress=progress
        )
    return [
        (plan.model_dump(mode="json"), stats[str(index)].median_ms, sizes[str(index)])
        for index, plan in enumerate(plans)
    ]
