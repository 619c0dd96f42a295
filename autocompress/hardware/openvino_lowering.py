"""How OpenVINO turns a plan into kernels on a CPU, worked out for many plans at once.

The rules below were read off the execution graphs of its compiled models:

* Everything runs channels last; the image is reordered once, and so is what a Flatten takes apart.
* A convolution or matrix product takes in its bias, the activation behind it, and a sum with a tensor of its own type.
* Inside int8 stretches nothing is converted.  An int8 kernel writes float32 at once where all its readers are float,
  none of them adds, and its values start at 0; otherwise it writes integers and a dequantizer follows.
* A dequantizer of values that do not start at 0 runs channels first, with a reordering before and behind it, unless
  the exporter gave it a scale for each channel (as it does for a float layer that stands between int8 ones).
* What a float kernel writes for int8 readers is quantized once, by a kernel of its own.
* An int8 convolution with a float summand rescales that first, and its float readers undo that, each by itself; a
  float convolution does not take in an int8 summand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from autocompress.hardware.kernels import Number, aligned_int8, conv_work, gemm_work, move_work
from autocompress.hardware.lowering import ELEMENTWISE, VIEWS, Emit, Mask, Step
from autocompress.methods.quantization import FOLLOWERS, MOVERS
from autocompress.plan import Layer, ModelGraph, is_weight_layer

_UNARY = frozenset({"Sigmoid", "LeakyRelu", "Relu", "Clip", "HardSwish", "HardSigmoid", "Tanh", "Gelu", "Erf", "Elu"})
"""Taken in by the convolution or product before them, whatever they are."""

_POSITIVE = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax"})

_POOLS = {"GlobalAveragePool": "global_pool", "AveragePool": "pool", "MaxPool": "pool"}


@dataclass(frozen=True)
class _Sum:
    """The addition that a convolution may compute: ``partner`` is the other convolution that may, if there is one."""

    layer: Layer
    result: str
    other: str
    partner: Layer | None


@dataclass
class OpenvinoLowering:
    """One pass over a graph for a batch of plans; ``run`` emits every kernel.  Arguments are those of ``Lowering``."""

    graph: ModelGraph
    steps: tuple[Step, ...]
    dims: Mapping[str, tuple[Number, ...]]
    int8: Mapping[str, Mask]
    held: Mapping[str, Mask]
    count: int
    block: int
    batch: int
    emit: Emit
    integers: dict[str, Mask] = field(default_factory=dict)
    """Under which plans a tensor lies in memory as integers."""
    channels_last: set[str] = field(default_factory=set)
    summed: dict[str, Mask] = field(default_factory=dict)
    """Under which plans an addition runs inside a convolution."""

    def __post_init__(self) -> None:
        self.none = np.zeros(self.count, dtype=bool)
        self.all = ~self.none
        self._results = {step.layer.name: step.result for step in self.steps}
        self._wants: dict[str, Mask] = {}
        self._dequantized: dict[tuple[str, bool], Mask] = {}
        self._from_zero = _never_negative(self.graph)

    def run(self) -> None:
        for tensor in self.graph.inputs:
            self._quantize(tensor, self.all)
        for step in self.steps:
            layer = step.layer
            if step.folded or not layer.outputs:
                continue
            if layer.op == "Conv" and step.weight:
                self._convolution(step)
            elif layer.op in ("Gemm", "MatMul"):
                self._product(step)
            elif layer.op == "Add" and not layer.weights:
                self._add(step)
            elif layer.op in _POOLS or layer.op == "Concat":
                self._follower(step)
            elif layer.op in VIEWS:
                self._view(step)
            else:
                self._other(step)

    # ---------------------------------------------------------------------------------------------- tensors

    def _elements(self, tensor: str) -> Number:
        count: Number = self.batch
        for size in self.dims[tensor]:
            count = count * size
        return count

    def _mask(self, condition: Number) -> Mask:
        return condition if isinstance(condition, np.ndarray) else (self.all if condition else self.none)

    def _is_held(self, tensor: str) -> Mask:
        return self.held.get(tensor, self.none)

    def _in_integers(self, tensor: str) -> Mask:
        return self.integers.get(tensor, self.none)

    def _all_held(self, layer: Layer) -> Mask:
        """Whether an operator without weights computes in integers."""
        mask = self._is_held(self._results[layer.name])
        for tensor in layer.activations:
            mask = mask & self._is_held(tensor)
        return mask

    def _integer_readers(self, tensor: str) -> Mask:
        """Under which plans an int8 kernel reads the tensor."""
        if tensor not in self._wants:
            mask = self.none
            for layer in self.graph.consumers.get(tensor, ()):
                if is_weight_layer(layer):
                    mask = mask | self.int8.get(layer.name, self.none)
                elif layer.op in FOLLOWERS and layer.name in self._results:
                    mask = mask | self._all_held(layer)
            self._wants[tensor] = mask
        return self._wants[tensor]

    def _quantize(self, tensor: str, computed_float: Mask) -> None:
        """The tensor was computed in float32: where the plan holds it in int8, a kernel makes integers of it."""
        mask = self._is_held(tensor) & computed_float
        if mask.any():
            elements = self._elements(tensor)
            self.emit(tensor, "quantize", move_work(4 * elements, elements), mask, True)
            self.integers[tensor] = self._in_integers(tensor) | mask

    def _written_int8(self, tensor: str, computed_int8: Mask) -> Mask:
        """An int8 kernel computed the tensor: under which plans it writes integers."""
        mask = computed_int8 & self._is_held(tensor)
        adds = any(layer.op == "Add" for layer in self.graph.consumers.get(tensor, ()))
        if tensor in self._from_zero and not adds:
            mask = mask & self._integer_readers(tensor)
        self.integers[tensor] = self._in_integers(tensor) | mask
        return mask

    def _read_float(self, tensor: str, mask: Mask, between: Mask | None = None) -> None:
        """A float kernel reads the tensor; ``between``: under which plans it is a layer whose result is int8 too."""
        mask = mask & self._in_integers(tensor)
        inner = self.none if between is None else between
        for per_channel, wanted in ((True, mask & inner), (False, mask & ~inner)):
            known = self._dequantized.get((tensor, per_channel), self.none)
            new = wanted & ~known
            self._dequantized[tensor, per_channel] = known | new
            if not new.any():
                continue
            elements = self._elements(tensor)
            self.emit(tensor, "dequantize", move_work(elements, 4 * elements), new, True)
            if not per_channel and tensor in self.channels_last and tensor not in self._from_zero:
                self.emit(tensor, "transpose_int8", move_work(elements, elements), new, True)
                self.emit(tensor, "reorder_input", move_work(4 * elements, 4 * elements), new, True)

    def _make_channels_last(self, tensor: str) -> None:
        shape = self.dims[tensor]
        if tensor in self.channels_last or len(shape) < 2:
            return
        self.channels_last.add(tensor)
        if not isinstance(shape[0], np.ndarray) and shape[0] == 1:
            return  # one channel: the same memory either way
        self._reorder(tensor, "reorder_input")

    def _reorder(self, tensor: str, kind: str) -> None:
        elements = self._elements(tensor)
        integers = self._in_integers(tensor)
        self.emit(tensor, "transpose_int8", move_work(elements, elements), integers, True)
        self.emit(tensor, kind, move_work(4 * elements, 4 * elements), ~integers, True)

    # ---------------------------------------------------------------------------------------------- kernels

    def _convolution(self, step: Step) -> None:
        layer = step.layer
        source, out = layer.inputs[0], self.dims[layer.outputs[0]]
        self._make_channels_last(source)
        shape = self.dims[layer.inputs[1]]
        grouped = layer.attributes.get("group", 1) != 1
        depthwise = grouped and isinstance(shape[1], int) and shape[1] == 1
        window = int(np.prod([int(k) for k in shape[2:]]))
        positions = self.batch * int(np.prod([int(s) for s in out[1:]]))
        input_positions = self.batch * int(np.prod([int(s) for s in self.dims[source][1:]]))
        inputs, outputs = shape[1], shape[0]
        int8 = self.int8.get(layer.name, self.none)
        floating = ~int8
        self._read_float(source, floating, self._is_held(step.result))

        added, extra, widened, result = self._sum(step, int8)
        if result != step.result:
            self.channels_last.add(result)
        integers = self._written_int8(step.result, int8 & ~added)
        if result != step.result:
            integers = integers | self._written_int8(result, int8 & added & ~widened)

        def each(kind: str, mask: Mask) -> None:
            if not mask.any():
                return
            work = conv_work(kind, positions, window, inputs, outputs, input_positions, self.block)
            read = work.read_bytes + extra
            if kind.endswith("int8"):
                read = read + np.where(integers, 0, 3 * positions * outputs)
            self.emit(layer.name, kind, replace(work, read_bytes=read), mask, True)

        base = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
        aligned = self._mask(aligned_int8(inputs, outputs, depthwise)) if depthwise or not grouped else self.none
        each(f"{base}_int8", int8 & aligned)
        each(f"{base}_plain_int8", int8 & ~aligned)
        if grouped and not depthwise:
            each("conv_plain_fp32", floating)
        else:
            few = self.none if depthwise else self._mask(inputs < self.block)
            each(f"{base}_few_fp32", floating & few)
            each(f"{base}_fp32", floating & ~few)
        self.channels_last.add(step.result)
        self._quantize(step.result, floating & ~added)
        if result != step.result:
            self._quantize(result, added & (floating | widened))

    def _sum(self, step: Step, int8: Mask) -> tuple[Mask, Number, Mask, str]:
        """The sum that a convolution takes in.

        Returns:
            Under which plans it does, the bytes of the summand, under which plans an int8 convolution writes float32
            for it, and the tensor that leaves the sum.
        """
        found = self._sum_behind(step)
        if found is None:
            return self.none, 0, self.none, step.result
        hosts = self.all
        partner_int8 = self.none
        if found.partner is not None:
            partner_int8 = self.int8.get(found.partner.name, self.none)
            first = found.layer.activations[0] == step.result
            hosts = np.where(int8 == partner_int8, first, int8)
        elements = self._elements(found.result)
        held = partner_int8 if found.partner is not None else self._is_held(found.other)
        widened = int8 & ~held
        added = hosts & (int8 | ~(held & (self._in_integers(found.other) if found.partner is None else self.all)))
        rescaled = added & widened
        work = move_work(4 * elements, 4 * elements)
        if found.partner is None:
            self.emit(found.layer.name, "elementwise_fp32", work, rescaled, True)
        for _ in self.graph.consumers.get(found.result, ()):
            self.emit(found.layer.name, "elementwise_fp32", work, rescaled & ~self._is_held(found.result), True)
        self.summed[found.layer.name] = self.summed.get(found.layer.name, self.none) | added
        return added, np.where(added, np.where(int8 & held, 1, 4) * elements, 0), added & widened, found.result

    def _sum_behind(self, step: Step) -> _Sum | None:
        if not step.sole or step.result != step.layer.outputs[0]:
            return None
        layer = self.graph.consumers[step.result][0]
        if layer.op != "Add" or layer.weights or len(set(layer.activations)) != 2:
            return None
        other = next(tensor for tensor in layer.activations if tensor != step.result)
        maker = self.graph.producers.get(other)
        partner = maker if maker is not None and maker.op == "Conv" and is_weight_layer(maker) else None
        if partner is not None and (len(self.graph.consumers[other]) > 1 or other in self.graph.outputs):
            partner = None
        return _Sum(layer, self._results[layer.name], other, partner)

    def _product(self, step: Step) -> None:
        layer = step.layer
        first = self.dims[layer.inputs[0]]
        rows: Number = self.batch
        for size in first[:-1]:
            rows = rows * size
        name = "gemm" if len(first) == 1 else "matmul"
        inputs, outputs = first[-1], self.dims[layer.outputs[0]][-1]
        int8 = self.int8.get(layer.name, self.none) if step.weight else self.none
        for tensor in layer.activations:
            self._read_float(tensor, ~int8, self._is_held(step.result))
        integers = self._written_int8(step.result, int8)
        for kind, mask in ((f"{name}_int8", int8), (f"{name}_fp32", ~int8)):
            if mask.any():
                work = gemm_work(kind, rows, inputs, outputs)
                if kind.endswith("int8"):
                    work = replace(work, written_bytes=np.where(integers, 1, 4) * work.written_bytes)
                self.emit(layer.name, kind, work, mask, True)
        self._quantize(step.result, ~int8)

    def _add(self, step: Step) -> None:
        layer = step.layer
        alone = ~self.summed.get(layer.name, self.none)
        if any(tensor in self.channels_last for tensor in layer.activations):
            self.channels_last.add(step.result)
        int8 = self._all_held(layer)
        elements = self._elements(layer.outputs[0])
        read: Number = 0
        for tensor in layer.activations:
            read = read + np.where(self._in_integers(tensor), 1, 4) * elements
        # It quantizes what it writes by itself.
        integers = alone & self._is_held(step.result)
        written = np.where(integers, 1, 4) * elements
        self.emit(layer.name, "add_int8", move_work(read, written), alone & int8, True)
        self.emit(layer.name, "add_fp32", move_work(read, written), alone & ~int8, True)
        self.integers[step.result] = self._in_integers(step.result) | integers

    def _follower(self, step: Step) -> None:
        """Pooling and concatenation: int8 when all they read is int8."""
        layer = step.layer
        int8 = self._all_held(layer)
        read: Number = 0
        for tensor in layer.activations:
            self._make_channels_last(tensor)
            self._read_float(tensor, ~int8)
            read = read + self._elements(tensor)
        written = self._elements(layer.outputs[0])
        kind = _POOLS.get(layer.op, "concat")
        self.emit(layer.name, f"{kind}_int8", move_work(read, written), int8, True)
        self.emit(layer.name, f"{kind}_fp32", move_work(4 * read, 4 * written), ~int8, True)
        if layer.op == "Concat":
            # The scales of what is joined differ: all but what a convolution can write so is brought to one.
            for tensor in layer.activations:
                maker = self.graph.producers.get(tensor)
                if maker is None or len(self.graph.consumers.get(tensor, ())) > 1:
                    elements = self._elements(tensor)
                    self.emit(layer.name, "add_int8", move_work(elements, elements), int8, True)
            self.emit(layer.name, "add_int8", move_work(written, written), int8, True)
        self.channels_last.add(step.result)
        self.integers[step.result] = self._in_integers(step.result) | int8
        self._quantize(step.result, ~int8)

    def _view(self, step: Step) -> None:
        """Free, but for what takes a channels-last tensor apart."""
        layer, tensors = step.layer, step.layer.activations
        int8 = self._all_held(layer) if tensors else self.none
        for tensor in tensors:
            shape = self.dims[tensor]
            apart = layer.op in ("Flatten", "Reshape") and len(shape) > 1
            if apart and tensor in self.channels_last and int(np.prod([int(s) for s in shape[1:]])) > 1:
                self._reorder(tensor, "reorder_output")
            elif tensor in self.channels_last:
                self.channels_last.add(step.result)
            self._read_float(tensor, ~int8 & self._is_held(tensor) & ~self._is_held(step.result))
        self.integers[step.result] = self._in_integers(step.result) | int8
        self._quantize(step.result, ~int8)

    def _other(self, step: Step) -> None:
        layer = step.layer
        maker = self.graph.producers.get(layer.activations[0]) if layer.activations else None
        if layer.activations and layer.activations[0] in self.channels_last:
            self.channels_last.add(step.result)
        taken_in = (
            layer.op in _UNARY
            and maker is not None
            and is_weight_layer(maker)
            and len(self.graph.consumers[layer.activations[0]]) == 1
        )
        if not taken_in:
            read: Number = 0
            for tensor in layer.activations:
                self._read_float(tensor, self.all)
                read = read + self._elements(tensor)
            kind = "transpose_fp32" if layer.op == "Transpose" else "other_fp32"
            if layer.op in ELEMENTWISE | _UNARY:
                kind = "elementwise_fp32"
            self.emit(layer.name, kind, move_work(4 * read, 4 * self._elements(layer.outputs[0])), self.all, True)
        self._quantize(step.result, self.all)


def _never_negative(graph: ModelGraph) -> set[str]:
    """Tensors whose values start at 0, so that their integers have no zero point."""
    found: set[str] = set()
    for layer in graph.layers:
        keeps = layer.op in MOVERS or layer.op in ("AveragePool", "GlobalAveragePool", "Concat")
        if layer.op in _POSITIVE or (layer.activations and keeps and all(t in found for t in layer.activations)):
            found.update(layer.outputs)
    return found


__all__ = ["OpenvinoLowering"]
