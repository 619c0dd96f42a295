"""The exact module gives what ONNX Runtime gives for the exported file, to the last bit where all is integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from autocompress.export.onnx import to_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.exact import ExactModule, add_integers, multiply_integers
from autocompress.methods.post_training import CalibrationOptions, quantize_model, uniform_plan
from autocompress.methods.simulation import build_compressed
from autocompress.plan import ModelGraph
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.kernels import check_kernels, executed_kernels
from autocompress.runtime.session import make_session
from tests.graphs import GraphMaker, resnet

Model = tuple[ModelGraph, dict[str, torch.Tensor]]


def mobile() -> Model:
    """Hard-swish, depthwise, squeeze-excitation by a HardSigmoid, ReLU6, concatenation, average and max pooling."""
    maker = GraphMaker(3)
    x = maker.conv(maker.input("image", (3, 16, 16)), 16, "stem", stride=2)
    gate = maker.op("HardSigmoid", (x,), "gate", maker.tensors[x].shape, alpha=1 / 6, beta=0.5)
    x = maker.op("Mul", (x, gate), "swish", maker.tensors[x].shape)
    deep = maker.relu(maker.conv(x, 16, "depthwise", group=16))
    pooled = maker.op("GlobalAveragePool", (deep,), "squeezed", (16, 1, 1))
    squeezed = maker.conv(maker.relu(maker.conv(pooled, 8, "se.down", kernel=1)), 16, "se.up", kernel=1)
    opened = maker.op("HardSigmoid", (squeezed,), "opened", (16, 1, 1), alpha=1 / 6, beta=0.5)
    scaled = maker.op("Mul", (opened, deep), "scaled", (16, 8, 8))
    bounds = [maker.weight(name, np.array(v, np.float32)) for name, v in (("zero", 0.0), ("six", 6.0))]
    six = maker.op("Clip", (maker.conv(scaled, 16, "project", kernel=1), *bounds), "relu6", (16, 8, 8))
    both = maker.op("Concat", (six, maker.add(scaled, six, "sum")), "both", (32, 8, 8), axis=1)
    smaller = maker.max_pool(maker.relu(maker.conv(both, 16, "mixed")), "smaller")
    maker.head(smaller, 5, "logits")
    return maker.build(("image",), ("logits",)), maker.weights


def tokens() -> Model:
    maker = GraphMaker(4)
    x = maker.input("x", (6, 16))
    first = maker.matmul(x, 24, "up")
    y = maker.matmul(maker.relu(first), 16, "down")
    maker.matmul(maker.add(y, x, "sum"), 4, "out")
    return maker.build(("x",), ("out_out",)), maker.weights


def quantized(
    model: Model, bits: int = int8_weight_bits(), compute: str = "int8"
) -> tuple[CompressedModel, torch.Tensor]:
    graph, weights = model
    data = torch.randn(48, *graph.tensors[graph.inputs[0]].shape, generator=torch.Generator().manual_seed(1))
    plan = uniform_plan(graph, compute, bits)[0]  # type: ignore[arg-type]
    options = CalibrationOptions(ranges="mse", equalize="off", rounding="nearest")
    return quantize_model(graph, weights, plan, [(data[:32],)], options), data[32:]


def runtime(compressed: CompressedModel, inputs: torch.Tensor) -> torch.Tensor:
    data = to_onnx(compressed).SerializeToString()
    assert check_kernels(compressed, executed_kernels(data)) == []
    session = make_session(data)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


@pytest.mark.parametrize("bits", [int8_weight_bits(), 4])
@pytest.mark.parametrize("make", [lambda: resnet((8, 16), blocks=2, size=12, stem_pool=True), mobile])
def test_integer_networks_agree_to_the_bit(make: Callable[[], Model], bits: int) -> None:
    compressed, inputs = quantized(make(), bits)
    expected = runtime(compressed, inputs)
    given = ExactModule(compressed)(inputs)
    # The last layer gives floats: a sum of integers times a scale.
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)


def test_matrix_products_agree() -> None:
    compressed, inputs = quantized(tokens())
    torch.testing.assert_close(ExactModule(compressed)(inputs), runtime(compressed, inputs), rtol=1e-5, atol=1e-6)


def test_dynamic_products_agree() -> None:
    compressed, inputs = quantized(tokens(), compute="int8_dynamic")
    torch.testing.assert_close(ExactModule(compressed)(inputs), runtime(compressed, inputs), rtol=1e-3, atol=1e-3)


def test_the_simulation_for_training_stays_near() -> None:
    compressed, inputs = quantized(resnet((8, 16), blocks=2, size=12))
    exact = ExactModule(compressed)(inputs)
    with torch.no_grad():
        simulated = build_compressed(compressed)(inputs)
    error = float((simulated - exact).square().mean() / exact.square().mean())
    assert error < 1e-3


def test_sums_and_products_of_integers() -> None:
    first = (torch.tensor([10.0, -20.0, 250.0]), 0.1, 5)  # 1.0, -2.0, 25.0
    second = (torch.tensor([4.0, 4.0, 4.0]), 0.25, 0)  # 1.0
    assert add_integers(first, second, (0.5, 3)).tolist() == [4.0, -2.0, 52.0]
    assert multiply_integers(first, second, (0.5, 3)).tolist() == [2.0, -4.0, 50.0]
