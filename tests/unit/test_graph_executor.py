"""Running a graph in torch: taps, norms, names, and operators against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph.executor import GraphModule, build_module
from autocompress.graph.ops import OPERATORS
from tests.graphs import GraphMaker, evaluate, resnet


def test_a_graph_computes_what_an_independent_interpreter_computes() -> None:
    graph, weights = resnet((4, 6, 8), blocks=1, size=8)
    image = torch.randn(3, 1, 8, 8)
    expected = evaluate(graph, weights, image)["logits"].float()
    torch.testing.assert_close(build_module(graph, weights)(image), expected, rtol=1e-4, atol=1e-5)


def test_taps_see_and_replace_activations_and_weights() -> None:
    maker = GraphMaker()
    hidden = maker.relu(maker.conv(maker.input("image", (1, 2, 2)), 2, "conv", kernel=1))
    maker.conv(hidden, 1, "out", kernel=1)
    graph = maker.build(("image",), ("out_out",))
    module = build_module(graph, maker.weights)
    image = torch.ones(1, 1, 2, 2)
    seen: list[torch.Tensor] = []
    module.taps["image"] = lambda x: x * 2
    module.taps[hidden] = lambda x: seen.append(x) or torch.zeros_like(x)  # type: ignore[func-returns-value]
    assert torch.equal(module(image).flatten(), maker.weights["out.bias"].expand(4))
    expected = torch.relu(2 * maker.weights["conv.weight"].flatten() + maker.weights["conv.bias"])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)
    module.taps = {}
    module.weight_taps["out"] = torch.zeros_like
    assert torch.equal(module(image).flatten(), maker.weights["out.bias"].expand(4))


def test_a_norm_stands_between_a_layer_and_its_readers() -> None:
    maker = GraphMaker()
    maker.conv(maker.input("image", (1, 4, 4)), 2, "a.conv")
    graph = maker.build(("image",), ("a.conv_out",))
    module = build_module(graph, maker.weights)
    image = torch.randn(2, 1, 4, 4)
    plain = module(image)
    module.set_norm(graph.by_name["a.conv"], nn.BatchNorm2d(2).eval())
    torch.testing.assert_close(module(image), plain / np.sqrt(1 + 1e-5))


def test_models_may_use_the_names_this_class_uses() -> None:
    maker = GraphMaker()
    hidden = maker.conv(maker.input("image", (1, 4, 4)), 2, "norms", kernel=1)
    hidden = maker.conv(hidden, 2, "taps.graph", kernel=1)
    scale = maker.weight("weight", np.array([2.0, 3.0], dtype=np.float32).reshape(2, 1, 1))
    maker.op("Mul", (hidden, scale), "out", (2, 4, 4))
    graph = maker.build(("image",), ("out",))
    module = build_module(graph, maker.weights)
    assert module(torch.zeros(1, 1, 4, 4)).shape == (1, 2, 4, 4)
    assert len(list(module.parameters())) == 5
    assert set(module.weights()) == set(maker.weights)


def test_constants_and_running_statistics_are_not_trained() -> None:
    maker = GraphMaker()
    image = maker.input("image", (2, 4, 4))
    names = ("weight", "bias", "running_mean", "running_var")
    norm = [maker.weight(f"norm.{k}", np.ones(2, dtype=np.float32)) for k in names]
    hidden = maker.op("BatchNormalization", (image, *norm), "normed", (2, 4, 4))
    half = maker.weight("half", np.array(0.5, dtype=np.float32))
    zero, six = (maker.weight(k, np.array(v, dtype=np.float32)) for k, v in (("zero", 0), ("six", 6)))
    hidden = maker.op("Clip", (maker.op("Mul", (hidden, half), "halved", (2, 4, 4)), zero, six), "out", (2, 4, 4))
    module = build_module(maker.build(("image",), ("out",)), maker.weights)
    assert {name for name, _ in module.named_parameters()} == {"norm.weight", "norm.bias"}
    with torch.no_grad():
        assert float(module(torch.full((1, 2, 4, 4), 100.0)).max()) == 6.0
    assert set(module.weights()) == set(maker.weights)


def test_unknown_operators_are_named() -> None:
    maker = GraphMaker()
    maker.op("Einsum", (maker.input("image", (1, 4, 4)),), "out", (1, 4, 4))
    with pytest.raises(UsageError, match=r"cannot be simulated: Einsum; known: .*Conv"):
        GraphModule(maker.build(("image",), ("out",)), {})


def run(op: str, *inputs: torch.Tensor | None, **attributes: object) -> torch.Tensor:
    return OPERATORS[op](attributes, *inputs)  # type: ignore[no-any-return]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


X = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)


def test_uneven_padding_of_convolution_and_pooling() -> None:
    weight = torch.ones(1, 2, 3, 3)
    given = run("Conv", X, weight, None, pads=(0, 0, 1, 2))
    torch.testing.assert_close(given, F.conv2d(F.pad(X, (0, 2, 0, 1)), weight))
    given = run("MaxPool", -X, kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 1, 1))
    assert given.shape == (1, 2, 2, 2)
    assert float(given.max()) == -1.0  # what is padded never wins


def test_average_pooling_with_and_without_the_padding() -> None:
    for include in (0, 1):
        given = run("AveragePool", X, kernel_shape=(3, 3), pads=(1, 1, 1, 1), count_include_pad=include)
        torch.testing.assert_close(given, F.avg_pool2d(X, 3, 1, 1, count_include_pad=bool(include)))


def test_pooling_over_one_axis_leaves_channels_alone() -> None:
    series = X.reshape(1, 4, 8)
    torch.testing.assert_close(
        run("MaxPool", series, kernel_shape=(3,), strides=(2,), pads=(1, 1)), F.max_pool1d(series, 3, 2, 1)
    )
    torch.testing.assert_close(run("AveragePool", series, kernel_shape=(2,), strides=(2,)), F.avg_pool1d(series, 2, 2))


@pytest.mark.filterwarnings("error")
def test_movers() -> None:
    far = 2**63 - 1
    assert torch.equal(run("Slice", X, ints(-2), ints(far), ints(2)), X[:, :, -2:])
    assert torch.equal(run("Slice", X, ints(-(2**63)), ints(3), ints(-1), ints(2)), X[..., :3:2])
    assert torch.equal(run("Gather", X, ints(1, 0), axis=1), X[:, [1, 0]])
    assert torch.equal(run("GatherND", X[0, 0], torch.tensor([[0, 1], [3, 2]])), torch.tensor([2.0, 15.0]))
    assert torch.equal(run("Reshape", X, ints(0, -1)), X.flatten(1))
    assert torch.equal(run("Transpose", X, perm=(0, 2, 3, 1)), X.permute(0, 2, 3, 1))
    assert torch.equal(run("Pad", X, ints(1, 0, 2, 0), None, ints(2, 3)), F.pad(X, (0, 0, 1, 2)))
    assert torch.equal(run("Unsqueeze", X, ints(0, 5)), X[None, ..., None])
    assert torch.equal(run("Squeeze", X, ints(0)), X[0])
    assert torch.equal(run("Expand", X[:, :1], ints(1, 2, 1, 1)), X[:, :1].expand(1, 2, 4, 4))
    assert [tuple(p.shape) for p in run("Split", X, ints(1, 3), axis=2)] == [(1, 2, 1, 4), (1, 2, 3, 4)]
    assert torch.equal(run("Range", torch.tensor(0), torch.tensor(6), torch.tensor(2)), ints(0, 2, 4))


def test_activations_and_reductions() -> None:
    slope = torch.tensor([0.1, 0.2]).view(2, 1, 1)
    torch.testing.assert_close(run("PRelu", -X, slope), F.prelu(-X, slope.flatten()))
    torch.testing.assert_close(run("HardSigmoid", X, alpha=1 / 6, beta=0.5), F.hardsigmoid(X))
    torch.testing.assert_close(run("ReduceMean", X, ints(2, 3), keepdims=0), X.mean((2, 3)))
    torch.testing.assert_close(run("ReduceMax", X, ints(-1)), X.amax(-1, keepdim=True))
    torch.testing.assert_close(run("GlobalMaxPool", X), X.amax((2, 3), keepdim=True))
    torch.testing.assert_close(run("Max", X, 2 * X, X + 40), torch.maximum(2 * X, X + 40))
    scale, shift = torch.rand(2), torch.rand(2)
    torch.testing.assert_close(
        run("GroupNormalization", X, scale, shift, num_groups=2), F.group_norm(X, 2, scale, shift)
    )
    torch.testing.assert_close(
        run("InstanceNormalization", X, scale, shift), F.instance_norm(X, weight=scale, bias=shift)
    )
    torch.testing.assert_close(
        run("Gemm", X[0, 0], X[0, 1], ints(1).float(), alpha=2.0, beta=3.0), 2 * X[0, 0] @ X[0, 1] + 3
    )
    torch.testing.assert_close(run("Gemm", X[0, 0], X[0, 1], None, transA=1, transB=1), X[0, 0].t() @ X[0, 1].t())
