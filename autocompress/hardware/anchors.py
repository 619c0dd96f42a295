"""Anchors: a few plans of one model that between them run every kind of kernel, exported and timed to calibrate on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from autocompress.graph.rewrite import rewrite
from autocompress.hardware.calibration import Observation
from autocompress.hardware.grid import keep_count
from autocompress.hardware.reading import TimedKernel
from autocompress.hardware.synthetic import INT8, random_weights, with_ranges
from autocompress.methods.quantization import activation_formats, gives_float
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph
from autocompress.progress import Progress
from autocompress.runtime.base import DEFAULT_RUNTIME


def anchor_plans(graph: ModelGraph, seed: int = 0, count: int = 12) -> list[CompressionPlan]:
    """Plans that cover the kernels a search of this model meets: both types, wide and narrow, alone and mixed.

    Every group keeps a count on the grid of ``grid.keep_count``.

    Args:
        graph: the model.
        seed: of the random ones among them.
        count: how many at most; the first ones cover the most.
    """
    rng = np.random.default_rng(seed)
    names = [layer.name for layer in graph.compressible if not gives_float(graph, layer)]
    everywhere = dict.fromkeys(names, INT8)
    alternating = {name: INT8 for name in names[::2]}
    half = len(names) // 2
    made = [
        _plan(graph, {}, {}),
        _plan(graph, {}, everywhere),
        _plan(graph, _uniform(graph, 0.5), everywhere),
        _plan(graph, _uniform(graph, 0.25), {}),
        _plan(graph, _uniform(graph, 0.75), alternating),
        _plan(graph, _uniform(graph, 0.5), dict.fromkeys(names[:half], INT8)),
        _plan(graph, _uniform(graph, 0.25), everywhere),
        _plan(graph, _uniform(graph, 0.5), {}),
        _plan(graph, _uniform(graph, 0.125), everywhere),
    ]
    while len(made) < count:
        layers, current = {}, bool(rng.random() < 0.5)
        for name in names:
            if rng.random() < 0.3:
                current = not current
            if current:
                layers[name] = INT8
        made.append(
            _plan(graph, {g.id: keep_count(g.size, float(rng.uniform(0.25, 1.0))) for g in graph.groups}, layers)
        )
    unique = {plan.structure_digest: plan for plan in made}
    return list(unique.values())[:count]


def _plan(graph: ModelGraph, keeps: Mapping[str, int], layers: Mapping[str, LayerPlan]) -> CompressionPlan:
    groups = {group.id: keeps[group.id] for group in graph.groups if keeps.get(group.id, group.size) != group.size}
    return CompressionPlan(groups=groups, layers=dict(layers), activations=activation_formats(graph, layers))


def _uniform(graph: ModelGraph, share: float) -> dict[str, int]:
    return {group.id: keep_count(group.size, share) for group in graph.groups}


def measure_plans(
    graph: ModelGraph,
    plans: Sequence[CompressionPlan],
    *,
    threads: int = 1,
    batch: int = 1,
    seconds_each: float = 0.4,
    constants: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    runtime: str = DEFAULT_RUNTIME,
    block: int | None = None,
) -> list[Observation]:
    """Exports plans with random weights and times them: what ``Skeleton.calibrate`` takes.

    Args:
        graph: the whole model, before any plan.
        plans: what to measure.
        threads: threads of one run.
        batch: samples of one run.
        seconds_each: time spent on each plan; they take turns.
        constants: the model's own values where random ones would not do (shapes, indices, bounds); anything in it
            that is not a floating-point matrix is used.
        seed: of the random weights.
        progress: told how far it is.
        runtime: where they are timed.
        block: channels that the runtime packs together (``FittedProfile.nchwc_block``), to time kernel by kernel too.

    Returns:
        The observations in the order given.
    """
    from autocompress.export.metadata import describe
    from autocompress.export.onnx import write_onnx
    from autocompress.hardware.profiling import profile_kernels
    from autocompress.runtime.timing import measure_latency

    rng = np.random.default_rng(seed)
    fixed = {n: value for n, value in (constants or {}).items() if value.dim() == 0 or not value.is_floating_point()}
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        paths: dict[str, Path] = {}
        sizes: dict[str, int] = {}
        for index, plan in enumerate(plans):
            small = rewrite(graph, plan.groups)
            compressed = with_ranges(small, plan, {**random_weights(small, rng), **fixed}, rng)
            name = str(index)
            paths[name] = Path(folder) / f"{name}.onnx"
            sizes[name] = write_onnx(compressed, paths[name], describe(compressed.plan), runtime)
        measured = measure_latency(
            paths, threads=threads, batch=batch, seconds_each=seconds_each, progress=progress, runtime=runtime
        )
        kernels: list[list[TimedKernel]] = [[] for _ in plans]
        if block is not None:
            kernels = profile_kernels(
                [path.read_bytes() for path in paths.values()], block, threads=threads, batch=batch, runtime=runtime,
                progress=progress,
            )  # fmt: skip
    return [
        Observation(plan, measured[name].median_ms, float(sizes[name]), kernels[index])
        for index, (plan, name) in enumerate(zip(plans, paths, strict=True))
    ]
