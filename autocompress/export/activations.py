"""The activations of an exported graph: which exist as floats, which as integers, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from autocompress.errors import UsageError
from autocompress.export.builder import GraphBuilder
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import affine_parameters, hard_sigmoid_line, smooth_gates
from autocompress.plan import Layer

MOVERS = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose outputs hold values of their first input only: they keep its scale and zero point."""

INTEGER_KERNELS = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})
"""Operators without weights that the runtime replaces by an integer kernel where all they read and write is int8."""

CLIPPERS = ("Relu", "Clip")
"""Activations that the runtime absorbs into the QuantizeLinear behind them."""

NEED_ZERO_POINTS = ("Gemm", "MatMul")
"""Operators that the runtime replaces only where both zero points are written down, even if they are 0."""


class Activations:
    """Writes QuantizeLinear and DequantizeLinear where a plan's formats ask for them.

    Attributes:
        scales: scale and zero point of each tensor that the plan holds in 8 bits.
        integers: the name of each such tensor's integers, once they exist.
        born_int8: those that an integer kernel makes, and so lie in memory with channels last.
        swishes: for each product ``x * sigmoid(x)`` of integers, the tensor x.
        gates: the names of the Sigmoids that are part of those.
    """

    def __init__(self, compressed: CompressedModel, out: GraphBuilder, tuned: bool = True) -> None:
        self.compressed = compressed
        self.graph = compressed.graph
        self.out = out
        self.scales = self._scales()
        self.integers: dict[str, str] = {}
        self.born_int8: set[str] = set()
        self._floats: dict[str, str] = {}
        self._per_axis: dict[str, str] = {}
        self.swishes, self.gates = self._swishes() if tuned else ({}, set())
        self._explicit_zero = {
            name for layer in self.graph.layers if layer.op in NEED_ZERO_POINTS for name in layer.activations
        }

    def _scales(self) -> dict[str, tuple[float, int]]:
        """Scale and zero point of each int8 activation; movers inherit their input's."""
        scales: dict[str, tuple[float, int]] = {}
        formats = self.compressed.plan.activations
        for name in formats:
            if name not in self.graph.tensors:
                raise UsageError(f"the plan gives a format to {name!r}, which is no tensor of this model")
            if name not in self.compressed.ranges:
                raise UsageError(f"no range is known for {name!r}, which the plan holds in {formats[name].bits} bits")
            low, high = self._clipped(name, *self.compressed.ranges[name])
            scales[name] = affine_parameters(low, high, formats[name].bits)
        for layer in self.graph.layers:
            if layer.op in MOVERS and layer.inputs[0] in scales and all(o in scales for o in layer.outputs):
                scales.update(dict.fromkeys(layer.outputs, scales[layer.inputs[0]]))
        return scales

    def _swishes(self) -> tuple[dict[str, str], set[str]]:
        products, parts = {}, set()
        for gate, product in smooth_gates(self.graph).items():
            layer = self.graph.by_name[gate]
            if layer.inputs[0] in self.scales and layer.outputs[0] not in self.scales:
                products[product] = layer.inputs[0]
                parts.add(gate)
        return products, parts

    def _clipped(self, tensor: str, low: float, high: float) -> tuple[float, float]:
        """The range within what the Relu or Clip before the tensor lets through.

        Integers that stand for more than that would keep the activation, and the layer before it, in float.
        """
        layer = self.graph.producers.get(tensor)
        if layer is None or layer.op not in CLIPPERS:
            return low, high
        if layer.op == "Relu":
            return max(low, 0.0), max(high, 0.0)
        bounds = [float(self.compressed.weights[i]) if i in layer.weights else None for i in layer.inputs[1:]]
        floor, ceiling = (*bounds, None, None)[:2]
        low = low if floor is None else max(low, floor)
        return low, high if ceiling is None else min(high, ceiling)

    def produced(self, tensor: str, made: str, by: str = "") -> None:
        """A tensor now exists as float ``made``; quantizes it where the plan says so.

        Behind a MaxPool on floats with (equal) scales per channel: the runtime would move a single scale's
        QuantizeLinear in front of the MaxPool, onto a tensor four times as large.
        """
        if tensor not in self.scales:
            self._floats[tensor] = made
            return
        repeat = self.graph.tensors[tensor].shape[0] if by == "MaxPool" else 0
        self.integers[tensor] = self.out.node("QuantizeLinear", [made, *self._scale_inputs(tensor, repeat)])

    def _scale_inputs(self, tensor: str, repeat: int = 0) -> list[str]:
        """The scale and (unless it is 0) zero point as inputs, ``repeat`` times for a scale per channel."""
        scale, zero = self.scales[tensor]
        shape = (repeat,) if repeat else ()
        inputs = [self.out.constant(np.full(shape, scale, np.float32))]
        if zero or tensor in self._explicit_zero:
            inputs.append(self.out.constant(np.full(shape, zero, np.uint8)))
        return inputs

    def as_float(self, tensor: str) -> str:
        """The tensor as float32."""
        if tensor not in self._floats:
            output = tensor if tensor in self.graph.outputs else ""
            inputs = [self.integers[tensor], *self._scale_inputs(tensor)]
            self._floats[tensor] = self.out.node("DequantizeLinear", inputs, output)
        return self._floats[tensor]

    def as_float_widened(self, tensor: str, channels: int) -> str:
        """The tensor as float32 with more channels, all 0."""
        zero = self.scales[tensor][1]
        rank = 1 + len(self.graph.tensors[tensor].shape)
        ends = [0] * rank + [0, channels] + [0] * (rank - 2)
        inputs = [self.integers[tensor], self.out.constant(np.array(ends, np.int64))]
        if zero:
            inputs.append(self.out.constant(np.array(zero, np.uint8)))
        return self.out.node("DequantizeLinear", [self.out.node("Pad", inputs), *self._scale_inputs(tensor)])

    def floats(self) -> dict[str, str]:
        """The names of tensors that exist as float32."""
        return dict(self._floats)

    def as_float_per_axis(self, tensor: str) -> str:
        """The tensor as float32 through equal scales along an axis."""
        if tensor not in self._per_axis:
            shape = self.graph.tensors[tensor].shape
            axis = next((a for a, size in enumerate(shape, start=1) if size > 1), 0)
            if not axis:
                return self.as_float(tensor)
            inputs = [self.integers[tensor], *self._scale_inputs(tensor, shape[axis - 1])]
            self._per_axis[tensor] = self.dequantize(inputs, axis)
        return self._per_axis[tensor]

    def dequantize(self, inputs: list[str], axis: int) -> str:
        """DequantizeLinear with a scale for each index of ``axis`` (1 is the default, and left out)."""
        if axis == 1:
            return self.out.node("DequantizeLinear", inputs)
        return self.out.node("DequantizeLinear", inputs, axis=axis)

    def moved(self, layer: Layer) -> list[str]:
        """Names for the outputs of a layer that works on its input's integers."""
        names = [self.out.name() for _ in layer.outputs]
        self.integers.update(zip(layer.outputs, names, strict=True))
        if layer.inputs[0] in self.born_int8:
            self.born_int8.update(layer.outputs)
        return names

    def give(self, tensors: Iterable[str]) -> None:
        """Makes those of ``tensors`` that the model gives to its user."""
        for tensor in tensors:
            if tensor in self.graph.outputs:
                self.as_float(tensor)

    def moves_integers(self, layer: Layer) -> bool:
        """Whether the layer works on integers.

        A MaxPool does where an integer kernel made them, which leaves channels last.  On integers with channels
        first it has no fast kernel (5 ms where the float one takes 0.1), so there it works on floats.
        """
        source = layer.inputs[0] if layer.inputs else ""
        if layer.op not in MOVERS or source not in self.integers or any(o not in self.scales for o in layer.outputs):
            return False
        return layer.op != "MaxPool" or source in self.born_int8

    def shifted(self, layer: Layer) -> bool:
        """Writes a HardSigmoid from int8 to int8 as a change of scale, where the scales allow that.

        ``clip(alpha x + beta, 0, 1)`` is a straight line that the integers' own limits clip: the integers of x, read
        with another zero point, are the curve's before rounding.
        """
        source, result = layer.inputs[0], layer.outputs[0]
        if layer.op != "HardSigmoid" or source not in self.integers or self.scales.get(result) != (1 / 255, 0):
            return False
        alpha, beta = hard_sigmoid_line(layer)
        scale, zero = self.scales[source]
        moved = zero - beta / (alpha * scale)
        if not 0 <= round(moved) <= 255 or abs(moved - round(moved)) > 1e-3:
            return False
        line = self.out.node(
            "DequantizeLinear",
            [
                self.integers[source],
                self.out.constant(np.array(scale, np.float32)),
                self.out.constant(np.array(round(moved), np.uint8)),
            ],
        )
        full = [self.out.constant(np.array(1 / (255 * alpha), np.float32)), self.out.constant(np.array(0, np.uint8))]
        self.integers[result] = self.out.node("QuantizeLinear", [line, *full])
        if source in self.born_int8:
            self.born_int8.add(result)
        return True

    def behind_clip(self, layer: Layer) -> str:
        """The layer's output, or that of the Relu or Clip that is its only reader."""
        tensor = layer.outputs[0]
        while tensor not in self.scales:
            readers = self.graph.consumers.get(tensor, ())
            if tensor in self.graph.outputs or len(readers) != 1 or readers[0].op not in CLIPPERS:
                break
            tensor = readers[0].outputs[0]
        return tensor

    def ends_in_int8(self, layer: Layer) -> bool:
        """Whether a QuantizeLinear is all that reads the layer's output, or the activation behind it."""
        return self.behind_clip(layer) in self.scales
