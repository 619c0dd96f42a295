"""The first tensor that departs is found where it departs, and looking does not change what is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from autocompress.errors import UsageError
from autocompress.export.comparison import compare_tensors, first_departure
from autocompress.export.onnx import write_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import LayerPlan, NumFormat
from autocompress.runtime.cpu import int8_weight_bits
from tests.graphs import compress, resnet

INT8 = LayerPlan(compute="int8", storage=NumFormat(bits=int8_weight_bits()))


def model(*plans: LayerPlan) -> CompressedModel:
    graph, weights = resnet(blocks=1)
    return compress(graph, weights, {layer.name: plans[i % len(plans)] for i, layer in enumerate(graph.compressible)})


def images() -> torch.Tensor:
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("plans", [(INT8,), (INT8, LayerPlan()), (LayerPlan(),)])
def test_a_file_and_its_simulation_agree_in_every_tensor(plans: tuple[LayerPlan, ...], tmp_path: Path) -> None:
    compressed = model(*plans)
    write_onnx(compressed, tmp_path / "model.onnx")
    given = images()
    found = compare_tensors(compressed, tmp_path / "model.onnx", [given])
    assert torch.equal(given, images())
    assert first_departure(found) is None
    seen = [departure.tensor for departure in found]
    assert set(compressed.plan.activations) | {"logits"} <= set(seen)
    order = ["image", *(out for layer in compressed.graph.layers for out in layer.outputs)]
    assert seen == [tensor for tensor in order if tensor in seen]


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv2", "fc"])
def test_the_layer_that_departs_is_named_and_no_other(layer: str, tmp_path: Path) -> None:
    """Another bias of one layer in the file: what lies behind it is judged on what it really read."""
    compressed, path = model(INT8), tmp_path / "model.onnx"
    bias = compressed.graph.by_name[layer].inputs[2]
    moved = replace(compressed, weights={**compressed.weights, bias: compressed.weights[bias] + 0.3})
    write_onnx(moved, path)
    departed = [found for found in compare_tensors(compressed, path, [images()]) if found.departs]
    assert len(departed) == 1
    (found,) = departed
    assert found.tensor in {f"{layer}_out", f"{layer}_out_relu", "logits"}
    assert found.share > 0.5


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    write_onnx(model(LayerPlan()), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="not written from this model"):
        compare_tensors(model(INT8), tmp_path / "model.onnx", [images()])
    with pytest.raises(UsageError, match="no model file"):
        compare_tensors(model(INT8), tmp_path / "nothing.onnx", [images()])


def test_a_wrong_scale_is_found(tmp_path: Path) -> None:
    compressed, path = model(INT8), tmp_path / "model.onnx"
    write_onnx(compressed, path)
    damaged = onnx.load(path)
    (conv,) = [node for node in damaged.graph.node if node.name == "1"]
    (weight,) = [node for node in damaged.graph.node if conv.input[1] in node.output]
    (scale,) = [tensor for tensor in damaged.graph.initializer if tensor.name == weight.input[1]]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.2, scale.name))
    path.write_bytes(damaged.SerializeToString())
    found = first_departure(compare_tensors(compressed, path, [images()]))
    assert found is not None
    assert found.tensor.startswith(compressed.graph.compressible[1].name)
