"""The exported file computes what the plan says, and ONNX Runtime executes it as the plan says."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from autocompress.errors import UsageError
from autocompress.export.builder import GraphBuilder, short_names
from autocompress.export.onnx import to_onnx, write_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import (
    FLOAT32,
    INT4_WEIGHT,
    INT8_WEIGHT,
    UINT8_ACTIVATION,
    CompressionPlan,
    LayerPlan,
    ModelGraph,
    NumFormat,
)
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.onnxruntime import check_kernels, executed_kernels, make_session
from tests.graphs import GraphMaker, compress, evaluate, resnet

FP32 = LayerPlan()
INT8 = LayerPlan(compute="int8", storage=NumFormat(bits=int8_weight_bits()))
INT8_STORED_4 = LayerPlan(compute="int8", storage=INT4_WEIGHT)
FP32_STORED_8 = LayerPlan(compute="fp32", storage=INT8_WEIGHT)
FP32_STORED_4 = LayerPlan(compute="fp32", storage=INT4_WEIGHT)
ALL = (FP32, INT8, INT8_STORED_4, FP32_STORED_8, FP32_STORED_4)


def uniform(graph: ModelGraph, plan: LayerPlan) -> dict[str, LayerPlan]:
    return {layer.name: plan for layer in graph.compressible}


def drawn(graph: ModelGraph, seed: int) -> dict[str, LayerPlan]:
    chooser = random.Random(seed)
    return {layer.name: chooser.choice(ALL) for layer in graph.compressible}


def run(compressed: CompressedModel, inputs: torch.Tensor) -> np.ndarray:
    session = make_session(to_onnx(compressed).SerializeToString())
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def executed(compressed: CompressedModel) -> dict[str, int]:
    """Kernels by operator, after asserting that the weight layers run as planned."""
    report = executed_kernels(to_onnx(compressed).SerializeToString())
    assert check_kernels(compressed, report) == []
    ops = [node.op for node in report.nodes]
    return {op: ops.count(op) for op in ops}


def close_to_simulation(compressed: CompressedModel, tolerance: float) -> None:
    graph = compressed.graph
    inputs = torch.rand((4, *graph.tensors[graph.inputs[0]].shape), generator=torch.Generator().manual_seed(3))
    expected = evaluate(graph, compressed.weights, inputs, compressed)[graph.outputs[0]].numpy()
    error = np.abs(run(compressed, inputs) - expected).max() / np.abs(expected).max()
    assert error < tolerance


@pytest.mark.parametrize("plan", [FP32, FP32_STORED_8, FP32_STORED_4])
def test_float_layers_are_exact_and_their_integers_are_folded_at_load(plan: LayerPlan) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, uniform(graph, plan))
    close_to_simulation(compressed, 1e-5)
    kernels = executed(compressed)
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)


@pytest.mark.parametrize("plan", [INT8, INT8_STORED_4])
def test_an_int8_plan_runs_in_integers_from_end_to_end(plan: LayerPlan) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, uniform(graph, plan))
    close_to_simulation(compressed, 0.02)
    kernels = executed(compressed)
    assert kernels["QuantizeLinear"] == 1
    assert kernels["QLinearConv"] == 9
    assert kernels["QLinearAdd"] == 3
    assert kernels["QLinearGlobalAveragePool"] == kernels["QGemm"] == 1
    assert "DequantizeLinear" not in kernels


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_runs_as_planned_and_agrees_with_its_simulation(seed: int, pool: bool) -> None:
    graph, weights = resnet(blocks=1, stem_pool=pool, size=32)
    compressed = compress(graph, weights, drawn(graph, seed))
    close_to_simulation(compressed, 0.03)
    executed(compressed)


def chain(names: str = "abc") -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    maker = GraphMaker()
    x = maker.input("image", (8, 12, 12))
    for name in names:
        x = maker.relu(maker.conv(x, 8, name))
    maker.head(x, 10, "logits")
    return maker.build(("image",), ("logits",)), maker.weights


@pytest.mark.parametrize("plan", [FP32, FP32_STORED_8])
def test_a_float_layer_between_int8_layers_stays_float(plan: LayerPlan) -> None:
    graph, weights = chain()
    compressed = compress(graph, weights, {**uniform(graph, INT8), "b": plan})
    assert executed(compressed)["Conv"] == 1
    close_to_simulation(compressed, 0.02)


def test_a_float_layer_that_reads_one_channel_between_int8_layers_stays_float() -> None:
    maker = GraphMaker()
    image = maker.input("image", (1, 12, 12))
    a, b = maker.relu(maker.conv(image, 8, "a")), maker.relu(maker.conv(image, 8, "b"))
    maker.head(maker.relu(maker.conv(maker.add(a, b, "sum"), 8, "c")), 10, "logits")
    graph = maker.build(("image",), ("logits",))
    compressed = compress(graph, maker.weights, {**uniform(graph, INT8), "a": FP32})
    # The Add reads one int8 and one float branch; the float branch is quantized only if the plan holds it.
    held = {**compressed.plan.activations, "a_out_relu": UINT8_ACTIVATION}
    plan = compressed.plan.model_copy(update={"activations": held})
    executed(replace(compressed, plan=plan, ranges={**compressed.ranges, "a_out_relu": (0.0, 2.0)}))


def test_a_pool_behind_a_float_layer_runs_before_its_output_is_quantized() -> None:
    maker = GraphMaker()
    x = maker.max_pool(maker.relu(maker.conv(maker.input("image", (3, 32, 32)), 8, "a")), "pooled_stem")
    maker.head(maker.relu(maker.conv(x, 8, "b")), 10, "logits")
    graph = maker.build(("image",), ("logits",))
    kernels = executed(compress(graph, maker.weights, {**uniform(graph, INT8), "a": FP32}))
    assert kernels["MaxPool"] == kernels["QuantizeLinear"] == 1
    assert "DequantizeLinear" not in kernels
    assert executed(compress(graph, maker.weights, uniform(graph, INT8)))["NhwcMaxPool"] == 1


def test_a_range_beyond_what_relu_lets_through_does_not_cost_the_integer_kernel() -> None:
    graph, weights = chain("ab")
    compressed = compress(graph, weights, uniform(graph, INT8))
    ranges = {**compressed.ranges, "a_out_relu": (-0.5, 3.0)}
    assert executed(replace(compressed, ranges=ranges))["QLinearConv"] == 2


@pytest.mark.parametrize("high", [3.0, 6.0, 7.5])
def test_a_clip_is_absorbed_whatever_range_was_seen(high: float) -> None:
    maker = GraphMaker()
    maker.weight("zero", np.array(0, np.float32))
    maker.weight("six", np.array(6, np.float32))
    x = maker.conv(maker.input("image", (3, 8, 8)), 8, "a")
    x = maker.op("Clip", (x, "zero", "six"), "clipped", (8, 8, 8))
    maker.head(x, 10, "logits")
    graph = maker.build(("image",), ("logits",))
    plain = compress(graph, maker.weights, {})
    plan = CompressionPlan(layers={"a": INT8}, activations=dict.fromkeys(("image", "clipped"), UINT8_ACTIVATION))
    weight = maker.weights["a.weight"]
    scale = weight.abs().amax((1, 2, 3)) / 127
    made = replace(plain, plan=plan, weight_scales={"a": scale}, ranges={"image": (0, 1), "clipped": (0.0, high)})
    kernels = executed(made)
    assert "Clip" not in kernels
    assert kernels["QLinearConv"] == 1


def test_concat_and_average_pool_stay_in_integers() -> None:
    maker = GraphMaker()
    image = maker.input("image", (3, 16, 16))
    a, b = maker.relu(maker.conv(image, 8, "a")), maker.relu(maker.conv(image, 8, "b"))
    x = maker.op("Concat", (a, b), "both", (16, 16, 16), axis=1)
    x = maker.op("AveragePool", (x,), "small", (16, 8, 8), kernel_shape=(2, 2), strides=(2, 2))
    maker.head(x, 10, "logits")
    graph = maker.build(("image",), ("logits",))
    activations = dict.fromkeys(("image", a, b, "both", "small", "pooled", "flat"), UINT8_ACTIVATION)
    plan = CompressionPlan(layers=uniform(graph, INT8), activations=activations)
    scales = {layer.name: maker.weights[layer.inputs[1]].abs().flatten(1).amax(1) / 127 for layer in graph.compressible}
    compressed = CompressedModel(graph, maker.weights, plan, scales, dict.fromkeys(activations, (0.0, 2.0)))
    kernels = executed(compressed)
    assert kernels["QLinearConcat"] == kernels["QLinearAveragePool"] == kernels["QGemm"] == 1


def test_matmul_by_a_constant_runs_in_integers() -> None:
    maker = GraphMaker()
    x = maker.input("tokens", (6, 16))
    for name in ("first", "second"):
        maker.weight(f"{name}.weight", maker.rng.standard_normal((16, 16)).astype(np.float32))
        x = maker.op("MatMul", (x, f"{name}.weight"), f"{name}_out", (6, 16), name=name)
    graph = maker.build(("tokens",), ("second_out",))
    plan = CompressionPlan(
        layers=uniform(graph, INT8), activations=dict.fromkeys(("tokens", "first_out"), UINT8_ACTIVATION)
    )
    scales = {name: maker.weights[f"{name}.weight"].abs().amax(0) / 127 for name in ("first", "second")}
    ranges = {"tokens": (0.0, 1.0), "first_out": (-9.0, 9.0)}
    kernels = executed(CompressedModel(graph, maker.weights, plan, scales, ranges))
    assert kernels["QLinearMatMul"] == kernels["MatMulIntegerToFloat"] == 1


def test_the_graph_around_the_weights_is_small() -> None:
    graph, weights = resnet()
    for plan, limit in ((FP32, 6_000), (INT8, 13_000), (INT8_STORED_4, 13_500)):
        compressed = compress(graph, weights, uniform(graph, plan))
        each = 8 if plan == INT8 else plan.storage.bits  # 7 bits lie in a byte
        bits = each * sum(graph.tensors[layer.inputs[1]].elements for layer in graph.compressible)
        assert to_onnx(compressed).ByteSize() - bits // 8 < limit


def test_names_batch_and_metadata(tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    path = tmp_path / "sub" / "model.onnx"
    size = write_onnx(compress(graph, weights, uniform(graph, INT8)), path, {"plan": "0123"})
    assert path.stat().st_size == size
    assert list(path.parent.iterdir()) == [path]
    model = onnx.load(path)
    assert {p.key: p.value for p in model.metadata_props} == {"plan": "0123"}
    session = make_session(path)
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for batch in (1, 3):
        assert session.run(None, {"image": np.zeros((batch, 1, 28, 28), np.float32)})[0].shape == (batch, 10)


def test_exports_are_the_same_to_the_byte(tmp_path: Path) -> None:
    graph, weights = resnet(blocks=1)
    compressed = compress(graph, weights, drawn(graph, 0))
    write_onnx(compressed, tmp_path / "a.onnx")
    write_onnx(compressed, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    graph, weights = chain("a")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    compressed = replace(compress(graph, weights, uniform(graph, INT8)), weight_scales={})
    with pytest.raises(UsageError, match="no scales"):
        write_onnx(compressed, path)
    assert path.read_bytes() == b"old"


def test_what_cannot_be_exported_is_said() -> None:
    graph, weights = chain("ab")
    compressed = compress(graph, weights, uniform(graph, INT8))
    without = {k: v for k, v in compressed.plan.activations.items() if k != "a_out_relu"}
    with pytest.raises(UsageError, match="'a_out_relu' has no 8-bit format"):
        to_onnx(replace(compressed, plan=compressed.plan.model_copy(update={"activations": without})))
    with pytest.raises(UsageError, match="no range"):
        to_onnx(replace(compressed, ranges={}))
    unknown = {**compressed.plan.activations, "ghost": UINT8_ACTIVATION}
    with pytest.raises(UsageError, match="'ghost'"):
        to_onnx(replace(compressed, plan=compressed.plan.model_copy(update={"activations": unknown})))
    nine = LayerPlan(compute="int8", storage=NumFormat(bits=9))
    with pytest.raises(UsageError, match="affine of 9 bits"):
        to_onnx(replace(compressed, plan=compressed.plan.model_copy(update={"layers": {"a": nine}})))
    float_storage = LayerPlan(compute="int8", storage=FLOAT32)
    with pytest.raises(UsageError, match="float of 32 bits"):
        to_onnx(replace(compressed, plan=compressed.plan.model_copy(update={"layers": {"a": float_storage}})))


def test_equal_initializers_are_stored_once_and_names_are_short() -> None:
    builder = GraphBuilder(frozenset({"a"}))
    first = builder.constant(np.zeros(3, np.float32))
    assert builder.constant(np.zeros(3, np.float32)) == first == "b"
    assert builder.constant(np.zeros((3, 1), np.float32)) == "c"
    assert len(builder.model.graph.initializer) == 2
    names = short_names(frozenset())
    assert len({len(next(names)) for _ in range(62)}) == 1
    assert next(names) == "aa"
