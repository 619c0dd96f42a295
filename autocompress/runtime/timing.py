"""Latency of many models on a machine that others use too.

Wall-clock medians taken one model after another wander by tens of percent on a shared machine.  Here all models
take turns in short windows; a fixed reference kernel is timed at both ends of every window, and windows in which it
ran slower than it can, or in which this process did not have its CPU, are dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocompress.errors import UsageError
from autocompress.progress import Progress, SilentProgress
from autocompress.runtime.base import DEFAULT_RUNTIME, Session, load_runtime

WINDOW_S = 0.02
"""Length of one model's turn: long enough for a median, short enough that a disturbance rarely falls inside."""

MIN_RUNS = 3

ENOUGH = 8
"""Undisturbed windows of each model after which no more are taken."""

SETTLING_S = 0.004
SETTLED_AT_MOST_S = 0.2
"""Workers are looked at this often, and waited for so long."""

PATIENCE = 2
"""On a machine that is never quiet, measuring ends after this many times the rounds asked for."""

SLOWER = 1.06
"""A reference this much slower than its floor marks a disturbed window."""

BUSY = 0.98
"""The least share of a window that a single-threaded process must have had the CPU."""

BUSY_WORKERS = 0.9
"""The same with several threads, which spin between runs and so use every core they are given."""


@dataclass(frozen=True)
class LatencyStats:
    """Milliseconds of one run, from undisturbed windows.

    ``low_ms`` and ``high_ms`` bound the median at 95% (order statistics of the window medians).  ``kept`` of
    ``windows`` were undisturbed: a small share says that the machine was busy and the figure is worth less.
    """

    median_ms: float
    p95_ms: float
    low_ms: float
    high_ms: float
    windows: int
    kept: int


@dataclass(frozen=True)
class _Window:
    runs: np.ndarray
    reference: float
    busy: float


def measure_latency(
    models: Mapping[str, Path],
    *,
    threads: int = 1,
    batch: int = 1,
    seconds_each: float = 1.0,
    progress: Progress | None = None,
    runtime: str = DEFAULT_RUNTIME,
) -> dict[str, LatencyStats]:
    """Times every model, interleaved, in plain sessions.

    Args:
        models: name to ONNX file.
        threads: threads of each session.
        batch: samples a run; inputs are fixed random numbers.
        seconds_each: time spent on each model, the reference kernel aside; up to twice as long where other
            work on the machine disturbs most windows.
        progress: told of each round.
        runtime: where they run, by its name in ``base.RUNTIMES``.  The reference kernel runs in the same one, on one
            thread.

    Returns:
        For each name its statistics.  Two calls agree within 2-3% unless the machine is loaded throughout.
    """
    if batch < 1 or seconds_each <= 0:
        raise UsageError(f"batch={batch}, seconds_each={seconds_each}: both must be positive")
    progress = progress or SilentProgress()
    opened = load_runtime(runtime)
    runners = {name: _runner(opened.session(path, threads, batch), batch) for name, path in models.items()}
    # On one thread: it leaves no workers behind that would disturb the next window.
    reference = _runner(opened.session(_reference_model(), 1, 1), 1)
    for run in (*runners.values(), reference):
        for _ in range(MIN_RUNS):
            run()
    workers = threads if opened.spins else 1
    rounds = max(ENOUGH, round(seconds_each / WINDOW_S))
    windows: dict[str, list[_Window]] = {name: [] for name in runners}
    order = np.random.default_rng(0)
    names = list(runners)
    progress.stage("measure", rounds)
    settle(workers)
    before = _reference_time(reference)
    for done in range(rounds * PATIENCE):
        if done >= rounds and all(len(_quiet(w, _floor(windows), workers)) >= ENOUGH for w in windows.values()):
            break
        for index in order.permutation(len(names)):
            runs, busy = _time_window(runners[names[index]])
            settle(workers)
            after = _reference_time(reference)
            windows[names[index]].append(_Window(runs, max(before, after), busy))
            before = after
        if done < rounds:
            progress.advance()
    floor = _floor(windows)
    return {name: _summarise(taken, floor, workers) for name, taken in windows.items()}


def settle(threads: int) -> None:
    """Waits until the workers of the last session have gone to sleep.

    With several threads they spin for tens of milliseconds after a run; on a machine with no cores to spare, the next
    session would share its cores with them and run at half its speed.
    """
    if threads < 2:
        return
    give_up = time.perf_counter() + SETTLED_AT_MOST_S
    while time.perf_counter() < give_up:
        begin, cpu = time.perf_counter(), time.process_time()
        time.sleep(SETTLING_S)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - begin):
            return


def _time_window(run: Callable[[], object]) -> tuple[np.ndarray, float]:
    """Seconds of each run of one window, and the CPU seconds that this process had in each second of it."""
    # The first run pays for caches that the other models have filled and, with several threads, for their workers.
    run()
    clock = time.perf_counter
    times: list[float] = []
    cpu = time.process_time()
    begin = now = clock()
    while now - begin < WINDOW_S or len(times) < MIN_RUNS:
        run()
        end = clock()
        times.append(end - now)
        now = end
    return np.array(times), (time.process_time() - cpu) / (now - begin)


def _reference_time(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _floor(windows: Mapping[str, list[_Window]]) -> float:
    """What the reference takes where nothing disturbs it."""
    every = [w.reference for taken in windows.values() for w in taken]
    return float(np.quantile(every, 0.05)) if every else 0.0


def _quiet(windows: list[_Window], floor: float, threads: int) -> list[_Window]:
    """The windows that nothing disturbed."""
    least = BUSY if threads == 1 else BUSY_WORKERS * threads
    return [w for w in windows if w.reference <= floor * SLOWER and w.busy >= least]


def _summarise(windows: list[_Window], floor: float, threads: int) -> LatencyStats:
    quiet = _quiet(windows, floor, threads)
    if len(quiet) < 3:
        # Nowhere quiet: the least disturbed windows are the best there is.
        quiet = sorted(windows, key=lambda w: w.reference / min(w.busy, threads))[: max(5, len(windows) // 10)]
    medians = np.sort([np.median(w.runs) for w in quiet]) * 1e3
    count = len(medians)
    # Order statistics that enclose the median of `count` values with 95%, by the normal approximation.
    reach = 0.98 * count**0.5
    low = medians[max(0, int(np.floor(count / 2 - reach)))]
    high = medians[min(count - 1, int(np.ceil(count / 2 + reach)))]
    p95 = float(np.quantile(np.concatenate([w.runs for w in quiet]), 0.95)) * 1e3
    return LatencyStats(float(np.median(medians)), p95, float(low), float(high), len(windows), count)


def _runner(session: Session, batch: int) -> Callable[[], object]:
    """A call that runs the session once on fixed inputs."""
    rng = np.random.default_rng(0)
    feed = {}
    for given in session.inputs:
        shape = [batch if size is None else size for size in given.shape]
        if given.dtype == "float32":
            feed[given.name] = rng.random(shape, dtype=np.float32)
        elif given.dtype in ("int64", "int32", "bool"):
            feed[given.name] = np.ones(shape, given.dtype)
        else:
            raise UsageError(
                f"cannot time input {given.name!r} of type {given.dtype}: it must be float32, integer or bool"
            )
    return lambda: session.run(feed)


def _reference_model() -> bytes:
    """A fixed float convolution of about a hundred microseconds: what a quiet machine always does equally fast."""
    weight = np.random.default_rng(0).standard_normal((32, 32, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "reference",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 32, 28, 28])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 32, 28, 28])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data
