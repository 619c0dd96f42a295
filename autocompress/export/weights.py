"""Writes weight layers: how each computes, and how its weights are stored, as the plan says.

Each compute type has one writer, which adds the layer's nodes to the graph: the layer's own operator behind the nodes
that make its inputs, or other operators in its place.  What decides the forms is said in ``export/onnx.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto

from autocompress.errors import UsageError
from autocompress.export.activations import NEED_ZERO_POINTS, Activations
from autocompress.export.builder import RUNTIME_DOMAIN, GraphBuilder
from autocompress.export.integers import grid_scale, pack_fields, weight_integers
from autocompress.export.storage import StoredWeights
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import BLOCK, check_layer, is_integer
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Compute, Layer, LayerPlan, is_weight_layer, weight_of
from autocompress.runtime.cpu import int8_weight_bits

WORD = 4
"""Bytes that integer kernels read together."""

SMALL_WINDOW = 9
"""Positions of a window up to which a whole word pays on processors without VNNI, where products take longer."""


def gathered_channels(channels: int, window: int) -> int:
    """Input channels that an ungrouped integer convolution is given: zeros fill the word that its windows are read by.

    A first layer of 1 or 3 channels takes 10 to 40% less time with 4, the padding included.  Without VNNI the products
    with zeros cost more than the reading saves where windows are large (7 x 7: a third more time).

    Args:
        channels: that the layer has.
        window: positions of its window.
    """
    small = 1 < window <= SMALL_WINDOW or (window > 1 and int8_weight_bits() == 8)
    return max(channels, WORD) if small else channels


class WeightLayers:
    """Writes the weight layers of one model.

    Args:
        compressed: what a plan made of a model.
        activations: which activations exist as floats, and which as integers.
        out: where nodes and initializers go.
        tuned: whether forms are taken that only make ONNX Runtime faster.
    """

    def __init__(
        self, compressed: CompressedModel, activations: Activations, out: GraphBuilder, tuned: bool = True
    ) -> None:
        self.tuned = tuned
        self.compressed = compressed
        self.activations = activations
        self.out = out
        for layer in compressed.graph.stored:
            check_layer(layer, self.plan(layer))
        self._dynamic: dict[str, list[str]] = {}
        self._stored = StoredWeights(compressed, out, self._transposed(), least=2 if tuned else 4)

    def _transposed(self) -> list[str]:
        """Layers whose integers are wanted as ``[inputs, outputs]``, but whose weights lie the other way round."""
        layers = self.compressed.graph.compressible
        return [
            layer.name
            for layer in layers
            if self.plan(layer).compute == "int8_dynamic" and layer.attributes.get("transB")
        ]

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
        if layer.op == "Gather":
            self._embedding(layer, output)
        else:
            _WRITERS[self.plan(layer).compute](self, layer, output, name)

    def writes(self, layer: Layer) -> bool:
        """Whether ``write`` is what adds the layer: it has weights in a format of the plan's choice."""
        return is_weight_layer(layer) or (layer.op == "Gather" and layer.name in self.compressed.plan.layers)

    # ---------------------------------------------------------------------------------------- one a compute type

    def float32(self, layer: Layer, output: str, name: str) -> None:
        """The operator in float32; integer weights become floats when the model is loaded."""
        source = layer.inputs[0]
        quiet = source in self.activations.integers and self.activations.ends_in_int8(layer)
        first = self.activations.as_float_per_axis(source) if quiet else self.activations.as_float(source)
        rest = [self._input(layer, i) for i in layer.inputs[2:]]
        self.out.layer(layer.op, [first, self._float_weight(layer), *rest], [output], layer.attributes, name)

    def float16(self, layer: Layer, output: str, name: str) -> None:
        """The operator in 16-bit floats between two Casts; a CPU without such kernels executes it in float32."""
        given = self.activations.as_float(layer.inputs[0])
        inputs = [self.out.node("Cast", [given], to=int(TensorProto.FLOAT16)), self._halves(layer)]
        for bias in layer.inputs[2:]:
            value = self.compressed.weights[bias].detach().cpu().numpy().astype(np.float16)
            inputs.append(self.out.constant(value))
        made = self.out.name()
        self.out.layer(layer.op, inputs, [made], layer.attributes, name)
        self.out.node("Cast", [made], output, to=int(TensorProto.FLOAT))

    def int8(self, layer: Layer, output: str, name: str) -> None:
        """The operator between DequantizeLinear nodes, which the runtime replaces by an integer kernel."""
        source = layer.inputs[0]
        if source not in self.activations.scales:
            raise UsageError(f"layer {layer.name!r} computes in int8, but its input {source!r} has no 8-bit format")
        scale, stored = self._scale(layer), self._stored.integers(layer)
        added = self._missing_channels(layer) if self.tuned else 0
        if added:
            stored = self.out.node("Pad", [stored, self.out.constant(np.array([0, 0, 0, 0, 0, added, 0, 0]))])
        parameters = [stored, self.out.constant(scale)]
        if layer.op in NEED_ZERO_POINTS:
            parameters.append(self.out.constant(np.zeros(scale.shape, np.int8)))
        weight = self.activations.dequantize(parameters, weight_axis(layer))
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

    def int8_dynamic(self, layer: Layer, output: str, name: str) -> None:
        """Integer product of weights with an input quantized over its own range, which the runtime fuses into one."""
        source, scale = layer.inputs[0], self._scale(layer)
        if source not in self._dynamic:
            self._dynamic[source] = [self.out.name() for _ in range(3)]
            self.out.layer("DynamicQuantizeLinear", [self.activations.as_float(source)], self._dynamic[source], {})
        integers, step, zero = self._dynamic[source]
        product, bias = self.out.name(), layer.inputs[2] if len(layer.inputs) > 2 else ""
        self.out.layer("MatMulInteger", [integers, self._stored.integers(layer), zero], [product], {}, name)
        whole = self.out.node("Cast", [product], to=int(TensorProto.FLOAT))
        steps = self.out.node("Mul", [step, self.out.constant(scale)])
        made = self.out.node("Mul", [whole, steps], "" if bias else output)
        if bias:
            self.out.node("Add", [made, self._flat_bias(bias)], output)

    def weight_only(self, layer: Layer, output: str, name: str) -> None:
        """MatMulNBits: weights of 2, 4 or 8 bits with a scale a block, symmetric (the middle value stands for 0)."""
        plan = self.plan(layer)
        integers, scale = weight_integers(self.compressed, layer, plan)
        bits, block = plan.storage.bits, plan.storage.block or BLOCK
        matrix = integers if weight_axis(layer) == 0 else integers.T
        rows, columns = matrix.shape
        padded = np.pad(matrix.astype(np.int16), ((0, 0), (0, -columns % block))) + 2 ** (bits - 1)
        packed = pack_fields(padded, bits).reshape(rows, -1, block * bits // 8)
        inputs = [self.activations.as_float(layer.inputs[0])]
        inputs += [self.out.constant(packed), self.out.constant(scale.reshape(-1))]
        if len(layer.inputs) > 2 and layer.inputs[2]:
            inputs += ["", "", self._flat_bias(layer.inputs[2])]
        # The default level 0 computes in float32, up to 30 times slower.
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
        self.out.layer("MatMulNBits", inputs, [output], attributes, name, RUNTIME_DOMAIN)

    def _embedding(self, layer: Layer, output: str) -> None:
        """Rows of a table of integers, each column with a scale: only the rows that are read become floats."""
        ids = self._input(layer, layer.inputs[1])
        if self.plan(layer).storage.scheme == "float":
            self.out.layer("Gather", [self._float_weight(layer), ids], [output], layer.attributes)
            return
        rows = self.out.node("Gather", [self._stored.integers(layer), ids])
        axis = len(self.compressed.graph.tensors[layer.outputs[0]].shape)
        inputs = [rows, self.out.constant(self._scale(layer))]
        self.out.layer("DequantizeLinear", inputs, [output], {} if axis == 1 else {"axis": axis})

    # ------------------------------------------------------------------------------------------------ the parts

    def stored(self, weight: str) -> str:
        """The name of an initializer with a stored tensor as it is; an absent one stays absent."""
        return self.out.constant(self.compressed.weights[weight].detach().cpu().numpy()) if weight else ""

    def _input(self, layer: Layer, tensor: str) -> str:
        if not tensor:
            return ""
        return self.stored(tensor) if tensor in layer.weights else self.activations.as_float(tensor)

    def _missing_channels(self, layer: Layer) -> int:
        """Zero channels that make an int8 convolution faster."""
        shape = self.compressed.graph.tensors[layer.inputs[1]].shape
        if layer.op != "Conv" or len(shape) != 4 or layer.attributes.get("group", 1) != 1:
            return 0
        return gathered_channels(shape[1], shape[2] * shape[3]) - shape[1]

    def _scale(self, layer: Layer) -> np.ndarray:
        return weight_integers(self.compressed, layer, self.plan(layer))[1]

    def _flat_bias(self, bias: str) -> str:
        return self.out.constant(self.compressed.weights[bias].detach().cpu().numpy().reshape(-1))

    def _float_weight(self, layer: Layer) -> str:
        storage = self.plan(layer).storage
        if not is_integer(storage):
            if storage.bits == 16:
                return self.out.node("Cast", [self._halves(layer)], to=int(TensorProto.FLOAT))
            return self.stored(weight_of(layer))
        integers, scale = weight_integers(self.compressed, layer, self.plan(layer))
        cast = self.out.node("Cast", [self._stored.integers(layer)], to=int(TensorProto.FLOAT))
        return self.out.node("Mul", [cast, self.out.constant(grid_scale(layer, integers, scale, storage))])

    def _halves(self, layer: Layer) -> str:
        """Weights as 16-bit floats."""
        weight = self.compressed.weights[weight_of(layer)].detach().cpu().numpy()
        half = weight.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), weight):
            raise UsageError(f"layer {layer.name!r} stores 16-bit floats, but its weights are none; round them first")
        return self.out.constant(half)

    def _int32_bias(self, layer: Layer, weight_scale: np.ndarray) -> str:
        bias = self.compressed.weights[layer.inputs[2]].detach().cpu().numpy().astype(np.float64).reshape(-1)
        scale = (np.float32(self.activations.scales[layer.inputs[0]][0]) * weight_scale).astype(np.float32)
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(bias / scale), limits.min, limits.max).astype(np.int32)
        return self.activations.dequantize([self.out.constant(integers), self.out.constant(scale)], 0)


_WRITERS: Mapping[Compute, Callable[[WeightLayers, Layer, str, str], None]] = {
    "fp32": WeightLayers.float32,
    "fp16": WeightLayers.float16,
    "int8": WeightLayers.int8,
    "int8_dynamic": WeightLayers.int8_dynamic,
    "weight_only": WeightLayers.weight_only,
}
