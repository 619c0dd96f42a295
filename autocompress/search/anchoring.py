"""Fits the cost model to one model: a few of its plans are exported and measured, once, and remembered."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autocompress.config import RunConfig
from autocompress.errors import UsageError
from autocompress.export.metadata import describe
from autocompress.export.onnx import write_onnx
from autocompress.hardware.anchors import anchor_plans
from autocompress.hardware.calibration import Observation
from autocompress.hardware.kernels import Work
from autocompress.hardware.profile import FittedProfile, HardwareProfile
from autocompress.hardware.profiling import profile_kernels
from autocompress.hardware.reading import TimedKernel
from autocompress.hardware.skeleton import Skeleton
from autocompress.plan import CompressionPlan, digest_of
from autocompress.progress import Progress
from autocompress.runtime.timing import measure_latency
from autocompress.search.bases import Base
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.failures import is_expected, reason_of
from autocompress.search.feedback import Feedback
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
    key = digest_of(["kernels", *given, *(plan.structure_digest for plan in extra)])
    shared = cache_directory() / "anchors" / f"{key}.json"
    stored = read_json(own) or read_json(shared)
    if stored is None:
        stored = _measure([*plans, *extra], evaluator, profile, config, progress)
        write_text(shared, json.dumps(stored))
    write_text(own, json.dumps(stored))
    anchors = [_observation(row) for row in stored]
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
    plans: Sequence[CompressionPlan],
    evaluator: StitchedEvaluator,
    profile: HardwareProfile,
    config: RunConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Exports plans, times the whole of each and, for a profile of kernels, its kernels too."""
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        files, sizes, exported = {}, {}, []
        progress.stage("anchors", len(plans))
        for index, plan in enumerate(plans):
            path = Path(folder) / f"{index}.onnx"
            progress.advance()
            try:
                stitched = evaluator.database.stitch(plan)
                sizes[str(index)] = write_onnx(stitched, path, describe(stitched.plan), config.runtime)
            except OSError:
                raise
            except Exception as error:
                # The others still tell most; the original fails as a baseline, where that is said.
                logger.warning("an anchor cannot be exported: %s", reason_of(error), exc_info=not is_expected(error))
                continue
            files[str(index)] = path
            exported.append(plan)
        if not files:
            raise UsageError("no form of the model can be exported, not even the original; see log.jsonl")
        stats = measure_latency(
            files,
            threads=config.threads,
            batch=config.batch,
            seconds_each=ANCHOR_SECONDS,
            progress=progress,
            runtime=config.runtime,
        )
        kernels: Sequence[Sequence[TimedKernel]] = [()] * len(exported)
        if isinstance(profile, FittedProfile):
            models = [path.read_bytes() for path in files.values()]
            block = profile.nchwc_block
            kernels = profile_kernels(
                models, block, threads=config.threads, batch=config.batch, runtime=config.runtime, progress=progress
            )
    return [
        {
            "plan": plan.model_dump(mode="json"),
            "latency_ms": stats[name].median_ms,
            "size_bytes": sizes[name],
            "kernels": [
                {"kind": k.kind, "work": dataclasses.asdict(k.work), "microseconds": k.microseconds} for k in timed
            ],
        }
        for plan, name, timed in zip(exported, files, kernels, strict=True)
    ]


def _observation(row: dict[str, Any]) -> Observation:
    """What ``_measure`` wrote."""
    kernels = [TimedKernel(k["kind"], Work(**k["work"]), k["microseconds"]) for k in row["kernels"]]
    return Observation(CompressionPlan.model_validate(row["plan"]), row["latency_ms"], row["size_bytes"], kernels)
