"""Nothing in an exported file is there twice, unread, or left over from the float model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from autocompress.export.onnx import to_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.post_training import quantize_model, uniform_plan
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, LayerPlan
from autocompress.runtime.session import make_session
from tests.graphs import GraphMaker, compress, resnet

INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
INT8_STORED_4 = LayerPlan(compute="int8", storage=INT4_WEIGHT)
FP32_STORED_4 = LayerPlan(storage=INT4_WEIGHT)


def residual(*plans: LayerPlan) -> CompressedModel:
    graph, weights = resnet(blocks=2, stem_pool=True, size=32)
    return compress(graph, weights, {layer.name: plans[i % len(plans)] for i, layer in enumerate(graph.compressible)})


def twins() -> CompressedModel:
    """Two layers with the same weights, which a file needs once."""
    maker = GraphMaker()
    image = maker.input("image", (8, 12, 12))
    first = maker.relu(maker.conv(image, 8, "a"))
    second = maker.relu(maker.conv(first, 8, "b"))
    maker.weights["b.weight"] = maker.weights["a.weight"].clone()
    maker.head(second, 10, "logits")
    graph = maker.build(("image",), ("logits",))
    return compress(graph, maker.weights, {layer.name: INT8 for layer in graph.compressible})


def attention() -> CompressedModel:
    from autocompress.graph.read import read_model

    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, activation="gelu")
    inputs = torch.randn(4, 8, 32)
    graph, weights = read_model(block.eval(), (inputs,))
    return quantize_model(graph, weights, uniform_plan(graph, "int8", 8)[0], [(inputs,)])


MODELS: dict[str, Callable[[], CompressedModel]] = {
    "fp32": lambda: residual(LayerPlan()),
    "int8": lambda: residual(INT8),
    "mixed": lambda: residual(INT8, LayerPlan(), INT8_STORED_4, FP32_STORED_4),
    "twins": twins,
    "attention": attention,
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request: pytest.FixtureRequest) -> tuple[CompressedModel, onnx.ModelProto]:
    compressed = MODELS[request.param]()
    return compressed, to_onnx(compressed)


def test_no_initializer_is_stored_twice(made: tuple[CompressedModel, onnx.ModelProto]) -> None:
    contents = Counter((t.data_type, tuple(t.dims), t.raw_data) for t in made[1].graph.initializer)
    assert [dims for (_, dims, _), count in contents.items() if count > 1] == []


def test_everything_stored_or_computed_is_read(made: tuple[CompressedModel, onnx.ModelProto]) -> None:
    graph = made[1].graph
    alive = {output.name for output in graph.output}
    dead = []
    for node in reversed(graph.node):
        if alive & set(node.output):
            alive.update(node.input)
        else:
            dead.append(node.op_type)
    assert dead == []
    assert {tensor.name for tensor in graph.initializer} <= alive
    assert {node.op_type for node in graph.node}.isdisjoint({"Constant", "Identity"})


def test_nothing_describes_what_follows_from_the_rest(made: tuple[CompressedModel, onnx.ModelProto]) -> None:
    graph = made[1].graph
    assert not graph.value_info
    assert not graph.doc_string
    assert not any(node.doc_string for node in graph.node)
    # Names that nobody outside uses have no more letters than it takes to tell them apart.
    outside = {value.name for value in (*graph.input, *graph.output)}
    inner = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    assert max(len(name) for name in inner - outside) <= 2


def test_no_float_weights_are_left_of_an_integer_layer(made: tuple[CompressedModel, onnx.ModelProto]) -> None:
    compressed, model = made
    stored = {t.raw_data for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1}
    plans = compressed.plan.layers
    integer = [
        layer
        for layer in compressed.graph.compressible
        if plans.get(layer.name, LayerPlan()).storage.scheme == "affine"
    ]
    for layer in integer:
        weight = compressed.weights[layer.inputs[1]].numpy()
        assert weight.tobytes() not in stored, layer.name
        assert np.ascontiguousarray(weight.T).tobytes() not in stored, layer.name


def test_a_plain_session_opens_it(made: tuple[CompressedModel, onnx.ModelProto]) -> None:
    assert make_session(made[1].SerializeToString()).get_outputs()[0].name == made[0].graph.outputs[0]
