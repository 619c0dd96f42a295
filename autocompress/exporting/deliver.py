"""From a model and a request to a folder with a checked, measured file: what ``autocompress export`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from autocompress.environment import environment_facts
from autocompress.errors import ArtifactError
from autocompress.export.archive import pack
from autocompress.export.checkpoint import save_checkpoint
from autocompress.export.files import write_atomic
from autocompress.export.metadata import ArtifactMetrics, Provenance, Score, describe, stamp
from autocompress.export.onnx import write_onnx
from autocompress.exporting.choices import choose
from autocompress.exporting.comparing import as_model, as_simulation, batch_size, compare, score
from autocompress.exporting.folder import artifact_bytes, building, digest_of_file
from autocompress.exporting.handle import ExportedModel
from autocompress.exporting.metrics import (
    ARCHIVE,
    ARTIFACT,
    METRICS,
    ORIGINAL,
    Calibration,
    Comparison,
    Environment,
    ExportMetrics,
    Sizes,
    SplitQuality,
    Timing,
    Timings,
)
from autocompress.exporting.options import ExportOptions
from autocompress.exporting.samples import batches
from autocompress.exporting.subject import Subject
from autocompress.graph.read import read_model
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.post_training import CalibrationOptions, quantize_model
from autocompress.methods.simulation import build_compressed
from autocompress.plan import CompressionPlan, LayerPlan
from autocompress.progress import Progress
from autocompress.runtime.base import DEFAULT_RUNTIME, load_runtime
from autocompress.runtime.kernels import KernelReport, check_kernels
from autocompress.runtime.timing import LatencyStats, measure_latency

COMPARED = 10_000
"""Samples on which original and export are compared, at most."""

SIMULATED = 1_000
"""Samples on which the torch simulation is run, at most."""

SECONDS_EACH = 1.0
MOST_THREADS = 2


def export_subject(subject: Subject, options: ExportOptions, out: Path | None, progress: Progress) -> ExportedModel:
    """Exports a model as asked for, checks what the runtime makes of it, and measures it beside the original.

    Nothing is left where it fails: the folder is built beside its place and renamed into it.

    Raises:
        UsageError: the request does not fit the model, or torch cannot export it.
        ArtifactError: the runtime executes the file otherwise than planned.
    """
    with building(out, f"{subject.name}-{options.label}") as folder:
        progress.stage("read the model")
        graph, weights = read_model(subject.model, subject.example_inputs, subject.output_names)
        chosen = choose(graph, options)
        size = batch_size(graph)
        original = CompressedModel(graph=graph, weights=weights, plan=CompressionPlan())
        compressed = _compressed(original, chosen.plan, subject, options, size, progress)
        progress.stage("export")
        facts = environment_facts()
        task = None if subject.origin is None else subject.origin.task
        source = Provenance.here(compressed.plan, facts["cpu"], task=task, model=subject.name, seed=options.seed)
        original_bytes = write_onnx(original, folder.path / ORIGINAL)
        write_onnx(compressed, folder.path / ARTIFACT, describe(compressed.plan, source))
        save_checkpoint(compressed, folder.path)
        report = checked_kernels(compressed, folder.path / ARTIFACT, options.threads)
        quality, outputs, simulation = _judged(subject, compressed, folder.path, size, progress)
        timed = measure_latency(
            {"original": folder.path / ORIGINAL, "export": folder.path / ARTIFACT},
            threads=options.threads,
            seconds_each=SECONDS_EACH,
            progress=progress,
        )
        stamp(
            folder.path / ARTIFACT, _stamped(subject, compressed, quality, simulation, timed, report, options.threads)
        )
        archived = pack(folder.path / ARTIFACT, folder.path / ARCHIVE).archive_bytes if options.archive else None
        metrics = ExportMetrics(
            version=1,
            name=subject.name,
            label=options.label,
            origin=subject.origin,
            metric=subject.metric,
            quality=quality,
            outputs=outputs,
            simulation=simulation,
            latency_ms=Timings(original=_timing(timed["original"]), export=_timing(timed["export"])),
            threads=options.threads,
            size_bytes=Sizes(original=original_bytes, export=artifact_bytes(folder.path / ARTIFACT), archive=archived),
            kernels=dict(report.counts),
            layers=_counted(compressed),
            float_layers=chosen.reasons,
            calibration=Calibration(
                samples=min(options.calibration_samples, len(subject.calibration)),
                ranges=options.ranges,
                equalize=options.equalize,
                bias_correction=options.bias_correction,
                seed=options.seed,
                chose=compressed.calibration,
            ),
            environment=Environment.model_validate(facts),
            digests=digests(folder.path),
        )
        write_atomic(folder.path / METRICS, metrics.model_dump_json(by_alias=True, indent=1).encode())
        return ExportedModel(folder.finish(), metrics)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an export but its metrics, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / METRICS)
    return {str(path.relative_to(folder)): digest_of_file(path) for path in files}


def checked_kernels(compressed: CompressedModel, artifact: Path, threads: int) -> KernelReport:
    """What the runtime executes for an artifact.

    Raises:
        ArtifactError: it is not what the plan says.
    """
    report = load_runtime(DEFAULT_RUNTIME).executed_kernels(artifact, threads)
    problems = check_kernels(compressed, report)
    if problems:
        shown = problems[0] + (f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else "")
        raise ArtifactError(
            f"the runtime does not execute the file as planned, so nothing is written: {shown}; leave such a layer in "
            "float with --freeze, or name another type for it with --layer"
        )
    return report


def _compressed(
    original: CompressedModel,
    plan: CompressionPlan,
    subject: Subject,
    options: ExportOptions,
    size: int,
    progress: Progress,
) -> CompressedModel:
    """The plan carried out on the original's weights; a plan without layers changes nothing."""
    if not plan.layers:
        return original
    given = (batch.inputs for batch in batches(subject.calibration, size, options.calibration_samples))
    wanted = CalibrationOptions(
        ranges=options.ranges,
        equalize=options.equalize,
        bias_correction=options.bias_correction,
        seed=options.seed,
    )
    return quantize_model(original.graph, original.weights, plan, given, wanted, progress)


