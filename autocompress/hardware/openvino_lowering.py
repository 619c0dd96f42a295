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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from autocompress.hardware.kernels import (
    LIGHT,
    VIEWS,
    Number,
    Work,
    conv_work,
    gemm_work,
    light_work,
    move_work,
)  # fmt: skip
from autocompress.hardware.lowering import Emit, Mask, Step
from autocompress.methods.quantization import FOLLOWERS, MOVERS
from autocompress.plan import Layer, ModelGraph, is_weight_layer

_POSITIVE = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax"})

_JOINING = frozenset({"elementwise_fp32", "add_fp32", "curve_fp32", "batch_norm_fp32"})
"""Classes of elementwise operators."""

_POOLS = {"GlobalAveragePool": "global_pool", "AveragePool": "pool", "MaxPool": "pool"}


def conv_kind(base: str, integer: bool, grouped: bool) -> str:
    """The class of a convolution: all channel counts take the same kernels, so there is no slower path to tell apart."""
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
        self._pending: dict[str, tuple[Mask, bool]] = {}
        self._from_zero = _never_negative(self.graph)
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
        self._settle(tensor, mask)
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

    def _settle(self, tensor: str, mask: Mask) -> None:
        """Elementwise operators behind an int8 product wait for a reader, which may take them in; this one does not."""
        waiting, curve = self._pending.get(tensor, (self.none, False))
        new = waiting & mask
        if new.any():
            elements = self._elements(tensor)
            kind = "curve_fp32" if curve else "dequantize"
            self.emit(tensor, kind, move_work(elements, 4 * elements), new, True)
            self._pending[tensor] = (waiting & ~new, curve)

    def _wrote_both(self, tensor: str, mask: Mask) -> None:
        """An elementwise kernel wrote the tensor for int8 and float readers alike."""
        for per_channel in (False, True):
            self._dequantized[tensor, per_channel] = self._dequantized.get((tensor, per_channel), self.none) | mask

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
            macs=scores * (depth + width), read_bytes=4 * (query + key + value), written_bytes=4 * self._elements(found.out)
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
        """``x * sigmoid(x)``: inside a float product, a kernel of its own behind an int8 one."""
        layer = step.layer
        source = next(t for t in layer.activations if self.graph.producers[t].op != "Sigmoid")
        maker = self.graph.producers.get(source)
        elements = self._elements(source)
        integers, held = self._in_integers(source), self._is_held(step.result)
        if maker is None or not is_weight_layer(maker):
            self.emit(layer.name, "curve_fp32", move_work(4 * elements, 4 * elements), ~integers, True)
        self.emit(layer.name, "curve_int8", move_work(elements, elements), integers & held, True)
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
            kind in _JOINING
            and len(layer.activations) == 1
            and maker is not None
            and (is_weight_layer(maker) or maker.op == "LayerNormalization" or LIGHT.get(maker.op) in _JOINING)
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
            self.emit(layer.name, kind, light_work(kind, read, written), self.all, True)
        self.integers[step.result] = self._in_integers(step.result) | int8
        self._quantize(step.result, ~int8 & ~joined)

    def _join(self, source: str, result: str, kind: str, mask: Mask) -> Mask:
        """An elementwise operator behind integers joins their dequantizer, and the quantizer behind if there is one."""
        waiting, curve = self._pending.pop(source, (self.none, False))
        curve = curve or kind.startswith("curve")
        joined = mask & (waiting | self._in_integers(source))
        held = joined & self._is_held(result)
        if held.any():
            elements = self._elements(result)
            self.emit(result, "curve_int8" if curve else "add_int8", move_work(elements, elements), held, True)
            self.integers[result] = self._in_integers(result) | held
            self._wrote_both(result, held)
        self._pending[result] = (joined & ~held, curve)
        return joined


@dataclass(frozen=True)
class Attention:
    """Layers that run as one kernel, under the name of the second product; tensors are those it reads and writes."""

    name: str
    query: str
    key: str
    value: str
    scores: str
    out: str
    inside: tuple[str, ...]


def find_attention(graph: ModelGraph) -> dict[str, Attention]:
    """By the name of its second product, each attention of a graph."""
    inside: list[str] = []

    def joins(layer: Layer) -> bool:
        order = layer.attributes.get("perm")
        moves = layer.op == "Transpose" and isinstance(order, tuple) and order[-1] == len(order) - 1
        return len(layer.activations) == 1 and (moves or LIGHT.get(layer.op) in _JOINING)

    def back(tensor: str) -> str:
        maker = graph.producers.get(tensor)
        while maker is not None and joins(maker) and len(graph.consumers[tensor]) == 1:
            inside.append(maker.name)
            tensor = maker.activations[0]
            maker = graph.producers.get(tensor)
        return tensor

    found = {}
    for layer in graph.layers:
        readers = graph.consumers.get(layer.outputs[0], ()) if layer.outputs else ()
        if layer.op != "Softmax" or len(readers) != 1 or len(readers[0].activations) != 2:
            continue
        inside = [layer.name]
        first, second = graph.producers.get(back(layer.activations[0])), readers[0]
        if first is None or {first.op, second.op} != {"MatMul"} or len(first.activations) != 2:
            continue
        inside.append(first.name)
        out = second.outputs[0]
        behind = graph.consumers.get(out, ())
        if len(behind) == 1 and out not in graph.outputs and behind[0].op == "Transpose":
            inside.append(behind[0].name)
            out = behind[0].outputs[0]
        found[second.name] = Attention(
            second.name, back(first.inputs[0]), first.inputs[1], back(second.inputs[1]), first.outputs[0], out,
            tuple(inside),
        )  # fmt: skip
    return found


def _never_negative(graph: ModelGraph) -> set[str]:
    """Tensors whose values start at 0, so that their integers have no zero point."""
    found: set[str] = set()
    for layer in graph.layers:
        keeps = layer.op in MOVERS or layer.op in ("AveragePool", "GlobalAveragePool", "Concat")
        if layer.op in _POSITIVE or (layer.activations and keeps and all(t in found for t in layer.activations)):
            found.update(layer.outputs)
    return found


__all__ = ["Attention", "OpenvinoLowering", "find_attention"]
