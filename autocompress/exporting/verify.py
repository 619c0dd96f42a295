"""Checks an export, or any ONNX file, again from outside: plain sessions, the task's data, the numbers written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch

from autocompress.environment import environment_facts
from autocompress.errors import AutocompressError
from autocompress.export.archive import unpack
from autocompress.export.checkpoint import load_compressed
from autocompress.export.metadata import read_metadata
from autocompress.exporting.comparing import as_model, as_simulation, batch_size, compare, mean_score
from autocompress.exporting.folder import artifact_bytes, digest_of_file
from autocompress.exporting.metrics import ARCHIVE, ARTIFACT, ORIGINAL, Comparison, ExportMetrics, read_metrics
from autocompress.exporting.samples import Samples
from autocompress.exporting.subject import Subject, load_subject
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.simulation import build_compressed
from autocompress.plan import ModelGraph
from autocompress.progress import Progress
from autocompress.runtime.base import DEFAULT_RUNTIME, Session, load_runtime
from autocompress.runtime.kernels import KernelReport, check_kernels
from autocompress.runtime.timing import measure_latency
from autocompress.verification import AGREEMENT, LATENCY_TOLERANCE, QUALITY_TOLERANCE, SECONDS_EACH, Check

SAMPLES = 250
"""Inputs on which the torch module and the file are compared."""

LEAST_DB = 20.0
"""Signal to noise that the file must keep against its torch module: rounding alone stays well above it."""


def verify_export(folder: Path, progress: Progress) -> list[Check]:
    """Everything that ``metrics.json`` says of an export, checked again.

    Where the export names its data, the file is scored on it again; else the torch module and the file are compared
    on synthetic inputs.
    """
    metrics = read_metrics(folder)
    progress.stage("verify", 4)
    checks = [_files(folder, metrics)]
    opened: dict[str, Session] = {}
    for name in (ORIGINAL, ARTIFACT) if (folder / ORIGINAL).is_file() else (ARTIFACT,):
        session = open_file(folder / name)
        if isinstance(session, Check):
            checks.append(session)
        else:
            opened[name] = session
    if ARTIFACT not in opened:
        return checks
    progress.advance()
    checks.append(_size(folder, metrics))
    if metrics.size_bytes.archive is not None:
        checks.append(_archive(folder))
    try:
        compressed = load_compressed(folder)
    except AutocompressError as error:
        return [*checks, Check("checkpoint", False, str(error))]
    report = load_runtime(DEFAULT_RUNTIME).executed_kernels(folder / ARTIFACT, metrics.threads)
    checks += [_metadata(folder, compressed), _kernels(compressed, report, metrics)]
    progress.advance()
    subject: Subject | None = None
    if metrics.origin is not None:
        try:
            subject = load_subject(metrics.origin, metrics.calibration.samples, metrics.calibration.seed, progress)
        except (AutocompressError, ImportError) as error:
            checks.append(Check("data", False, f"cannot be loaded again: {error}"))
    checks.append(_checkpoint(compressed, opened[ARTIFACT], subject))
    progress.advance()
    if subject is not None:
        checks += _quality(subject, opened[ARTIFACT], metrics, batch_size(compressed.graph))
    progress.advance()
    if len(opened) == 2:
        checks.append(_latency(folder, metrics, progress))
    elif not (folder / ORIGINAL).is_file():
        checks.append(Check("latency", True, f"not measured again: {ORIGINAL}, which it is relative to, is gone"))
    return checks


def verify_file(path: Path, progress: Progress) -> list[Check]:
    """What can be said of any ONNX file: that it is valid, that it opens, what is executed, and how fast."""
    progress.stage("verify", 2)
    session = open_file(path)
    if isinstance(session, Check):
        return [session]
    checks = [Check("file", True, f"valid ONNX, {artifact_bytes(path)} bytes, opens in a plain session")]
    report = load_runtime(DEFAULT_RUNTIME).executed_kernels(path)
    few = f", {report.weight_only_layers} from few-bit weights" if report.weight_only_layers else ""
    layers = f"{report.int8_weight_layers} layers with weights in integers{few}, {report.fp32_weight_layers} in float"
    checks.append(Check("kernels", True, f"{_counts(report.counts)}; {layers}"))
    progress.advance()
    checks += _described(path)
    try:
        stats = measure_latency({"file": path}, seconds_each=SECONDS_EACH, progress=progress)["file"]
    except Exception as error:  # inputs of a foreign model may need sizes or values that nobody here can know
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return [*checks, Check("latency", True, f"not measured: {reason}")]
    bounds = f"{stats.low_ms:.4g} to {stats.high_ms:.4g}"
    text = f"{stats.median_ms:.4g} ms at 1 thread, batch 1 (95%: {bounds}); there is nothing to compare it with"
    return [*checks, Check("latency", True, text)]


def _described(path: Path) -> list[Check]:
    """What a file of ours says of itself, once it has left its folder."""
    try:
        found = read_metadata(path)
    except AutocompressError as error:
        return [Check("metadata", False, str(error))]
    if found.provenance is None:
        return []
    source, metrics = found.provenance, found.metrics
    text = f"{source.model or 'a model'}, written {source.date} by autocompress {source.autocompress}"
    for split, score in metrics.quality.items() if metrics is not None else ():
        text += f", {split} {score.value:.4g}"
    if metrics is not None and metrics.latency_ms is not None:
        text += f", {metrics.latency_ms:.4g} ms at {metrics.threads} thread{'s' if metrics.threads != 1 else ''}"
    return [Check("metadata", True, text)]


def open_file(path: Path) -> Session | Check:
    """A plain session of a file, or what is wrong with it."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        return load_runtime(DEFAULT_RUNTIME).session(path)
    except Exception as error:  # a damaged file can raise anything that its parsers raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return Check(path.name, False, f"cannot be run: {reason}")


