"""How a device is taken to run a plan: a kernel a layer, and one for each change of type at an edge.

Channels are padded to the device's grid; views cost nothing; activations behind a layer are part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autocompress.hardware.kernels import FAMILIES, KINDS, LIGHT, VIEWS, Number, round_up
from autocompress.hardware.profile import Precision
from autocompress.hardware.roofline import WIDTH, Roofline, Variant, variant_of
from autocompress.hardware.skeleton import Record
from autocompress.hardware.steps import Mask, Step
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import LayerPlan, ModelGraph

_POOLS = ("MaxPool", "AveragePool")


class AnalyticLowering:
    """One pass over a graph for a batch of plans; ``run`` fills the attributes, one entry a plan.

    Args:
        columns: the column of each weight layer in ``formats``.
        variants: how layers of each format run.
        dims: the shape of each tensor, an entry being a number or one a plan.
        held: the plans in which each activation is int8 (from ``lowering.quantized_tensors``).
        formats: ``[n, weight layers]`` indices into ``variants``.

    Attributes:
        family_us: ``[families, n]`` summed kernel times.
        kernels: how many kernels run.
        picojoules: of the work.
    """

    def __init__(
        self,
        graph: ModelGraph,
        steps: tuple[Step, ...],
        roofline: Roofline,
        columns: Mapping[str, int],
        variants: Sequence[Variant],
        dims: Mapping[str, tuple[Number, ...]],
        held: Mapping[str, Mask],
        formats: np.ndarray,
        count: int,
        record: Record | None,
    ) -> None:
        self.graph, self.steps, self.columns, self.variants = graph, steps, columns, variants
        self.profile, self.roofline = roofline.profile, roofline
        self.dims, self.held, self.record = dims, held, record
        self.formats = formats
        self.none = np.zeros(count, dtype=bool)
        self.all = ~self.none
        self.family_us = np.zeros((len(FAMILIES), count))
        self.kernels = np.zeros(count)
        self.picojoules = np.zeros(count)
        self.weights_us_per_byte: Number = 0.0

    def run(self) -> None:
        self.weights_us_per_byte = self.roofline.weights_us_per_byte(self._all_weight_bytes())
        for tensor in self.graph.inputs:
            self._quantize(tensor, self.all)
        for step in self.steps:
            op = step.layer.op
            if step.folded or op in VIEWS or not step.layer.outputs:
                continue
            if step.weight or op in ("Conv", "Gemm", "MatMul"):
                self._product(step)
            else:
                self._move(step)

    def _elements(self, tensor: str) -> Number:
        count: Number = self.profile.batch
        for size in self.dims[tensor]:
            count = count * size
        return count

    def _variants_of(self, layer: str) -> list[tuple[Variant, Mask]]:
        """How the layer runs, and under which plans."""
        column = self.columns.get(layer)
        known = self.variants
        if column is None:
            return [(variant_of(self.profile, LayerPlan()), self.all)]
        codes = self.formats[:, column]
        masks: dict[Variant, Mask] = {}
        for code in np.flatnonzero(np.bincount(codes, minlength=len(known))).tolist():
            mask = codes == code
            masks[known[code]] = masks[known[code]] | mask if known[code] in masks else mask
        return list(masks.items())

    def _all_weight_bytes(self) -> Number:
        total = np.zeros(len(self.none))
        table = np.array([variant.weight_bytes for variant in self.variants])
        for layer in self.graph.compressible:
            elements: Number = 1.0
            for size in self.dims[layer.inputs[1]]:
                elements = elements * size
            total = total + elements * table[self.formats[:, self.columns[layer.name]]]
        return total

    def _emit(self, label: str, kind: str, microseconds: Number, mask: Mask) -> None:
        self.family_us[FAMILIES.index(KINDS[kind])] += np.where(mask, microseconds, 0.0)
        self.kernels += mask
        if self.record is not None:
            self.record(label, kind, microseconds, mask, True)

    def _spend(self, precision: Precision, macs: Number, moved: Number, mask: Mask, gain: float = 1.0) -> None:
        energy = self.profile.energy
        if energy is not None:
            widest = max(energy.pj_per_mac.values(), default=0.0)
            per_mac = energy.pj_per_mac.get(precision, widest) / gain
            self.picojoules += np.where(mask, macs * per_mac + moved * energy.pj_per_byte, 0.0)

    # ---------------------------------------------------------------------------------------------- kernels

    def _product(self, step: Step) -> None:
        layer = step.layer
        result, source = self.dims[layer.outputs[0]], layer.inputs[0]
        if layer.op == "Conv":
            weight = self.dims[layer.inputs[1]]
            window = int(np.prod([int(size) for size in weight[2:]]))
            grouped = layer.attributes.get("group", 1) != 1
            rows: Number = self.profile.batch * int(np.prod([int(size) for size in result[1:]]))
            outputs, inner = weight[0], weight[1] * window
            depthwise = grouped and isinstance(weight[1], int) and weight[1] == 1
            name = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
        else:
            depthwise, grouped = False, False
            rows = self._elements(layer.outputs[0]) / result[-1]
            outputs, inner = result[-1], self.dims[source][-1]
            name = "gemm" if layer.op == "Gemm" else "matmul" if step.weight else "attention"
        stored = outputs * inner if step.weight else 0.0
        read: Number = 0
        for tensor in layer.activations:
            read = read + self._elements(tensor)
        written = self._elements(step.result)
        writes_int8 = self.held.get(step.result, self.none)
        for variant, mask in self._variants_of(layer.name):
            if variant.refused:
                self.family_us[0] = np.where(mask, np.inf, self.family_us[0])
                continue
            int8 = variant.precision == "int8"
            kind = f"{name}_{'int8' if int8 else 'fp32'}"
            if variant.precision is None:
                self._read_float(layer.activations, mask)
                macs, moved = rows * outputs * inner, 4.0 * (read + written)
                self._emit(layer.name, kind, self.roofline.host_us(macs, moved, 4.0 * stored), mask)
                self._quantize(step.result, mask)
                continue
            width = WIDTH[variant.precision]
            grid = self.profile.channel_step.get(variant.precision, 1)
            # A grid of channels is one of the rows and columns that the device multiplies at a time.
            padded = rows * round_up(outputs, grid) * (inner if grouped else round_up(inner, grid))
            moved = read * width + written * (np.where(writes_int8, 1.0, 4.0) if int8 else width)
            weights = stored * variant.weight_bytes
            microseconds = self.roofline.kernel_us(
                "depthwise" if depthwise else "gemm" if layer.op != "Conv" else "conv",
                variant.precision, padded, moved, weights, self.weights_us_per_byte, variant.gain,
            )  # fmt: skip
            self._emit(layer.name, kind, microseconds, mask)
            self._spend(variant.precision, padded, moved + weights, mask, variant.gain)
            if not int8:
                self._read_float(layer.activations, mask)
                self._quantize(step.result, mask)

    def _move(self, step: Step) -> None:
        """An operator whose time goes with the bytes it moves: in int8 where all it reads and writes is."""
        layer = step.layer
        int8 = self.held.get(step.result, self.none) if layer.op in FOLLOWERS else self.none
        read: Number = 0
        for tensor in layer.activations:
            int8 = int8 & self.held.get(tensor, self.none)
            read = read + self._elements(tensor)
        written: Number = 0
        for tensor in layer.outputs:
            written = written + self._elements(tensor)
        kinds = {"fp32": "pool_fp32" if layer.op in _POOLS else LIGHT.get(layer.op, "other_fp32")}
        kinds["int8"] = kinds["fp32"].replace("fp32", "int8")
        for wanted, mask in (("int8", int8), ("fp32", ~int8)):
            if not mask.any():
                continue
            precision = self.profile.executed(wanted)
            kind = kinds[wanted] if kinds[wanted] in KINDS else "add_int8"
            moved = (read + written) * (1.0 if wanted == "int8" else 4.0)
            if precision is None and self.profile.host is not None:
                microseconds = self.roofline.host_us(read, moved)
            elif precision is None:
                near = self.roofline.us_per_byte(moved)
                microseconds = self.roofline.launch_us + self.profile.scale_compute * moved * near
            else:
                microseconds = self.roofline.kernel_us("elementwise", precision, read, moved)
            self._emit(layer.name, kind, microseconds, mask)
            self._spend(precision or "fp32", 0.0, moved, mask)
            if wanted == "fp32":
                self._read_float(layer.activations, mask)
                self._quantize(step.result, mask)

    def _read_float(self, tensors: tuple[str, ...], mask: Mask) -> None:
        for tensor in tensors:
            self._convert("dequantize", tensor, mask)

    def _quantize(self, tensor: str, mask: Mask) -> None:
        self._convert("quantize", tensor, mask)

    def _convert(self, kind: str, tensor: str, mask: Mask) -> None:
        """Between float32 and int8, for the plans of a mask that hold the tensor in int8."""
        mask = self.held.get(tensor, self.none) & mask
        if not mask.any():
            return
        elements = self._elements(tensor)
        moved = 5.0 * elements
        precision = self.profile.executed("fp32") or self.profile.executed("int8") or "int8"
        self._emit(tensor, kind, self.roofline.kernel_us("elementwise", precision, elements, moved), mask)
        self._spend(precision, 0.0, moved, mask)
