"""Measures this machine: a few dozen small models, timed whole and kernel by kernel, become a hardware profile."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

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
from autocompress.hardware.profilers import noise_of
from autocompress.hardware.profiling import profile_kernels
from autocompress.hardware.reading import packed_block
from autocompress.hardware.samples import Sample, choose_samples
from autocompress.hardware.synthetic import GraphMaker, random_model
from autocompress.progress import Progress, SilentProgress
from autocompress.runtime.base import DEFAULT_RUNTIME, load_runtime
from autocompress.runtime.kernels import optimized_graph
from autocompress.runtime.timing import LatencyStats, measure_latency

logger = logging.getLogger(__name__)

_MODELS = 52
_SECONDS_EACH = 0.12
_REPEATED = 10
_SEED = 20


def local_profile(
    threads: int = 1,
    batch: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    refresh: bool = False,
    runtime: str = DEFAULT_RUNTIME,
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
        runtime: whose kernels are measured.
    """
    if threads < 1 or batch < 1:
        raise UsageError(f"threads={threads}, batch={batch}: both must be at least 1")
    path = local_path(runtime, load_runtime(runtime).version(), threads, batch, cache_dir)
    if path.is_file() and not refresh:
        try:
            return FittedProfile.load(path)
        except UsageError as error:
            logger.warning("the cached hardware profile is measured again: %s", error)
    profile = measure_profile(threads, batch, progress, runtime=runtime)
    profile.save(path)
    return profile


def measure_profile(
    threads: int = 1,
    batch: int = 1,
    progress: Progress | None = None,
    models: int = _MODELS,
    runtime: str = DEFAULT_RUNTIME,
) -> FittedProfile:
    """Measures this machine now.

    Args:
        threads: threads of one run.
        batch: samples of one run.
        progress: told how far it is.
        models: synthetic models to time; their seed is fixed.
        runtime: whose kernels are measured.
    """
    progress = progress or SilentProgress()
    begin = time.perf_counter()
    rng = np.random.default_rng(_SEED)
    block = _detect_block(rng, threads, runtime)
    progress.stage("choose models", None)
    samples = choose_samples(models, rng, block, runtime)
    measured = profile_kernels(
        [sample.model for sample in samples], block, threads=threads, batch=batch, runtime=runtime, progress=progress
    )
    latencies, again = _time_whole(samples, threads, batch, progress, runtime)
    results = [
        MeasuredModel(kernels, stats.median_ms * 1e3)
        for kernels, stats in zip(measured, latencies, strict=True)
        if kernels
    ]
    noise = noise_of(runtime)
    fit = fit_kernels(results, noise=noise)
    repeat = [abs(b.median_ms / a.median_ms - 1.0) for a, b in zip(latencies, again, strict=False)]
    channels = [tensor.shape[0] for s in samples for tensor in s.graph.tensors.values() if len(tensor.shape) == 3]
    sizes = [s.input_shape[-1] for s in samples if len(s.input_shape) == 3]
    floor = round(float(np.median(repeat)), 4)
    latency = [stats.median_ms for stats in latencies]
    return FittedProfile(
        name=LOCAL,
        runtime=runtime,
        runtime_version=load_runtime(runtime).version(),
        threads=threads,
        batch=batch,
        nchwc_block=block,
        kernels=fit.kernels,
        end_to_end=fit.end_to_end,
        holdout=hold_out(results, fit.end_to_end.cache_mb, noise=noise).model_copy(update={"repeat_floor": floor}),
        repeat_floor=floor,
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
            versions={runtime: load_runtime(runtime).version(), "numpy": np.__version__},
        ),
    )


def _detect_block(rng: np.random.Generator, threads: int, runtime: str = DEFAULT_RUNTIME) -> int:
    if runtime == "openvino":
        from autocompress.hardware import openvino_reading

        return openvino_reading.packed_block(threads)
    make = GraphMaker()
    graph = make.build(make.conv(make.tensor("input", (3, 8, 8)), 4))
    return packed_block(optimized_graph(to_onnx(random_model(graph, {}, rng)).SerializeToString(), threads))


def _time_whole(
    samples: Sequence[Sample], threads: int, batch: int, progress: Progress, runtime: str = DEFAULT_RUNTIME
) -> tuple[list[LatencyStats], list[LatencyStats]]:
    """Latencies of every model in plain sessions, and of a few of them once more, for the repeat floor."""
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        paths = {}
        for index, sample in enumerate(samples):
            paths[str(index)] = Path(folder) / f"{index}.onnx"
            paths[str(index)].write_bytes(sample.model)
        first, second = (
            measure_latency(
                chosen, threads=threads, batch=batch, seconds_each=_SECONDS_EACH, progress=progress, runtime=runtime
            )
            for chosen in (paths, {name: paths[name] for name in list(paths)[:_REPEATED]})
        )
    return [first[name] for name in paths], list(second.values())
