"""Every runtime runs the same artifacts, says what it executes, and is timed and profiled in the same way."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from autocompress.errors import UsageError
from autocompress.export.metadata import read_metadata
from autocompress.export.onnx import to_onnx
from autocompress.hardware.kernels import KINDS
from autocompress.hardware.measure import measure_profile
from autocompress.hardware.models import COST_MODELS, cost_model
from autocompress.hardware.profilers import PROFILERS, profiled
from autocompress.hardware.synthetic import (
    INT8,
    inverted_net,
    odd_net,
    plain_net,
    random_formats,
    random_model,
    residual_net,
    token_net,
)  # fmt: skip
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import CompressionPlan, Metric, Target
from autocompress.runtime.base import RUNTIMES, load_runtime
from autocompress.runtime.kernels import check_kernels
from autocompress.runtime.session import make_session
from autocompress.runtime.timing import measure_latency
from autocompress.search.deliver import ORIGINAL, Delivery
from autocompress.tasks.base import Task
from autocompress.tasks.splits import TensorSplit
from tests.graphs import compress, resnet

NAMES = list(RUNTIMES)
FAMILIES = {"residual": residual_net, "inverted": inverted_net, "plain": plain_net, "odd": odd_net, "token": token_net}


def made(family: str, style: str, seed: int = 0, size: int = 28) -> CompressedModel:
    rng = np.random.default_rng(seed)
    graph = FAMILIES[family](rng, size, (48, 96) if family == "token" else (16, 48))
    return random_model(graph, random_formats(graph, rng, style), rng)


def images(compressed: CompressedModel, count: int) -> np.ndarray:
    shape = compressed.graph.tensors["input"].shape
    return np.random.default_rng(1).random((count, *shape), dtype=np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_plain_session(name: str, family: str) -> None:
    for style, tolerance in (("fp32", 1e-4), ("int8", 0.06), ("runs", 0.06)):
        compressed = made(family, style)
        artifact = to_onnx(compressed).SerializeToString()
        batch = images(compressed, 3)
        (expected,) = make_session(artifact).run(None, {"input": batch})
        (found,) = load_runtime(name).session(artifact).run({"input": batch})
        # Integers may round the other way, by one step each; floats only add in another order.
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_batch_and_an_open_one_agree(name: str) -> None:
    compressed = made("residual", "fp32")
    artifact = to_onnx(compressed).SerializeToString()
    runtime, batch = load_runtime(name), images(compressed, 2)
    open_batch, fixed = runtime.session(artifact), runtime.session(artifact, batch=2)
    assert open_batch.inputs[0].shape[0] is None
    assert [(i.name, i.dtype) for i in fixed.inputs] == [("input", "float32")]
    first = open_batch.run({"input": batch})[0]
    np.testing.assert_allclose(fixed.run({"input": batch})[0], first, rtol=1e-4, atol=1e-5)
    # What a session gave stays as it was when the session runs again.
    kept = first.copy()
    open_batch.run({"input": batch[:1] + 1.0})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_allclose(open_batch.run({"input": batch[1:]})[0], kept[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["residual", "inverted", "plain"])
def test_layers_run_in_the_type_that_was_planned(name: str, family: str) -> None:
    for style in ("fp32", "int8"):
        compressed = made(family, style)
        report = load_runtime(name).executed_kernels(to_onnx(compressed).SerializeToString())
        layers = len(compressed.graph.compressible)
        assert check_kernels(compressed, report) == []
        assert (report.int8_weight_layers, report.fp32_weight_layers) == (
            (layers, 0) if style == "int8" else (0, layers)
        )
        assert sum(report.counts.values()) == len(report.nodes)


@pytest.mark.parametrize("name", NAMES)
def test_a_float_artifact_is_not_taken_for_the_int8_plan(name: str) -> None:
    report = load_runtime(name).executed_kernels(to_onnx(made("residual", "fp32")).SerializeToString())
    wrong = check_kernels(made("residual", "int8"), report)
    assert any("is int8 in the plan, but the runtime executes it in float" in text for text in wrong)


@pytest.mark.parametrize("name", NAMES)
def test_latency_ranks_models(name: str, tmp_path: Path) -> None:
    paths = {}
    for size in (14, 40):
        paths[str(size)] = tmp_path / f"{size}.onnx"
        paths[str(size)].write_bytes(to_onnx(made("residual", "fp32", size=size)).SerializeToString())
    stats = measure_latency(paths, seconds_each=0.2, runtime=name)
    assert 0 < stats["14"].low_ms <= stats["14"].median_ms
    assert stats["14"].median_ms < stats["40"].median_ms / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ["fp32", "int8"])
def test_profiled_kernels_cover_the_graph(name: str, style: str) -> None:
    compressed = made("residual", style, size=40)
    session = profiled(name, to_onnx(compressed).SerializeToString(), {"input": images(compressed, 1)}, 1)
    for _ in range(60):
        session.run()
    kernels = session.finish(16)
    assert {kernel.kind for kernel in kernels} <= set(KINDS)
    weighty = [k for k in kernels if k.work.weight_bytes]
    assert len(weighty) == len(compressed.graph.compressible)
    assert {k.kind.rpartition("_")[2] for k in weighty} == {style}
    # Padding can only add to the multiply-accumulates of the graph.
    assert sum(k.work.macs for k in weighty) >= compressed.graph.macs()
    assert all(kernel.microseconds > 0 for kernel in kernels)


@pytest.mark.parametrize("name", NAMES)
def test_profiled_kernels_add_up_to_the_run(name: str, tmp_path: Path) -> None:
    compressed = made("residual", "fp32", size=64)
    artifact = to_onnx(compressed).SerializeToString()
    (tmp_path / "model.onnx").write_bytes(artifact)
    session = profiled(name, artifact, {"input": images(compressed, 1)}, 1)
    for _ in range(60):
        session.run()
    total_ms = sum(kernel.microseconds for kernel in session.finish(16)) * 1e-3
    latency = measure_latency({"model": tmp_path / "model.onnx"}, seconds_each=0.2, runtime=name)["model"]
    # Beside the kernels there is a little for each and for the run; the machine may be busy in one of the two.
    assert 0.4 < total_ms / latency.median_ms < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_profile_of_it_prices_plans(name: str) -> None:
    profile = measure_profile(models=12, runtime=name)
    assert (profile.runtime, profile.runtime_version) == (name, load_runtime(name).version())
    assert version(name) == profile.runtime_version
    assert profile.holdout is not None
    graph = made("residual", "fp32").graph
    small = made("residual", "fp32", size=14).graph
    model = cost_model(profile)
    prices = [float(model.lower(g).price([CompressionPlan()]).latency_ms[0]) for g in (small, graph)]
    assert 0 < prices[0] < prices[1]


@pytest.mark.parametrize("name", NAMES)
def test_bad_artifacts_are_usage_errors(name: str, tmp_path: Path) -> None:
    runtime = load_runtime(name)
    with pytest.raises(UsageError, match=r"nothing\.onnx"):
        runtime.session(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="threads=0"):
        runtime.session(to_onnx(made("token", "fp32")).SerializeToString(), threads=0)


def test_every_runtime_is_profiled_and_priced() -> None:
    assert set(PROFILERS) == set(RUNTIMES)
    assert {f"fitted-{name}" for name in RUNTIMES} <= set(COST_MODELS)
    with pytest.raises(UsageError, match="openvino"):
        load_runtime("openvin")


def test_what_to_install_is_said() -> None:
    code = (
        "import sys; sys.modules['openvino'] = None; "
        "from autocompress.errors import UsageError; from autocompress.runtime.base import load_runtime\n"
        "try: load_runtime('openvino')\n"
        "except UsageError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'autocompress[openvino]'" in told


@pytest.mark.parametrize("name", NAMES)
def test_models_are_delivered_in_it(name: str, tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, {layer.name: INT8 for layer in graph.compressible[1:]})
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    data = TensorSplit(images, torch.zeros(40, dtype=torch.long))
    task = SimpleNamespace(
        name="t", model_name="m", metric=Metric(), split=lambda _: data, score=lambda out, _: out.argmax(1) % 2
    )
    target = Target(hardware="local", runtime=name, version=load_runtime(name).version())
    delivery = Delivery(tmp_path, cast(Task, task), target, ("error", "latency_ms"), {}, seed=0)
    assert delivery.add(ORIGINAL, lambda: compressed, None)
    delivery.measure([], seconds_each=0.1)
    point = delivery.points[ORIGINAL]
    artifact = tmp_path / ".work" / "models" / ORIGINAL / "model.onnx"
    assert point.size_bytes == artifact.stat().st_size
    said = read_metadata(artifact)
    assert said.plan == compressed.plan
    assert said.metrics is not None
    assert said.metrics.latency_ms == pytest.approx(point.latency_ms.measured, rel=1e-5)
    assert said.provenance is not None
    assert (said.provenance.task, said.provenance.model) == ("t", "m")
    assert point.kernels == load_runtime(name).executed_kernels(artifact).counts
    assert point.runtime_agreement is not None
    assert point.runtime_agreement >= 0.9
    (again,) = measure_latency({"again": artifact}, seconds_each=0.1, runtime=name).values()
    # Of one magnitude: how well two measurements agree depends on what else the machine does.
    assert point.latency_ms.measured is not None
    assert 0.4 < point.latency_ms.measured / again.median_ms < 2.5
