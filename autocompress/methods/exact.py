"""The runtime's own integer arithmetic in torch: what the exported file computes, integer for integer.

The simulation of ``simulation.py`` rounds real numbers, so that gradients flow; where a value lies near the middle
between two integers, the last digits decide, and one step's difference grows from layer to layer.  Here int8 layers add
up integers (exactly: float32 holds them up to 2^24) and requantize as ONNX Runtime does: the int32 sum, bias included,
times ``scale_x * scale_w / scale_y`` in float32, rounded half to even, saturated (its ``QLinearConv`` and ``QGemm``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autocompress.graph.executor import GraphModule
from autocompress.graph.ops import OPERATORS
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.input_rounding import input_taps
from autocompress.methods.quantization import (
    FUSED_ACTIVATIONS,
    MOVERS,
    affine_parameters,
    fused_output,
    hard_sigmoid_line,
    weight_axis,
)
from autocompress.methods.simulation import bias_integers
from autocompress.plan import Layer, LayerPlan


@dataclass(frozen=True)
class _IntegerLayer:
    """An int8 layer: its integers as float32, and what its sums are multiplied by.

    ``output`` is the quantized tensor it gives, the activation behind it included; empty where it gives floats.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    multiplier: torch.Tensor
    output: str


Operand = tuple[torch.Tensor, float, int]
"""Integers less their zero point, their scale and that zero point."""


def add_integers(first: Operand, second: Operand, output: tuple[float, int]) -> torch.Tensor:
    """The rounded sum of two quantized tensors, less its zero point, as ``MlasQLinearAdd`` takes it.

    Its two fused multiply-adds round once each: double precision holds their products exactly.
    """
    scale, zero = output
    steps = [torch.tensor(operand[1]) / scale for operand in (first, second)]
    exact = [step.double() for step in steps]
    fixed = (zero - (exact[0] * first[2] + (steps[1] * second[2]).double()).float()).float()
    inner = second[0].double().mul_(exact[1]).add_(exact[1] * second[2] + fixed.double()).float()
    return first[0].double().mul_(exact[0]).add_(exact[0] * first[2]).add_(inner).float().round_().sub_(zero)


def multiply_integers(first: Operand, second: Operand, output: tuple[float, int]) -> torch.Tensor:
    """The rounded product of two quantized tensors, less its zero point, as ``MlasQLinearMul`` takes it."""
    scale, zero = output
    step = torch.tensor(first[1]) * torch.tensor(second[1]) / scale
    return (first[0] * second[0]).mul_(step).add_(zero).round_().sub_(zero)


def shifted_line(layer: Layer, integers: torch.Tensor, source: tuple[float, int]) -> torch.Tensor | None:
    """A HardSigmoid as the exporter writes it: its input's integers read with another zero point, on another scale.

    None where the scales do not allow that.
    """
    scale, zero = source
    alpha, beta = hard_sigmoid_line(layer)
    moved = zero - beta / (alpha * scale)
    if not 0 <= round(moved) <= 255 or abs(moved - round(moved)) > 1e-3:
        return None
    step = torch.tensor(1 / (255 * alpha), dtype=torch.float32)
    return ((integers + (zero - round(moved))) * scale / step).round_()


PAIRS = {"Add": add_integers, "Mul": multiply_integers}

POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
"""Operators that average integers: their sums are exact where those of scaled values are not."""


