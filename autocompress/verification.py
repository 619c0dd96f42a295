"""Measures delivered models again, from outside: plain sessions, the task's data, the numbers that were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from autocompress.config import RunConfig, load_config
from autocompress.errors import UsageError
from autocompress.front import LoadedFront, Point, load_front
from autocompress.plan import CompressionPlan, LayerPlan, Target
from autocompress.progress import Progress
from autocompress.runtime.base import Session, run_batches, runtime_here
from autocompress.runtime.timing import measure_latency
from autocompress.tasks.base import Task

QUALITY_TOLERANCE = 0.002
"""Two runtimes of one file may round differently: 0.2 points."""

LATENCY_TOLERANCE = 0.15
"""A shared machine gives another median each time; budgets are checked apart, without this allowance."""

PREDICTION_TOLERANCE = 1e-3
"""The same arithmetic gives the same prediction again, but for its last digits."""

AGREEMENT = 0.99
BATCH = 250
SECONDS_EACH = 0.6


@dataclass(frozen=True)
class Check:
    """One thing that was checked again."""

    name: str
    ok: bool
    detail: str


def verify_path(path: Path, load: Callable[[RunConfig], Task], progress: Progress) -> list[Check]:
    """Verifies a whole run, or the one delivered model whose ``model.onnx`` is given.

    Args:
        path: a run directory, or ``model.onnx`` in one of its model folders.
        load: gives the task of a run's configuration.
        progress: told how far it is.

    Raises:
        UsageError: there is nothing to verify at the path.
    """
    if path.is_dir():
        front = load_front(path)
        points = [front.reference, *front.baselines, *front.points]
        checks = [_manifest(path)]
    else:
        if not is_of_run(path):
            raise UsageError(f"{path} is not RUN/models/ID/model.onnx of a run: there is nothing to compare it with")
        front = load_front(path.resolve().parent.parent.parent)
        chosen = front[path.resolve().parent.name]
        points = [chosen] if chosen.id == front.reference.id else [front.reference, chosen]
        checks = []
    task = load(load_config(front.path / "config.yaml", {}))
    target = front.front.target
    progress.stage("verify", len(points))
    running = []
    for point in points:
        session = _open(point, target.runtime)
        if isinstance(session, Check):
            checks.append(session)
        else:
            checks += _point(point, session, task, target)
            running.append(point)
        progress.advance()
    if not front.front.verified:
        return checks + predictions(front, running)
    return checks + _latencies(front, running, progress)


def is_of_run(path: Path) -> bool:
    """Whether a file is ``RUN/models/ID/model.onnx`` of a run."""
    return path.name == "model.onnx" and (path.resolve().parent.parent.parent / "front.json").is_file()


def _manifest(run: Path) -> Check:
    path = run / "manifest.json"
    if not path.is_file():
        return Check("manifest", False, "manifest.json is missing")
    wrong = [
        name
        for name, digest in json.loads(path.read_text(encoding="utf-8")).items()
        if not (run / name).is_file() or hashlib.sha256((run / name).read_bytes()).hexdigest() != digest
    ]
    return Check(
        "manifest", not wrong, "all files as delivered" if not wrong else f"changed or missing: {', '.join(wrong)}"
    )


def _open(point: Point, runtime: str) -> Session | Check:
    """A plain session of the artifact, or what is wrong with it."""
    try:
        onnx.checker.check_model(str(point.onnx_path), full_check=True)
        return runtime_here(runtime).session(point.onnx_path)
    except Exception as error:  # a damaged file can raise anything that its parsers raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return Check(f"{point.id}: artifact", False, f"cannot be run: {reason}")


def _point(point: Point, session: Session, task: Task, target: Target) -> list[Check]:
    checks = []
    size = point.onnx_path.stat().st_size
    checks.append(Check(f"{point.id}: size", size == point.size_bytes, f"{size} bytes"))
    scored = [("validation", point.validation), *([("test", point.test)] if point.split == "test" else [])]
    for split, written in scored:
        data = task.split(split)
        batches = (data.batch(slice(i, i + BATCH)).inputs[0].numpy() for i in range(0, len(data), BATCH))
        outputs = torch.from_numpy(run_batches(session, batches))
        found = float(task.score(outputs, data.targets).double().mean())
        ok = abs(found - written) <= QUALITY_TOLERANCE
        checks.append(Check(f"{point.id}: {split}", ok, f"{found:.4f}, written {written:.4f}"))
    kernels = dict(runtime_here(target.runtime).executed_kernels(point.onnx_path, target.threads).counts)
    checks.append(
        Check(f"{point.id}: kernels", kernels == point.info.kernels, ", ".join(f"{k} {v}" for k, v in kernels.items()))
    )
    if point.info.checkpoint is not None:
        checks.append(_checkpoint(point, session, task))
    return checks


def _checkpoint(point: Point, session: Session, task: Task) -> Check:
    """Whether the torch module rebuilt from the checkpoint answers as the artifact does."""
    name = f"{point.id}: checkpoint"
    try:
        module = point.load()
    except UsageError as error:
        return Check(name, False, str(error))
    samples = task.split("validation").batch(slice(0, BATCH)).inputs[0]
    with torch.no_grad():
        rebuilt = module(samples)
    agreement = _agreement(rebuilt.numpy(), run_batches(session, [samples.numpy()]))
    return Check(name, agreement >= AGREEMENT, f"agrees with the artifact on {agreement:.1%}")


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    if a.ndim == 2:
        return float((a.argmax(1) == b.argmax(1)).mean())
    return float(np.isclose(a, b, rtol=1e-2, atol=1e-2).mean())


def _latencies(front: LoadedFront, points: list[Point], progress: Progress) -> list[Check]:
    if not points:
        return []
    target = front.front.target
    stats = measure_latency(
        {point.id: point.onnx_path for point in points},
        threads=target.threads,
        batch=target.batch,
        seconds_each=SECONDS_EACH,
        progress=progress,
        runtime=target.runtime,
    )
    limit = front.front.constraints.get("latency_ms")
    delivered = {point.id for point in front.points}
    checks = []
    for point in points:
        found, written = stats[point.id].median_ms, point.latency_ms or 0.0
        ok = abs(found - written) <= LATENCY_TOLERANCE * written
        checks.append(Check(f"{point.id}: latency", ok, f"{found:.4g} ms, written {written:.4g} ms"))
        if limit is not None and point.id in delivered:
            checks.append(Check(f"{point.id}: budget", found <= limit, f"{found:.4g} ms of {limit:g} ms"))
    return checks


def predictions(front: LoadedFront, points: list[Point]) -> list[Check]:
    """Where the target is not here: whether the run's own profile predicts again what was written, and the budget."""
    from autocompress.export.checkpoint import load_compressed
    from autocompress.hardware.models import cost_model
    from autocompress.hardware.profile import HardwareProfile

    pricer = cost_model(HardwareProfile.load(front.path / "profile.yaml"))
    limit = front.front.constraints.get("latency_ms")
    delivered = {point.id for point in front.points}
    checks = []
    for point in points:
        compressed = load_compressed(point.path)
        # The graph is the pruned one already: what is left of the plan are the number formats.
        layers = {
            layer.name: compressed.plan.layers.get(layer.name, LayerPlan()) for layer in compressed.graph.compressible
        }
        estimate = pricer.lower(compressed.graph).estimate(CompressionPlan(layers=layers))
        found, written = estimate.costs["latency_ms"], point.info.latency_ms.predicted or 0.0
        ok = abs(found.value - written) <= PREDICTION_TOLERANCE * written
        detail = (
            f"predicted {found.value:.4g} ms ({found.low:.4g}-{found.high:.4g}), written {written:.4g} ms; not measured"
        )
        checks.append(Check(f"{point.id}: latency", ok, detail))
        if limit is not None and point.id in delivered:
            text = f"at most {found.high:.4g} ms as predicted, of {limit:g} ms"
            checks.append(Check(f"{point.id}: budget", found.high <= limit * (1 + PREDICTION_TOLERANCE), text))
    return checks
