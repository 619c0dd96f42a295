"""Times the kernels of several artifacts, which take turns so that a disturbance does not fall on one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from autocompress.hardware.profilers import profiled
from autocompress.hardware.reading import TimedKernel
from autocompress.progress import Progress, SilentProgress
from autocompress.runtime.base import DEFAULT_RUNTIME, load_runtime
from autocompress.runtime.timing import settle

TURNS = 3
TURN_S = 0.02
LEAST_RUNS = 4
"""Runs of one artifact in a row: the first pays for what the others have left in the caches."""


def profile_kernels(
    models: Sequence[bytes],
    block: int,
    *,
    threads: int = 1,
    batch: int = 1,
    runtime: str = DEFAULT_RUNTIME,
    progress: Progress | None = None,
    seed: int = 0,
) -> list[list[TimedKernel]]:
    """The kernels of each artifact with their times.

    Args:
        models: ONNX files' contents.
        block: channels that the runtime packs together (``FittedProfile.nchwc_block``).
        threads: threads of one run.
        batch: samples of one run.
        runtime: whose kernels.
        progress: told how far it is.
        seed: of the inputs' numbers and of the order.
    """
    progress = progress or SilentProgress()
    rng = np.random.default_rng(seed)
    sessions = [profiled(runtime, model, random_feed(model, batch, rng), threads) for model in models]
    workers = threads if load_runtime(runtime).spins else 1
    progress.stage("profile kernels", TURNS)
    for _ in range(TURNS):
        for index in rng.permutation(len(sessions)):
            settle(workers)
            until, runs = time.perf_counter() + TURN_S, 0
            while runs < LEAST_RUNS or time.perf_counter() < until:
                sessions[index].run()
                runs += 1
        progress.advance()
    return [session.finish(block) for session in sessions]


def random_feed(model: bytes, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Numbers for every input: floats between 0 and 1, and ones where it takes integers."""
    graph = onnx.ModelProto.FromString(model).graph
    feed = {}
    for given in graph.input:
        kind = given.type.tensor_type
        shape = [size.dim_value if size.HasField("dim_value") else batch for size in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floating = np.issubdtype(dtype, np.floating)
        feed[given.name] = rng.random(shape).astype(dtype) if floating else np.ones(shape, dtype)
    return feed
