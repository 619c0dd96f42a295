"""The predicted size of a file is that of the file, whatever its weights are stored as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autocompress.export.onnx import to_onnx
from autocompress.hardware.calibration import DEFAULT_SIZE_COEFFICIENTS
from autocompress.hardware.footprint import size_counts, stored_bytes
from autocompress.methods.formats import STORAGES, describe
from autocompress.plan import LayerPlan, ModelGraph
from tests.graphs import GraphMaker, compress, resnet

PLANS = [LayerPlan(compute=compute, storage=s) for compute in STORAGES for s in STORAGES[compute] if compute != "fp16"]


def perceptron() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    maker = GraphMaker()
    x = maker.input("given", (200,))
    for place in range(6):
        x = maker.relu(maker.gemm(x, 200, f"layer{place}"))
    return maker.build(("given",), (x,)), maker.weights


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.compute}, {describe(plan.storage)}")
def test_the_size_of_a_file_is_foretold_within_two_percent(plan: LayerPlan) -> None:
    graph, weights = perceptron() if plan.compute in ("int8_dynamic", "weight_only") else resnet()
    compressed = compress(graph, weights, {layer.name: plan for layer in graph.compressible}, samples=1)
    columns = {layer.name: place for place, layer in enumerate(graph.compressible)}
    dims = {name: tensor.shape for name, tensor in graph.tensors.items()}
    held = {name: np.ones(2, bool) for name in compressed.plan.activations}
    formats = np.zeros((2, len(columns)), int)
    counts = size_counts(formats, [plan], held) @ np.array(DEFAULT_SIZE_COEFFICIENTS)
    predicted = stored_bytes(graph, dims, formats, columns, [plan]) + counts
    assert predicted == pytest.approx(to_onnx(compressed).ByteSize(), rel=0.02)
