"""Sessions, kernels as executed, and latency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import UsageError
from autocompress.export.onnx import write_onnx
from autocompress.plan import INT8_WEIGHT, LayerPlan
from autocompress.runtime import timing
from autocompress.runtime.onnxruntime import (
    check_kernels,
    executed_kernels,
    make_session,
    measure_latency,
    run_batches,
    version,
)
from tests.graphs import compress, resnet

INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, widths in (("small", (16, 16)), ("large", (64, 64))):
        graph, weights = resnet(widths, blocks=1)
        made[name] = folder / f"{name}.onnx"
        write_onnx(compress(graph, weights, {}), made[name])
    return made


def test_batches_are_concatenated(models: dict[str, Path]) -> None:
    session = make_session(models["small"])
    images = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)
    whole = run_batches(session, [images])
    assert whole.shape == (5, 10)
    for batches in ([images[:3], images[3:]], [(images[:3],), {"image": images[3:]}]):
        np.testing.assert_allclose(run_batches(session, batches), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no batches"):
        run_batches(session, [])
    with pytest.raises(UsageError, match="2 arrays"):
        run_batches(session, [(images, images)])


def test_a_session_takes_bytes_too(models: dict[str, Path]) -> None:
    assert make_session(models["small"].read_bytes(), threads=2).get_inputs()[0].name == "image"


def test_missing_files_and_wrong_values_are_usage_errors(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.onnx"):
        make_session(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match=r"nothing\.onnx"):
        executed_kernels(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="threads=0"):
        make_session(models["small"], threads=0)
    with pytest.raises(UsageError, match="batch=0"):
        measure_latency(models, batch=0)


def test_kernels_are_classified(tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, {layer.name: INT8 for layer in graph.compressible})
    write_onnx(compressed, tmp_path / "int8.onnx")
    report = executed_kernels(tmp_path / "int8.onnx")
    # The padding of the input, 9 convolutions, 3 adds, the pooling and the classifier; Quantize and two transposes at
    # the ends; Flatten.
    assert report.counts == {"int8": 15, "fp32": 0, "convert": 3, "other": 1}
    assert report.int8_weight_layers == 10
    assert check_kernels(compressed, report) == []


def test_an_artifact_that_is_not_the_plan_is_found(tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, {layer.name: INT8 for layer in graph.compressible})
    plain = compress(graph, weights, {})
    write_onnx(plain, tmp_path / "fp32.onnx")
    wrong = check_kernels(compressed, executed_kernels(tmp_path / "fp32.onnx"))
    assert "layer 'conv1' is int8 in the plan, but the runtime executes it in float" in wrong
    assert "the plan computes 10 layers in int8, the runtime executes 0" in wrong


def test_latency_ranks_models_and_repeats(models: dict[str, Path]) -> None:
    both = {**models, "small again": models["small"]}
    stats = measure_latency(both, threads=1, batch=1, seconds_each=0.4)
    assert set(stats) == set(both)
    for found in stats.values():
        assert 0 < found.low_ms <= found.median_ms <= found.high_ms
        assert found.median_ms <= found.p95_ms * 1.01
        assert 3 <= found.kept <= found.windows
    assert stats["small"].median_ms < stats["large"].median_ms / 2
    # On a quiet machine the two agree within 2%; a test has to hold on a busy one.
    assert stats["small"].median_ms == pytest.approx(stats["small again"].median_ms, rel=0.25)


def test_disturbed_windows_are_dropped() -> None:
    quiet = [timing._Window(np.full(10, 1e-3), reference=1e-4, busy=1.0) for _ in range(6)]
    slowed = [timing._Window(np.full(10, 2e-3), reference=2e-4, busy=1.0) for _ in range(10)]
    starved = [timing._Window(np.full(10, 3e-3), reference=1e-4, busy=0.6) for _ in range(4)]
    stats = timing._summarise(quiet + slowed + starved, floor=1e-4, threads=1)
    assert stats.median_ms == stats.p95_ms == pytest.approx(1.0)
    assert (stats.kept, stats.windows) == (6, 20)


def test_where_nothing_was_quiet_the_least_disturbed_windows_count() -> None:
    windows = [timing._Window(np.full(10, r * 1e-3), reference=r * 1e-4, busy=0.5) for r in range(1, 13)]
    stats = timing._summarise(windows, floor=1e-5, threads=1)
    assert stats.kept == 5
    assert stats.median_ms == pytest.approx(3.0)


class Machine:
    """Clocks of a machine whose workers spin on for some seconds."""

    def __init__(self, spinning_s: float) -> None:
        self.now, self.spinning_s, self.sleeps = 0.0, spinning_s, 0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.spinning_s)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1


@pytest.mark.parametrize(("threads", "spinning_s", "waited_s"), [(2, 0.035, 0.04), (2, 9.0, 0.2), (1, 9.0, 0.0)])
def test_sessions_of_several_threads_wait_for_the_last_ones_workers(
    threads: int, spinning_s: float, waited_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(spinning_s)
    monkeypatch.setattr(timing, "time", machine)
    timing.settle(threads)
    assert machine.now == pytest.approx(waited_s, abs=2 * timing.SETTLING_S)


def test_version() -> None:
    assert version()[0].isdigit()