def _files(folder: Path, metrics: ExportMetrics) -> Check:
    """Whether every file is the one that was measured; the original may have been deleted."""
    wrong = []
    for name, digest in metrics.digests.items():
        path = folder / name
        if name == ORIGINAL and not path.exists():
            continue
        if not path.is_file() or digest_of_file(path) != digest:
            wrong.append(name)
    return Check("files", not wrong, f"changed or missing: {', '.join(wrong)}" if wrong else "all as exported")


def _size(folder: Path, metrics: ExportMetrics) -> Check:
    size = artifact_bytes(folder / ARTIFACT)
    return Check("size", size == metrics.size_bytes.export, f"{size} bytes, written {metrics.size_bytes.export}")


def _metadata(folder: Path, compressed: CompressedModel) -> Check:
    """Whether the file says of itself what ``plan.json`` says."""
    try:
        found = read_metadata(folder / ARTIFACT).plan
    except AutocompressError as error:
        return Check("metadata", False, str(error))
    same = found is not None and found.digest == compressed.plan.digest
    return Check("metadata", same, f"the file carries {'the plan' if same else 'another plan'} of plan.json")


def _archive(folder: Path) -> Check:
    """Whether the archive still gives the file, bit for bit."""
    with tempfile.TemporaryDirectory(prefix="autocompress-") as place:
        try:
            unpack(folder / ARCHIVE, Path(place) / ARTIFACT)
        except AutocompressError as error:
            return Check("archive", False, str(error))
        same = (Path(place) / ARTIFACT).read_bytes() == (folder / ARTIFACT).read_bytes()
    return Check("archive", same, f"unpacks to {'the file' if same else 'another file'}")


