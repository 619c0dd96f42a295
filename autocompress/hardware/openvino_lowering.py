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
* An elementwise operator of one tensor joins whatever computed it; behind an int8 product it joins the dequantizer.
* Elementwise kernels quantize what they write, or write both.  A layer norm is a normalisation and such a kernel.
* Attention (two products, the softmax between them, the scale, all transpositions
  but the keys') is one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from autocompress.hardware.kernels import LIGHT, VIEWS, Number, Work, conv_work, gemm_work, light_work, move_work
from autocompress.hardware.openvino_patterns import JOINING, Attention, find_attention
from autocompress.hardware.openvino_tensors import OpenvinoTensors
from autocompress.hardware.steps import Mask, Step
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import Layer, is_weight_layer

_POOLS = {"GlobalAveragePool": "global_pool", "AveragePool": "pool", "MaxPool": "pool"}


def conv_kind(base: str, integer: bool, grouped: bool) -> str:
    """The class of a convolution; all channel counts take the same kernels, so no slower path is told apart."""
    return "conv_plain_fp32" if grouped and not integer else f"{base}_int8" if integer else f"{base}_fp32"


def brgemm_work(
    kind: str, positions: Number, window: int, inputs: Number, outputs: Number, input_positions: Number, block: int
) -> Work:
    """``conv_work`` of kernels that pad output channels to whole vectors but take input channels as they come."""
    counted = kind.replace("_fp32", "_few_fp32") if kind in ("conv_fp32", "pointwise_fp32") else kind
    return conv_work(counted, positions, window, inputs, outputs, input_positions, block)


@dataclass(frozen=True)
class _Sum:
    """The addition that a convolution may compute: ``partner`` is the other convolution that may, if there is one."""

    layer: Layer
    result: str
    other: str
    partner: Layer | None


@dataclass
class OpenvinoLowering(OpenvinoTensors):
    """One pass over a graph for a batch of plans; ``run`` emits every kernel."""

    summed: dict[str, Mask] = field(default_factory=dict)
    """Under which plans an addition runs inside a convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attention = find_attention(self.graph)
        self._inside = {name for found in self._attention.values() for name in found.inside}

    def run(self) -> None:
        for tensor in self.graph.inputs:
            self._quantize(tensor, self.all)
        for step in self.steps:
            layer = step.layer
            if step.folded or not layer.outputs or layer.name in self._inside or step.fused == "gate":
                continue
            if layer.op == "Conv" and step.weight:
                self._convolution(step)
            elif layer.name in self._attention:
                self._attend(self._attention[layer.name])
            elif layer.op in ("Gemm", "MatMul"):
                self._product(step)
            elif layer.op == "LayerNormalization":
                self._norm(step)
            elif step.fused == "swish":
                self._swish(step)
            elif layer.op in ("Add", "Mul") and not layer.weights:
                self._add(step)
            elif layer.op in _POOLS or layer.op == "Concat":
                self._follower(step)
            elif layer.op in VIEWS:
                self._view(step)
            else:
                self._other(step)

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
            work = brgemm_work(kind, positions, window, inputs, outputs, input_positions, self.block)
            read = work.read_bytes + extra
            if kind.endswith("int8"):
                read = read + np.where(integers, 0, 3 * positions * outputs)
            self.emit(layer.name, kind, replace(work, read_bytes=read), mask, True)

        base = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
        for integer, mask in ((True, int8), (False, floating)):
            each(conv_kind(base, integer, grouped and not depthwise), mask)
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
        name, rows, inputs, outputs = self._factors(step)
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
            waiting, _ = self._pending.get(tensor, (self.none, False))
            read = read + np.where(self._in_integers(tensor) | waiting, 1, 4) * self._elements(tensor)
        # It quantizes what it writes by itself.
        integers = alone & self._is_held(step.result)
        written = np.where(integers, 1, 4) * elements
        self.emit(layer.name, "add_int8", move_work(read, written), alone & int8, True)
        self.emit(layer.name, "add_fp32", move_work(read, written), alone & ~int8, True)
        self.integers[step.result] = self._in_integers(step.result) | integers
        self._wrote_both(step.result, integers)

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
            self._settle(tensor, self.all)
            self._read_float(tensor, ~int8 & self._is_held(tensor) & ~self._is_held(step.result))
        self.integers[step.result] = self._in_integers(step.result) | int8
        self._quantize(step.result, ~int8)

    def _attend(self, found: Attention) -> None:
        query, key, value = (self._elements(t) for t in (found.query, found.key, found.value))
        for tensor in (found.query, found.key, found.value):
            self._read_float(tensor, self.all)
        scores = self._elements(found.scores)
        depth, width = self.dims[found.query][-1], self.dims[found.value][-1]
        work = Work(
            macs=scores * (depth + width),
            read_bytes=4 * (query + key + value),
            written_bytes=4 * self._elements(found.out),
        )
        self.emit(found.name, "attention_fp32", work, self.all, True)
        self._quantize(found.out, self.all)

    def _norm(self, step: Step) -> None:
        layer, tensor = step.layer, step.result
        self._read_float(layer.activations[0], self.all)
        elements = self._elements(tensor)
        self.emit(layer.name, "norm_fp32", move_work(4 * elements, 4 * elements), self.all, True)
        held = self._is_held(tensor)
        self.emit(layer.name, "elementwise_fp32", move_work(4 * elements, 4 * elements), ~held, True)
        self._quantize(tensor, self.all)
        self._wrote_both(tensor, held)

    def _swish(self, step: Step) -> None:
        """``x * sigmoid(x)``: inside the product before it, but for an int8 depthwise convolution."""
        layer, source = step.layer, step.gated
        maker = self.graph.producers.get(source)
        elements = self._elements(source)
        integers, held = self._in_integers(source), self._is_held(step.result)
        if maker is None or not is_weight_layer(maker):
            self.emit(layer.name, "curve_fp32", move_work(4 * elements, 4 * elements), ~integers, True)
        inside = maker is not None and maker.op == "Conv" and maker.attributes.get("group", 1) == 1
        if not inside:
            self.emit(layer.name, "add_int8", move_work(elements, elements), integers & held, True)
        self.emit(layer.name, "curve_fp32", move_work(elements, 4 * elements), integers & ~held, True)
        if source in self.channels_last:
            self.channels_last.add(step.result)
        self.integers[step.result] = integers & held
        self._wrote_both(step.result, integers & held)
        self._quantize(step.result, ~integers)

    def _other(self, step: Step) -> None:
        layer = step.layer
        maker = self.graph.producers.get(layer.activations[0]) if layer.activations else None
        if layer.activations and layer.activations[0] in self.channels_last:
            self.channels_last.add(step.result)
        int8 = self._all_held(layer) if layer.op in FOLLOWERS else self.none
        kind = "transpose_fp32" if layer.op == "Transpose" else LIGHT.get(layer.op, "other_fp32")
        if kind == "batch_norm_fp32":
            kind = "elementwise_fp32"
        joins = (
            kind in JOINING
            and len(layer.activations) == 1
            and maker is not None
            and (is_weight_layer(maker) or maker.op == "LayerNormalization" or LIGHT.get(maker.op) in JOINING)
            and len(self.graph.consumers[layer.activations[0]]) == 1
        )
        joined = self.none
        if joins:
            joined = self._join(layer.activations[0], step.result, kind, ~int8)
        else:
            read: Number = 0
            for tensor in layer.activations:
                self._read_float(tensor, ~int8)
                read = read + 4 * self._elements(tensor)
            written = 4 * self._elements(layer.outputs[0])
            kind = "curve_fp32" if kind == "gelu_fp32" else kind
            self.emit(layer.name, kind, light_work(kind, read, written), self.all, True)
        self.integers[step.result] = self._in_integers(step.result) | int8
        self._quantize(step.result, ~int8 & ~joined)
