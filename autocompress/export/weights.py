"""Writes weight layers: how each computes, and how its weights are stored, as the plan says.

Each compute type has one writer, which adds the layer's nodes to the graph: the layer's own operator behind the nodes
that make its inputs, or other operators in its place.  What decides the forms is said in ``export/onnx.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from autocompress.errors import UsageError
from autocompress.export.activations import NEED_ZERO_POINTS, Activations
from autocompress.export.builder import GraphBuilder
from autocompress.export.integers import along_channels, weight_integers
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Compute, Layer, LayerPlan

WORD = 4
"""Bytes that integer kernels read together."""


class WeightLayers:
    """Writes the weight layers of one model.

    Args:
        compressed: what a plan made of a model.
        activations: which activations exist as floats, and which as integers.
        out: where nodes and initializers go.
    """

    def __init__(self, compressed: CompressedModel, activations: Activations, out: GraphBuilder) -> None:
        self.compressed = compressed
        self.activations = activations
        self.out = out

    def plan(self, layer: Layer) -> LayerPlan:
        """What the layer becomes; float32 where the plan says nothing."""
        return self.compressed.plan.layers.get(layer.name, LayerPlan())

    def write(self, layer: Layer, output: str, name: str) -> None:
        """Adds the nodes of a weight layer.

        Args:
            layer: Conv, Gemm or MatMul by a stored weight.
            output: the name of what it computes.
            name: of the node that computes it, by which it is found again in the runtime's graph.
        """
        _WRITERS[self.plan(layer).compute](self, layer, output, name)

    # ---------------------------------------------------------------------------------------- one a compute type

    def float32(self, layer: Layer, output: str, name: str) -> None:
        """The operator in float32; integer weights become floats when the model is loaded."""
        source = layer.inputs[0]
        quiet = source in self.activations.integers and self.activations.ends_in_int8(layer)
        first = self.activations.as_float_per_axis(source) if quiet else self.activations.as_float(source)
        rest = [self._input(layer, i) for i in layer.inputs[2:]]
        self.out.layer(layer.op, [first, self._float_weight(layer), *rest], [output], layer.attributes, name)

    def int8(self, layer: Layer, output: str, name: str) -> None:
        """The operator between DequantizeLinear nodes, which the runtime replaces by an integer kernel."""
        source, plan = layer.inputs[0], self.plan(layer)
        if source not in self.activations.scales:
            raise UsageError(f"layer {layer.name!r} computes in int8, but its input {source!r} has no 8-bit format")
        integers, scale = weight_integers(self.compressed, layer, plan)
        added = _missing_channels(layer, integers.shape)
        if added:
            integers = np.pad(integers, [(0, 0), (0, added), *[(0, 0)] * (integers.ndim - 2)])
        stored = self.out.constant(integers, int4=plan.storage.bits == 4)
        if plan.storage.bits == 4:
            stored = self.out.node("Cast", [stored], to=int(onnx.TensorProto.INT8))
        parameters = [self.out.constant(scale)]
        if layer.op in NEED_ZERO_POINTS:
            parameters.append(self.out.constant(np.zeros(scale.shape, np.int8)))
        weight = self.activations.dequantize([stored, *parameters], weight_axis(layer))
        read = self.activations.as_float_widened(source, added) if added else self.activations.as_float(source)
        inputs = [read, weight]
        quantized = self.activations.ends_in_int8(layer)
        if layer.op == "Conv" and not quantized:
            held = self.activations.behind_clip(layer)
            raise UsageError(
                f"layer {layer.name!r} computes in int8, but its output {held!r} has no 8-bit format, "
                "without which ONNX Runtime has no integer convolution"
            )
        if len(layer.inputs) > 2 and layer.inputs[2]:
            inputs.append(self.stored(layer.inputs[2]) if quantized else self._int32_bias(layer, scale))
        self.out.layer(layer.op, inputs, [output], layer.attributes, name)

    # ------------------------------------------------------------------------------------------------ the parts

    def stored(self, weight: str) -> str:
        """The name of an initializer with a stored tensor as it is; an absent one stays absent."""
        return self.out.constant(self.compressed.weights[weight].detach().cpu().numpy()) if weight else ""

    def _input(self, layer: Layer, tensor: str) -> str:
        if not tensor:
            return ""
        return self.stored(tensor) if tensor in layer.weights else self.activations.as_float(tensor)

    def _float_weight(self, layer: Layer) -> str:
        plan = self.plan(layer)
        if plan.storage.scheme != "affine":
            return self.stored(layer.inputs[1])
        integers, scale = weight_integers(self.compressed, layer, plan)
        stored = self.out.constant(integers, int4=plan.storage.bits == 4)
        cast = self.out.node("Cast", [stored], to=int(onnx.TensorProto.FLOAT))
        return self.out.node("Mul", [cast, self.out.constant(along_channels(layer, integers, scale))])

    def _int32_bias(self, layer: Layer, weight_scale: np.ndarray) -> str:
        bias = self.compressed.weights[layer.inputs[2]].detach().cpu().numpy().astype(np.float64).reshape(-1)
        scale = (np.float32(self.activations.scales[layer.inputs[0]][0]) * weight_scale).astype(np.float32)
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(bias / scale), limits.min, limits.max).astype(np.int32)
        return self.activations.dequantize([self.out.constant(integers), self.out.constant(scale)], 0)


def _missing_channels(layer: Layer, shape: tuple[int, ...]) -> int:
    """Zero channels that make an int8 convolution faster: the runtime gathers its windows a word at a time.

    A first layer that reads 1 or 3 channels takes 20 to 40% less time with 4, the padding included.
    """
    windowed = layer.op == "Conv" and layer.attributes.get("group", 1) == 1 and max(shape[2:], default=1) > 1
    return WORD - shape[1] if windowed and shape[1] < WORD else 0


_WRITERS: Mapping[Compute, Callable[[WeightLayers, Layer, str, str], None]] = {
    "fp32": WeightLayers.float32,
    "int8": WeightLayers.int8,
}
