"""Measures this machine: a few dozen small models, timed whole and kernel by kernel, become a hardware profile."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort

from autocompress.errors import UsageError
from autocompress.export.onnx import to_onnx
from autocompress.hardware.fitting import MeasuredModel, fit_kernels, hold_out
from autocompress.hardware.profile import (
    LOCAL,
    FittedProfile,
    Provenance,
    Validity,
    cpu_description,
    local_path,
)
from autocompress.hardware.reading import ProfiledSession, TimedKernel, packed_block
from autocompress.hardware.synthetic import (
    GraphMaker,
    heavy_net,
    inverted_net,
    odd_net,
    plain_net,
    random_formats,
    random_model,
    residual_net,
    token_net,
)  # fmt: skip
from autocompress.plan import ModelGraph
from autocompress.progress import Progress, SilentProgress
from autocompress.runtime.kernels import optimized_graph
from autocompress.runtime.timing import LatencyStats, measure_latency

logger = logging.getLogger(__name__)

Builder = Callable[..., ModelGraph]

_SPECS: tuple[tuple[Builder, tuple[int, ...], tuple[int, int]], ...] = (
    (residual_net, (28, 32), (8, 48)),
    (inverted_net, (28, 32), (8, 24)),
    (plain_net, (28, 32), (4, 64)),
    (residual_net, (14, 20, 24, 32), (4, 32)),
    (residual_net, (28, 32), (16, 64)),
    (inverted_net, (96, 112), (8, 24)),
    (residual_net, (96, 128), (16, 48)),
    (residual_net, (24, 40), (80, 160)),
    (inverted_net, (24, 40), (48, 128)),
    (odd_net, (14, 20, 28), (18, 48)),
    (token_net, (16, 48), (48, 128)),
)
"""Family, image sizes, range of the first width: small images and narrow layers most of all, with some of every kind
up to those of large networks, where weights no longer fit the caches."""

_HEAVY = ((512, 1, "fp32"), (512, 2, "fp32"), (512, 4, "fp32"), (512, 2, "int8"), (512, 5, "int8"))
"""Channels, depth and format of the models that show what weights beyond the caches cost."""

_STYLES = ("fp32", "int8", "mixed", "runs")
_MODELS = 44
_ROUNDS = 8
_RUNS = 6
_SECONDS_EACH = 0.12
_SEED = 20


@dataclass(frozen=True)
class _Sample:
    graph: ModelGraph
    model: bytes
    input_shape: tuple[int, ...]


def local_profile(
    threads: int = 1,
    batch: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    refresh: bool = False,
) -> FittedProfile:
    """The profile of this machine, measured on first use (about 20 s) and cached.

    The cache holds one file for each CPU, runtime version, threads and batch, under ``cache_dir``,
    ``AUTOCOMPRESS_CACHE`` or ``~/.cache/autocompress``.

    Args:
        threads: threads of one run.
        batch: samples of one run.
        cache_dir: another cache.
        progress: told how far the measuring is.
        refresh: measure again, whatever is cached.
    """
    if threads < 1 or batch < 1:
        raise UsageError(f"threads={threads}, batch={batch}: both must be at least 1")
    path = local_path("onnxruntime", str(ort.__version__), threads, batch, cache_dir)
    if path.is_file() and not refresh:
        try:
            return FittedProfile.load(path)
        except UsageError as error:
            logger.warning("the cached hardware profile is measured again: %s", error)
    profile = measure_profile(threads, batch, progress)
    profile.save(path)
    return profile


def measure_profile(
    threads: int = 1, batch: int = 1, progress: Progress | None = None, models: int = _MODELS
) -> FittedProfile:
    """Measures this machine now.

    Args:
        threads: threads of one run.
        batch: samples of one run.
        progress: told how far it is.
        models: synthetic models to time; their seed is fixed.
    """
    progress = progress or SilentProgress()
    begin = time.perf_counter()
    rng = np.random.default_rng(_SEED)
    samples = _samples(models, rng)
    block = _detect_block(rng, threads)
    measured = _profile_kernels(samples, threads, batch, block, rng, progress)
    latencies, again = _time_whole(samples, threads, batch, progress)
    results = [
        MeasuredModel(kernels, stats.median_ms * 1e3)
        for kernels, stats in zip(measured, latencies, strict=True)
        if kernels
    ]
    fit = fit_kernels(results)
    repeat = [abs(b.median_ms / a.median_ms - 1.0) for a, b in zip(latencies, again, strict=False)]
    channels = [tensor.shape[0] for s in samples for tensor in s.graph.tensors.values() if len(tensor.shape) == 3]
    sizes = [s.input_shape[-1] for s in samples if len(s.input_shape) == 3]
    latency = [stats.median_ms for stats in latencies]
    return FittedProfile(
        name=LOCAL,
        runtime_version=str(ort.__version__),
        threads=threads,
        batch=batch,
        nchwc_block=block,
        kernels=fit.kernels,
        end_to_end=fit.end_to_end,
        holdout=hold_out(results, fit.end_to_end.cache_mb),
        repeat_floor=round(float(np.median(repeat)), 4),
        validity=Validity(
            latency_ms=(round(min(latency), 4), round(max(latency), 4)),
            channels=(min(channels), max(channels)),
            resolution=(min(sizes), max(sizes)),
        ),
        provenance=Provenance(
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - begin, 1),
            cpu=cpu_description(),
            cores=os.cpu_count() or 1,
            system=f"{platform.system()} {platform.machine()}",
            versions={"onnxruntime": str(ort.__version__), "numpy": np.__version__},
        ),
    )


def _samples(count: int, rng: np.random.Generator) -> list[_Sample]:
    """Families, sizes and formats in turn, so that every kernel class occurs; a fifth has channels off all grids."""
    samples = []
    for index in range(count):
        family, sizes, widths = _SPECS[index % len(_SPECS)]
        size = int(rng.choice(sizes))
        graph = family(rng, size, widths, odd=index % 5 == 4)
        style = _STYLES[(index % len(_SPECS) + index // len(_SPECS)) % len(_STYLES)]
        model = to_onnx(random_model(graph, random_formats(graph, rng, style), rng))
        samples.append(_Sample(graph, model.SerializeToString(), graph.tensors["input"].shape))
    for channels, depth, style in _HEAVY if count >= _MODELS else ():
        graph = heavy_net(channels, depth)
        model = to_onnx(random_model(graph, random_formats(graph, rng, style), rng))
        samples.append(_Sample(graph, model.SerializeToString(), graph.tensors["input"].shape))
    return samples


def _detect_block(rng: np.random.Generator, threads: int) -> int:
    make = GraphMaker()
    graph = make.build(make.conv(make.tensor("input", (3, 8, 8)), 4))
    return packed_block(optimized_graph(to_onnx(random_model(graph, {}, rng)).SerializeToString(), threads))


def _profile_kernels(
    samples: Sequence[_Sample], threads: int, batch: int, block: int, rng: np.random.Generator, progress: Progress
) -> list[list[TimedKernel]]:
    """Kernel times of every model; the models take turns, so a disturbance does not fall on one of them."""
    progress.stage("profile kernels", _ROUNDS)
    sessions = [
        ProfiledSession(s.model, {"input": rng.random((batch, *s.input_shape), dtype=np.float32)}, threads)
        for s in samples
    ]
    for _ in range(_ROUNDS):
        for index in rng.permutation(len(sessions)):
            for _ in range(_RUNS):
                sessions[index].run()
        progress.advance()
    return [session.finish(block) for session in sessions]


def _time_whole(
    samples: Sequence[_Sample], threads: int, batch: int, progress: Progress
) -> tuple[list[LatencyStats], list[LatencyStats]]:
    """Latencies of every model in plain sessions, and of a few of them once more, for the repeat floor."""
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        paths = {}
        for index, sample in enumerate(samples):
            paths[str(index)] = Path(folder) / f"{index}.onnx"
            paths[str(index)].write_bytes(sample.model)
        first = measure_latency(paths, threads=threads, batch=batch, seconds_each=_SECONDS_EACH, progress=progress)
        few = {name: paths[name] for name in list(paths)[:6]}
        second = measure_latency(few, threads=threads, batch=batch, seconds_each=_SECONDS_EACH, progress=progress)
    return [first[name] for name in paths], [second[name] for name in few]