def _kernels(compressed: CompressedModel, report: KernelReport, metrics: ExportMetrics) -> Check:
    """Whether the runtime executes the plan; other counts alone are another machine's, not a fault."""
    problems = check_kernels(compressed, report)
    text = "; ".join(problems) if problems else f"as planned: {_counts(report.counts)}"
    if not problems and dict(report.counts) != metrics.kernels:
        text += f" (where it was exported: {_counts(metrics.kernels)})"
    return Check("kernels", not problems, text)


def _checkpoint(compressed: CompressedModel, session: Session, subject: Subject | None) -> Check:
    """Whether the torch module rebuilt from the checkpoint computes what the file does."""
    size = batch_size(compressed.graph)
    if subject is not None:
        samples, name = subject.compared, subject.compared_on
    else:
        samples, name = synthetic_inputs(compressed, min(SAMPLES, 4 * size)), "synthetic"
    found = compare(as_simulation(build_compressed(compressed)), as_model(session), samples, name, size, SAMPLES)
    return Check("checkpoint", _agrees(found, real=subject is not None), f"{_text(found)} with the file")


def _agrees(found: Comparison, real: bool) -> bool:
    """On real inputs the same answers count; between synthetic ones a model may not tell, so there the noise does."""
    if real and found.top1_agreement is not None:
        return found.top1_agreement >= AGREEMENT
    return found.signal_to_noise_db is None or found.signal_to_noise_db >= LEAST_DB


def _text(found: Comparison) -> str:
    noise = "no difference" if found.signal_to_noise_db is None else f"{found.signal_to_noise_db:.1f} dB"
    agreement = "" if found.top1_agreement is None else f"{found.top1_agreement:.1%} of answers, "
    return f"{agreement}{noise} over {found.samples} {found.data} samples,"


def synthetic_inputs(compressed: CompressedModel, count: int) -> Samples:
    """Inputs of the model's shapes: floats over the range that was calibrated, integers and booleans 0 or 1."""
    graph: ModelGraph = compressed.graph
    generator = torch.Generator().manual_seed(0)
    made = []
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if tensor.dtype.startswith("float"):
            low, high = compressed.ranges.get(name, (-1.0, 1.0))
            made.append(low + (high - low) * torch.rand((count, *tensor.shape), generator=generator))
        else:
            # The graph's shapes leave the batch out of floating tensors only.
            values = torch.randint(0, 2, (count, *tensor.shape[1:]), generator=generator)
            made.append(values.to(getattr(torch, tensor.dtype)))
    return Samples(tuple(made))


def _quality(subject: Subject, session: Session, metrics: ExportMetrics, size: int) -> list[Check]:
    checks = []
    for split, written in metrics.quality.items():
        if split not in subject.scored:
            checks.append(Check(split, False, "the data has no such split any more"))
            continue
        found = mean_score(as_model(session), subject.scored[split], subject.score, size)
        ok = abs(found - written.export) <= QUALITY_TOLERANCE * max(1.0, abs(written.export))
        checks.append(Check(split, ok, f"{found:.4f}, written {written.export:.4f}"))
    return checks


def _latency(folder: Path, metrics: ExportMetrics, progress: Progress) -> Check:
    """How much faster than the original the file is, the two timed in turn: a machine's load changes both alike."""
    stats = measure_latency(
        {"original": folder / ORIGINAL, "export": folder / ARTIFACT},
        threads=metrics.threads,
        seconds_each=SECONDS_EACH,
        progress=progress,
    )
    original, export = stats["original"].median_ms, stats["export"].median_ms
    written = metrics.latency_ms
    text = (
        f"{export:.4g} ms, {original / export:.2f}x as fast as fp32; "
        f"written {written.export.median:.4g} ms, {metrics.speedup:.2f}x"
    )
    facts = environment_facts()
    if facts["cpu"] != metrics.environment.cpu:
        return Check("latency", True, f"{text}, on another processor ({metrics.environment.cpu})")
    ok = original / export >= metrics.speedup * (1 - LATENCY_TOLERANCE)
    return Check("latency", ok, text)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
