"""Fits the cost model to one model: a few of its plans are exported and measured, once, and remembered."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from autocompress.config import RunConfig
from autocompress.export.onnx import write_onnx
from autocompress.hardware.anchors import anchor_plans
from autocompress.hardware.profile import HardwareProfile
from autocompress.plan import CompressionPlan, digest_of
from autocompress.progress import Progress
from autocompress.runtime.timing import measure_latency
from autocompress.search.bases import Base
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.files import read_json, write_text
from autocompress.tasks.cache import cache_directory

logger = logging.getLogger(__name__)

ANCHOR_SECONDS = 0.4


def calibrate(
    base: Base, evaluator: StitchedEvaluator, profile: HardwareProfile, config: RunConfig, run: Path, progress: Progress
) -> int:
    """Calibrates the base's prices on measured anchors; returns how many there were.

    The measurements are kept in the run directory, so that a resumed run prices as before, and in the cache, so that a
    second search of the same model with the same seed prices, and therefore chooses, exactly as the first.
    """
    own = run / ".work" / "anchors.json"
    key = digest_of([base.graph.model_dump(mode="json"), profile.model_dump(mode="json"), config.threads, config.batch])
    shared = cache_directory() / "anchors" / f"{key}.json"
    stored = read_json(own) or read_json(shared)
    if stored is None:
        stored = _measure(base, evaluator, config, progress)
        write_text(shared, json.dumps(stored))
    write_text(own, json.dumps(stored))
    observations = [(CompressionPlan.model_validate(plan), ms, size) for plan, ms, size in stored]
    base.skeleton.calibrate(observations)
    return len(observations)


def _measure(
    base: Base, evaluator: StitchedEvaluator, config: RunConfig, progress: Progress
) -> list[tuple[object, float, int]]:
    plans = anchor_plans(base.graph, seed=0)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        files, sizes = {}, {}
        progress.stage("anchors", len(plans))
        for index, plan in enumerate(plans):
            path = Path(folder) / f"{index}.onnx"
            sizes[str(index)] = write_onnx(evaluator.database.stitch(plan), path, {"autocompress.plan": plan.digest})
            files[str(index)] = path
            progress.advance()
        stats = measure_latency(
            files,
            threads=config.threads,
            batch=config.batch,
            seconds_each=ANCHOR_SECONDS,
            progress=progress,
            runtime=config.runtime,
        )
    return [
        (plan.model_dump(mode="json"), stats[str(index)].median_ms, sizes[str(index)])
        for index, plan in enumerate(plans)
    ]