def _judged(
    subject: Subject, compressed: CompressedModel, folder: Path, size: int, progress: Progress
) -> tuple[dict[str, SplitQuality], Comparison, Comparison]:
    """Quality by split, original against export, and simulation against export."""
    progress.stage("score", 1 + max(1, len(subject.scored)))
    runtime = load_runtime(DEFAULT_RUNTIME)
    threads = min(MOST_THREADS, torch.get_num_threads())
    original = as_model(runtime.session(folder / ORIGINAL, threads))
    export = as_model(runtime.session(folder / ARTIFACT, threads))
    quality: dict[str, SplitQuality] = {}
    outputs: Comparison | None = None
    for split, samples in subject.scored.items():
        found, compared = score(original, export, samples, subject.score, subject.metric, split, size)
        quality[split] = found
        outputs = compared if split == subject.compared_on else outputs
        progress.advance()
    if outputs is None:
        outputs = compare(original, export, subject.compared, subject.compared_on, size, COMPARED)
        progress.advance()
    simulated = as_simulation(build_compressed(compressed))
    simulation = compare(simulated, export, subject.compared, subject.compared_on, size, SIMULATED)
    progress.advance()
    return quality, outputs, simulation


def _stamped(
    subject: Subject,
    compressed: CompressedModel,
    quality: Mapping[str, SplitQuality],
    simulation: Comparison,
    timed: Mapping[str, LatencyStats],
    report: KernelReport,
    threads: int,
) -> ArtifactMetrics:
    """What the file itself says was measured on it."""
    scores = {
        split: Score(value=found.export, interval=found.export_ci95, drop_interval=found.drop_ci95)
        for split, found in quality.items()
    }
    return ArtifactMetrics(
        metric=subject.metric if scores else None,
        quality=scores,
        latency_ms=timed["export"].median_ms,
        latency_p95_ms=timed["export"].p95_ms,
        original_ms=timed["original"].median_ms,
        threads=threads,
        batch=1,
        params=compressed.graph.parameters(),
        macs=compressed.graph.macs(),
        agreement=simulation.top1_agreement,
        kernels=dict(report.counts),
    )


def _counted(compressed: CompressedModel) -> dict[str, int]:
    plans = compressed.plan.layers
    return dict(Counter(plans.get(layer.name, LayerPlan()).compute for layer in compressed.graph.compressible))


def _timing(stats: LatencyStats) -> Timing:
    return Timing(median=stats.median_ms, p95=stats.p95_ms, low=stats.low_ms, high=stats.high_ms)
