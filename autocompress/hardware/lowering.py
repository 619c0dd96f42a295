"""How ONNX Runtime turns a plan into kernels on a CPU, worked out for many plans at once.

Every quantity is an array with one entry a plan, and a kernel that runs under some plans only is emitted with a mask.
What lies between kernels is in :mod:`autocompress.hardware.layouts`.  The rules were read off the runtime's optimized
graphs:

* Float32 convolutions run on channels packed in blocks (NCHWc).  One with fewer input channels than a block reads
  plain NCHW; one whose input channels are no multiple of 4 runs unpacked altogether.  Whatever else reads a packed
  tensor (a pooling of a channel count off the block, a quantizer) needs it reordered first, once a tensor.
* An Add whose inputs are all packed is computed inside one of the convolutions before it, and so is a Relu behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from autocompress.export.weights import gathered_channels
from autocompress.hardware.kernels import (
    LIGHT,
    VIEWS,
    Number,
    Work,
    aligned_int8,
    conv_work,
    few_bits_work,
    gemm_work,
    layout_work,
    light_work,
    move_work,
    pool_work,
)  # fmt: skip
from autocompress.hardware.layouts import Layouts
from autocompress.hardware.steps import Mask, Step, lifted_tensors
from autocompress.methods.quantization import FOLLOWERS, FUSED_ACTIVATIONS
from autocompress.plan import Compute, Layer, LayerPlan

_FOLLOWER_KINDS = {
    "Concat": ("concat_fp32", "concat_int8"), "MaxPool": ("pool_fp32", "pool_int8"),
    "AveragePool": ("pool_fp32", "pool_int8"), "GlobalAveragePool": ("global_pool_fp32", "global_pool_int8"),
    "Transpose": ("transpose_fp32", "transpose_int8"), "Mul": ("elementwise_fp32", "mul_int8"),
    "Sigmoid": ("curve_fp32", "curve_int8"), "LeakyRelu": ("elementwise_fp32", "curve_int8"),
    "Slice": ("concat_fp32", "concat_int8"), "Split": ("concat_fp32", "concat_int8"),
}  # fmt: skip
CHANNEL_STEP = 4
"""Input channels that are no multiple of this keep a float32 convolution out of the packed layout."""


class Product(NamedTuple):
    """Plans under which a product computes in a type that only products have, with weights of some bits."""

    compute: Compute
    bits: int
    mask: Mask


def products_of(
    names: Sequence[str], known: Sequence[LayerPlan], formats: np.ndarray
) -> dict[str, tuple[Product, ...]]:
    """The layers that compute in dynamic int8 or from few-bit weights.

    Args:
        names: the layers, by column.
        known: the formats.
        formats: ``[plans, layers]`` indices into ``known``.
    """
    found: dict[str, tuple[Product, ...]] = {}
    for code, plan in enumerate(known):
        if plan.compute in ("int8_dynamic", "weight_only"):
            for column, name in enumerate(names):
                mask = formats[:, column] == code
                if mask.any():
                    found[name] = (*found.get(name, ()), Product(plan.compute, plan.storage.bits, mask))
    return found


@dataclass
class Lowering(Layouts):
    """One pass over a graph for a batch of plans; ``run`` emits every kernel."""

    products: Mapping[str, Sequence[Product]] = field(default_factory=dict)
    quantized: dict[str, Mask] = field(default_factory=dict)
    convolutions: dict[str, list[tuple[str, Mask]]] = field(default_factory=dict)
    absorbed: dict[str, Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.held = lifted_tensors(self.graph, self.held)

    def run(self) -> None:
        for tensor in self.graph.inputs:
            self._quantize(tensor, self.all)
        for step in self.steps:
            op = step.layer.op
            if step.folded and step.layer.inputs[0] not in self.absorbed:
                continue
            if op == "Conv" and step.weight:
                self._convolution(step)
            elif op in ("Gemm", "MatMul") and step.weight:
                self._product(step)
            elif op == "MatMul":
                self._attention(step)
            elif op == "BatchNormalization":
                self._standalone_norm(step)
            elif op in FUSED_ACTIVATIONS and not step.folded and step.layer.inputs[0] in self.absorbed:
                self._activation_behind_add(step)
            elif op == "Add" and not step.layer.weights:
                self._add(step)
            elif step.folded:
                self._activation_behind_add(step)
            elif step.fused in ("gate", "swish"):
                self._swish(step)
            elif op in _FOLLOWER_KINDS and op in FOLLOWERS:
                self._follower(step)
            else:
                self._other(step)
        self._conversions()

    def _convolution(self, step: Step) -> None:
        layer = step.layer
        source, weight = layer.inputs[0], layer.inputs[1]
        shape, out = self.dims[weight], self.dims[layer.outputs[0]]
        groups = layer.attributes.get("group", 1)
        grouped = groups != 1
        depthwise = grouped and isinstance(shape[1], int) and shape[1] == 1
        window = int(np.prod([int(k) for k in shape[2:]]))
        positions = self.batch * int(np.prod([int(s) for s in out[1:]]))
        input_positions = self.batch * int(np.prod([int(s) for s in self.dims[source][1:]]))
        inputs, outputs = shape[1], shape[0]
        computes_int8 = self.int8.get(layer.name, self.none)
        replaced = computes_int8 & self._is_held(step.result)
        unreplaced = computes_int8 & ~replaced
        # The exporter gives an integer convolution a whole word of input channels to gather.
        words = gathered_channels(inputs, window) if isinstance(inputs, int) and not grouped else inputs

        def each(kind: str, mask: Mask) -> None:
            if mask.any():
                read = words if kind.endswith("int8") else inputs
                work = conv_work(kind, positions, window, read, outputs, input_positions, self.block)
                self.emit(layer.name, kind, work, mask, True)
                self.convolutions.setdefault(layer.name, []).append((kind, mask))

        # int8: NHWC in and out.
        aligned = self._mask(aligned_int8(words, outputs, depthwise)) if depthwise or not grouped else self.none
        if isinstance(inputs, int) and words != inputs and replaced.any():
            widened = light_work("concat_int8", input_positions * inputs, input_positions * words)
            self.emit(source, "concat_int8", widened, replaced, True)
        base = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
        each(f"{base}_int8", replaced & aligned)
        each(f"{base}_plain_int8", replaced & ~aligned)
        self._read_int8(source, replaced, self.all)
        self._mark(self.channels_last, step.result, replaced)

        # float32: packed where the channel counts allow it.
        floating = ~computes_int8
        if self.block == 0 or len(shape) != 4 or (grouped and not depthwise):
            few, plain = self.none, self.all
        elif depthwise:
            few, plain = self.none, self._mask(outputs % CHANNEL_STEP != 0)
        else:
            few = self._mask(inputs < self.block)
            plain = ~few & self._mask(inputs % CHANNEL_STEP != 0)
        packed = floating & ~few & ~plain
        each("depthwise_plain_fp32" if depthwise else "conv_plain_fp32", (floating & plain) | unreplaced)
        each(f"{base}_few_fp32", floating & few)
        each(f"{base}_fp32", packed)
        self._read_float(source, floating | unreplaced, packed)
        if unreplaced.any():
            elements = window * inputs * outputs
            self.emit(layer.name, "dequantize", move_work(elements, 4 * elements), unreplaced, True)
        self._mark(self.packed, step.result, floating & ~plain)
        self._quantize(step.result, floating)

    def _product(self, step: Step) -> None:
        layer = step.layer
        name, rows, inputs, outputs = self._factors(step)
        computes_int8 = self.int8.get(layer.name, self.none) if step.weight else self.none
        others = self._other_products(layer, rows, inputs, outputs)
        for kind, mask in ((f"{name}_int8", computes_int8), (f"{name}_fp32", ~computes_int8 & ~others)):
            if mask.any():
                self.emit(layer.name, kind, gemm_work(kind, rows, inputs, outputs), mask, True)
        if step.result != layer.outputs[0]:
            # Only a quantizer takes in the activation behind a matrix product, and a Gemm of floats does.
            elements = self._elements(step.result)
            alone = ~(computes_int8 & self._is_held(step.result)) if layer.op == "MatMul" else others
            self.emit(layer.name, "elementwise_fp32", move_work(4 * elements, 4 * elements), alone, True)
        self._read_int8(layer.inputs[0], computes_int8, self.none)
        for tensor in layer.activations:
            self._read_float(tensor, ~computes_int8)
        self._quantize(step.result, ~computes_int8)

    def _other_products(self, layer: Layer, rows: Number, inputs: Number, outputs: Number) -> Mask:
        """Products in dynamic int8 and from few-bit weights; returns the plans that have one here.

        A tensor that several layers quantize while they run is quantized once, by a kernel of its own.
        """
        done, source = self.none, layer.inputs[0]
        dynamic = {
            reader.name: self._mask_of("int8_dynamic", reader.name) for reader in self.graph.consumers.get(source, ())
        }
        for product in self.products.get(layer.name, ()):
            done = done | product.mask
            if product.compute == "weight_only":
                work = few_bits_work(rows, inputs, outputs, product.bits)
                self.emit(layer.name, "matmul_nbits", work, product.mask, True)
                continue
            together = self.none
            for name, mask in dynamic.items():
                together = together | (mask & product.mask if name != layer.name else self.none)
            first = together & ~self.quantized.get(source, self.none)
            self._mark(self.quantized, source, together)
            elements = self._elements(source)
            self.emit(layer.name, "quantize_dynamic", move_work(4 * elements, elements), first, True)
            for kind, mask in (("matmul_int8", together), ("matmul_dynamic_int8", product.mask & ~together)):
                self.emit(layer.name, kind, gemm_work(kind, rows, inputs, outputs), mask, True)
        return done

    def _mask_of(self, compute: Compute, layer: str) -> Mask:
        found = self.none
        for product in self.products.get(layer, ()):
            found = found | product.mask if product.compute == compute else found
        return found

    def _add(self, step: Step) -> None:
        layer = step.layer
        inputs = tuple(dict.fromkeys(layer.activations))
        int8, all_packed, last = self.all, self.all, self.none
        for tensor in inputs:
            held = self._is_held(tensor)
            int8 = int8 & held
            all_packed = all_packed & self.packed.get(tensor, self.none) & ~held
            last = last | self.channels_last.get(tensor, self.none)
        int8 = int8 & self._is_held(step.result)
        elements = self._elements(layer.outputs[0])
        reads = len(inputs)
        self.emit(layer.name, "add_int8", move_work(reads * elements, elements), int8, True)
        for tensor in inputs:
            self._read_int8(tensor, int8, last)
        self._mark(self.channels_last, step.result, int8 & last)

        host = next((t for t in inputs if self._hosts_add(t)), None)
        fused = unpacked_fused = self.none
        if host is not None:
            residual = move_work(4 * self._packed_elements(layer.outputs[0]), 0)
            for kind, mask in self.convolutions[self.graph.producers[host].name]:
                if kind == "conv_plain_fp32" and step.result != layer.outputs[0]:
                    joins = mask & ~int8 & ~self._is_held(host)
                    unpacked_fused = unpacked_fused | joins
                elif kind.endswith("fp32"):
                    joins = mask & all_packed & ~int8
                else:
                    continue
                fused = fused | joins
                self.emit(layer.name, kind, residual, joins, False)
        alone = ~int8 & ~fused
        packed_alone = alone & all_packed
        leads_to_int8 = self._is_held(step.result) & self._feeds_int8_convolution(step.result)
        self.emit(layer.name, "add_fp32", move_work(4 * reads * elements, 4 * elements), alone, True)
        for tensor in inputs:
            if tensor != host:
                self._read_float(tensor, unpacked_fused)
            detour = alone & leads_to_int8 & self.channels_last.get(tensor, self.none) & self._is_held(tensor)
            self._detour(tensor, detour)
            self._read_float(tensor, alone & ~detour, packed_alone)
        for tensor in {layer.outputs[0], step.result}:
            self._mark(self.packed, tensor, all_packed & ~int8)
        if step.result == layer.outputs[0]:
            self._quantize(step.result, ~int8)
        else:
            self.absorbed[layer.outputs[0]] = int8 | fused

    def _feeds_int8_convolution(self, tensor: str) -> Mask:
        found = self.none
        for reader in self.graph.consumers.get(tensor, ()):
            if reader.op == "Conv" and reader.name in self.int8:
                found = found | self.int8[reader.name]
        return found

    def _detour(self, tensor: str, mask: Mask) -> None:
        """Between two channels-last stretches the runtime moves a transposition into float32 and quantizes again."""
        if not mask.any():
            return
        elements = self._elements(tensor)
        for _ in range(2):
            self.emit(tensor, "dequantize", move_work(elements, 4 * elements), mask, True)
        self.emit(tensor, "transpose_fp32", layout_work(elements, self._positions(tensor), 4), mask, True)
        self.emit(tensor, "quantize", move_work(4 * elements, elements), mask, True)

    def _hosts_add(self, tensor: str) -> bool:
        """Whether the tensor comes straight from a convolution that nothing else reads."""
        producer = self.graph.producers.get(tensor)
        if producer is None or producer.op != "Conv" or producer.name not in self.convolutions:
            return False
        return len(self.graph.consumers.get(tensor, ())) == 1 and tensor not in self.graph.outputs

    def _activation_behind_add(self, step: Step) -> None:
        """A Relu behind an Add is a kernel of its own unless the Add runs inside another kernel or in int8."""
        layer = step.layer
        absorbed = self.absorbed[layer.inputs[0]]
        elements = self._elements(layer.inputs[0])
        self.emit(layer.name, "elementwise_fp32", move_work(4 * elements, 4 * elements), ~absorbed, True)
        int8 = self._is_held(layer.outputs[0]) & absorbed & ~self.packed.get(layer.outputs[0], self.none)
        self._quantize(layer.outputs[0], ~int8)

    def _follower(self, step: Step) -> None:
        """Pooling, concatenation and transposition: int8 when all they read is int8."""
        layer = step.layer
        inputs = layer.activations
        # Pools of a window reorder what they read by themselves; the others stay packed only where all inputs are.
        packs = layer.op in ("MaxPool", "AveragePool") and self.block > 0
        int8, all_packed, last = self.all, self.all, self.all if layer.op == "Concat" else self.none
        for tensor in inputs:
            held = self._is_held(tensor)
            int8 = int8 & held
            channels_last = self.channels_last.get(tensor, self.none)
            last = last & channels_last if layer.op == "Concat" else last | channels_last
            if not packs:
                all_packed = all_packed & self.packed.get(tensor, self.none) & ~held
            if self.block and layer.op not in ("Sigmoid", "Mul", "LeakyRelu"):
                all_packed = all_packed & self._mask(self.dims[tensor][0] % self.block == 0)
        int8 = int8 & self._is_held(step.result)
        kind_float, kind_int8 = _FOLLOWER_KINDS[layer.op]
        broadcast = layer.op != "Concat" and len({self.graph.tensors[t].shape for t in inputs}) > 1
        if layer.op in ("Transpose", "Slice", "Split") or broadcast:
            all_packed = self.none
        if layer.op == "Transpose":
            last = self.none
        read: Number = 0
        for tensor in inputs:
            read = read + self._elements(tensor)
        written: Number = 0
        for tensor in layer.outputs:
            written = written + self._elements(tensor)
        if layer.op in ("MaxPool", "AveragePool"):
            self._pool(step, int8, last, all_packed)
        else:
            self.emit(layer.name, kind_int8, light_work(kind_int8, read, written), int8, True)
            if step.fused != "gone":
                self.emit(layer.name, kind_float, light_work(kind_float, 4 * read, 4 * written), ~int8, True)
        floating = ~int8
        for tensor in inputs:
            self._read_int8(tensor, int8, last)
            self._read_float(tensor, floating, floating & all_packed)
        self._mark(self.channels_last, step.result, int8 & last)
        self._mark(self.packed, step.result, floating & all_packed)
        self._quantize(step.result, floating)

    def _swish(self, step: Step) -> None:
        """``x * sigmoid(x)``: one float kernel, whatever x and the product are held in."""
        if step.fused == "gate":
            return
        source, layer = step.gated, step.layer
        elements, held = self._elements(source), self._is_held(source)
        packed = self.packed.get(source, self.none) & ~held
        for mask, count in ((packed, self._packed_elements(source)), (~packed, elements)):
            self.emit(layer.name, "curve_fp32", light_work("curve_fp32", 4 * count, 4 * count), mask, True)
        if held.any():
            self.emit(source, "dequantize", move_work(elements, 4 * elements), held, True)
        last = held & self.channels_last.get(source, self.none)
        self._mark(self.channels_last, step.result, last & self._is_held(step.result))
        self._mark(self.to_plain, source, last & ~self._is_held(step.result))
        self._mark(self.packed, step.result, packed)
        self._quantize(step.result, self.all)

    def _pool(self, step: Step, int8: Mask, last: Mask, packed: Mask) -> None:
        layer = step.layer
        sizes = layer.attributes.get("kernel_shape")
        window = int(np.prod(sizes)) if isinstance(sizes, tuple) else 1
        read, written = self._elements(layer.inputs[0]), self._elements(layer.outputs[0])
        average = layer.op == "AveragePool"
        for kind, mask in (
            ("average_pool_int8", int8 if average else self.none),
            ("pool_int8", self.none if average else int8 & last),
            ("pool_plain_int8", self.none if average else int8 & ~last),
            ("pool_fp32", ~int8 & packed), ("pool_plain_fp32", ~int8 & ~packed),
        ):  # fmt: skip
            self.emit(layer.name, kind, pool_work(kind, read, written, window), mask, True)

    def _attention(self, step: Step) -> None:
        """A product of two activations; it always runs in float32."""
        layer = step.layer
        written, inputs = self._elements(layer.outputs[0]), self.dims[layer.inputs[0]][-1]
        read: Number = 0
        for tensor in layer.activations:
            read = read + self._elements(tensor)
            self._read_float(tensor, self.all)
        work = Work(macs=written * inputs, read_bytes=4 * read, written_bytes=4 * written)
        self.emit(layer.name, "attention_fp32", work, self.all, True)
        self._quantize(step.result, self.all)

    def _standalone_norm(self, step: Step) -> None:
        """A batch norm behind no convolution: on a packed tensor it runs as a depthwise one, its Relu included."""
        layer = step.layer
        source, out = layer.inputs[0], layer.outputs[0]
        packed = self.packed.get(source, self.none) & ~self._is_held(source)
        positions = self._positions(source)
        as_convolution = conv_work("depthwise_fp32", positions, 1, 1, self.dims[source][0], positions, self.block)
        self.emit(layer.name, "depthwise_fp32", as_convolution, packed, True)
        elements = self._elements(source)
        self.emit(layer.name, "batch_norm_fp32", move_work(4 * elements, 4 * elements), ~packed, True)
        self._read_float(source, self.all, packed)
        self._mark(self.packed, out, packed)
        readers = self.graph.consumers.get(out, ())
        if len(readers) == 1 and readers[0].op in FUSED_ACTIVATIONS:
            self.absorbed[out] = packed
            self._mark(self.packed, readers[0].outputs[0], packed)
        else:
            self._quantize(out, self.all)

    def _other(self, step: Step) -> None:
        layer = step.layer
        if not layer.outputs:
            return
        out = layer.outputs[0]
        int8 = self.none
        if layer.op in VIEWS or step.fused == "part":
            int8 = self._is_held(out)
            for tensor in layer.activations:
                int8 = int8 & self._is_held(tensor)
            self.emit(layer.name, "view", Work(), self.all, True)
        elif step.fused != "gone":
            kind = LIGHT.get(layer.op, "other_fp32")
            read: Number = 0
            for tensor in layer.activations:
                read = read + self._bytes(tensor)
            written: Number = 0
            for tensor in layer.outputs if step.fused != "split" else layer.activations[:1]:
                written = written + self._bytes(tensor)
            # From int8 to int8 a HardSigmoid is a change of scale.
            shifted = self._is_held(layer.inputs[0]) if layer.op == "HardSigmoid" else self.none
            self._mark(self.channels_last, out, shifted & self.channels_last.get(layer.inputs[0], self.none))
            self.emit(layer.name, kind, light_work(kind, read, written), ~shifted, True)
        for tensor in layer.activations if step.fused != "part" else ():
            self._read_int8(tensor, int8, self.none)
            self._read_float(tensor, ~int8)
        self._quantize(step.result, ~int8)

    def _bytes(self, tensor: str) -> Number:
        """Of the tensor outside int8; those of shapes are small integers."""
        return self._elements(tensor) * (8 if self.graph.tensors[tensor].dtype == "int64" else 4)