class ExactModule(GraphModule):
    """A compressed model computed as the runtime computes it; no gradients.

    Quantized activations are held as integers less their zero point, in float32.
    """

    def __init__(self, compressed: CompressedModel) -> None:
        super().__init__(compressed.graph, compressed.weights)
        self.input_taps = input_taps(compressed.plan)
        self._scales = activation_scales(compressed)
        self._integer = {
            layer.name: self._prepared(compressed, layer)
            for layer in self.graph.compressible
            if compressed.plan.layers.get(layer.name, LayerPlan()).compute == "int8"
        }
        self._pairs = {
            layer.name: fused_output(self.graph, layer)
            for layer in self.graph.layers
            if layer.op in PAIRS and len(layer.activations) == 2 and self._scales.keys() >= set(layer.activations)
        }
        self._pairs = {name: output for name, output in self._pairs.items() if output in self._scales}
        held = {made.output for made in self._integer.values() if made.output} | set(self._pairs.values())
        self._absorbed = {
            layer.name for layer in self.graph.layers if layer.op in FUSED_ACTIVATIONS and set(layer.outputs) <= held
        }

    def _prepared(self, compressed: CompressedModel, layer: Layer) -> _IntegerLayer:
        output = fused_output(self.graph, layer)
        weight = compressed.weights[layer.inputs[1]].float()
        steps = compressed.weight_scales[layer.name].float()
        along = [-1 if axis == weight_axis(layer) else 1 for axis in range(weight.dim())]
        multiplier = torch.tensor(self._scales[layer.inputs[0]][0]) * steps
        if output in self._scales:
            multiplier = multiplier / self._scales[output][0]
        if layer.op == "Conv":
            multiplier = multiplier.reshape(-1, *(1,) * (weight.dim() - 2))
        bias = bias_integers(compressed, layer)
        integers = (weight / steps.reshape(along)).round()
        return _IntegerLayer(integers, bias, multiplier, output if output in self._scales else "")

    @torch.no_grad()
    def forward(self, *inputs: torch.Tensor) -> Any:
        floats: dict[str, torch.Tensor] = {}
        integers: dict[str, torch.Tensor] = {}
        for name, value in zip(self.graph.inputs, inputs, strict=True):
            self._hold(name, value, floats, integers)
        for position, layer in enumerate(self.graph.layers):
            if layer.name not in self._absorbed:
                self._step(layer, floats, integers)
            for name in self._last_reader.get(position, ()):
                floats.pop(name, None)
                integers.pop(name, None)
        outputs = tuple(self._float(name, floats, integers) for name in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _step(self, layer: Layer, floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor]) -> None:
        operator = OPERATORS[layer.op]
        made = self._integer.get(layer.name)
        if made is not None:
            bias = () if made.bias is None else (made.bias,)
            sums = operator(layer.attributes, integers[layer.inputs[0]], made.weight, *bias).mul_(made.multiplier)
            if made.output:
                integers[made.output] = self._saturated(made.output, sums.round_())
            else:
                floats[layer.outputs[0]] = sums
            return
        if layer.op in MOVERS and layer.inputs[0] in integers and all(o in self._scales for o in layer.outputs):
            rest = [self._argument(name) for name in layer.inputs[1:]]
            moved = operator(layer.attributes, integers[layer.inputs[0]], *rest)
            integers.update(zip(layer.outputs, moved if isinstance(moved, tuple) else (moved,), strict=False))
            return
        if layer.name in self._pairs:
            output = self._pairs[layer.name]
            first, second = ((integers[name], *self._scales[name]) for name in layer.activations)
            integers[output] = self._saturated(output, PAIRS[layer.op](first, second, self._scales[output]))
            return
        if layer.op == "HardSigmoid" and layer.inputs[0] in integers and layer.outputs[0] in self._scales:
            shifted = shifted_line(layer, integers[layer.inputs[0]], self._scales[layer.inputs[0]])
            if shifted is not None and self._scales[layer.outputs[0]][1] == 0:
                integers[layer.outputs[0]] = shifted.clamp_(0, 255)
                return
        if layer.op in POOLS and layer.inputs[0] in integers:
            mean = operator(layer.attributes, integers[layer.inputs[0]]) * self._scales[layer.inputs[0]][0]
            self._hold(layer.outputs[0], mean, floats, integers)
            return
        arguments = [
            self._argument(name) if name in layer.weights or not name else self._float(name, floats, integers)
            for name in layer.inputs
        ]
        if layer.name in self.input_taps:
            arguments[0] = self.input_taps[layer.name](self._float(layer.inputs[0], floats, integers))
        result = operator(layer.attributes, *arguments)
        for name, value in zip(layer.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            if name:
                self._hold(name, value, floats, integers)

    def _argument(self, name: str) -> torch.Tensor | float | None:
        if not name:
            return None
        return self._bounds[name] if name in self._bounds else self.weight(name)

    def _hold(
        self, name: str, value: torch.Tensor, floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor]
    ) -> None:
        if name in self._scales:
            integers[name] = self._saturated(name, (value / self._scales[name][0]).round_())
        else:
            floats[name] = value

    def _saturated(self, name: str, rounded: torch.Tensor) -> torch.Tensor:
        zero = self._scales[name][1]
        return rounded.clamp_(-zero, 255 - zero)

    def _float(self, name: str, floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor]) -> torch.Tensor:
        return floats[name] if name in floats else integers[name] * self._scales[name][0]


def activation_scales(compressed: CompressedModel) -> dict[str, tuple[float, int]]:
    """Scale (a float32 value) and zero point of each quantized activation; movers inherit their input's."""
    scales: dict[str, tuple[float, int]] = {}
    for name in compressed.plan.activations:
        scale, zero = affine_parameters(*compressed.ranges[name])
        scales[name] = float(torch.tensor(scale, dtype=torch.float32)), zero
    for layer in compressed.graph.layers:
        if layer.op in MOVERS and layer.inputs[0] in scales and all(o in scales for o in layer.outputs):
            scales.update(dict.fromkeys(layer.outputs, scales[layer.inputs[0]]))
    return scales
