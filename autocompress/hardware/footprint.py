"""What plans occupy: bytes stored, bytes of activations alive at once, multiply-accumulates; for many plans at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autocompress.export.storage import BLOB_BYTES, CAST_BYTES, best_in_planes, field_bits, packed_bytes
from autocompress.hardware.kernels import VIEWS, Number
from autocompress.hardware.steps import Mask, Step
from autocompress.methods.formats import is_integer
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import LayerPlan, ModelGraph

Dims = Mapping[str, tuple[Number, ...]]

_NODES_OF = {"int8_dynamic": 130, "weight_only": 110}
"""Bytes of the nodes that stand for a product in these types, beyond those of a float one."""

_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


def stored_bytes(
    graph: ModelGraph,
    dims: Dims,
    formats: np.ndarray,
    columns: Mapping[str, int],
    known: Sequence[LayerPlan],
) -> np.ndarray:
    """Bytes of all stored numbers in their formats, with the float32 scales of integers and what unpacks them.

    Planes are counted as the exporter lays them: one blob of them where all layers together save more than it costs.

    Args:
        graph: the model.
        dims: the shape of each tensor under each plan.
        formats: ``[n, weight layers]`` indices into ``known``.
        columns: the column of each weight layer.
        known: the formats.
    """
    rows = np.arange(len(formats))
    total, saved = np.zeros(len(formats)), np.zeros(len(formats))
    seen: set[str] = set()
    for layer in graph.layers:
        for position, name in enumerate(layer.inputs):
            if name not in layer.weights or name in seen:
                continue
            seen.add(name)
            count = _product(dims[name])
            if position == 1 and layer.name in columns:
                codes = formats[:, columns[layer.name]]
                outputs = dims[name][0 if layer.op == "Conv" or layer.attributes.get("transB") else -1]
                options = np.zeros((2, len(known), len(formats)))
                for code, plan in enumerate(known):
                    options[0, code], options[1, code] = _weight_bytes(plan, count, outputs)
                total += options[0, codes, rows]
                saved += options[1, codes, rows]
            else:
                total += count * _BYTES.get(graph.tensors[name].dtype, 4)
    return total - np.where(saved > BLOB_BYTES, saved - BLOB_BYTES, 0.0)


def _weight_bytes(plan: LayerPlan, count: Number, outputs: Number) -> tuple[Number, Number]:
    """Bytes of one layer's weights in ONNX's own types, and how many fewer they are as planes."""
    storage = plan.storage
    around = _NODES_OF.get(plan.compute, 0)
    if not is_integer(storage):
        return count * storage.bits / 8, 0.0
    if storage.granularity == "block":
        blocks = np.ceil(count / outputs / (storage.block or 1))
        return outputs * blocks * ((storage.block or 1) * storage.bits / 8 + 4.0) + around, 0.0
    counts, channels = np.asarray(count), np.asarray(outputs)
    fields = packed_bytes(storage, counts, channels, planes=False)
    fewer = fields - packed_bytes(storage, counts, channels, planes=True) if best_in_planes(storage) else 0.0
    # What is behind one Cast is counted among ``size_counts``.
    cast = CAST_BYTES if field_bits(storage) == storage.bits < 8 else 0
    return fields - cast + 4.0 * channels + around, np.maximum(fewer, 0.0)


def size_counts(formats: np.ndarray, known: Sequence[LayerPlan], held: Mapping[str, Mask]) -> np.ndarray:
    """``[n, 5]``: what the rest of a file depends on, in the order of ``calibration.SIZE_COUNTS``."""
    int8 = np.array([plan.compute == "int8" for plan in known])[formats]
    unscaled = np.array([is_integer(plan.storage) and plan.compute == "fp32" for plan in known])[formats]
    cast = np.array([plan.storage.bits in (2, 4, 16) and plan.compute != "weight_only" for plan in known])[formats]
    tensors = np.zeros(len(formats))
    for mask in held.values():
        tensors += mask
    columns = [np.ones(len(formats)), int8.sum(axis=1), tensors, unscaled.sum(axis=1), cast.sum(axis=1)]
    return np.stack([column.astype(float) for column in columns], axis=1)


def multiply_accumulates(graph: ModelGraph, dims: Dims, count: int) -> np.ndarray:
    """Multiply-accumulates of one sample under each plan."""
    total = np.zeros(count)
    for layer in graph.layers:
        if layer.op == "Conv":
            total += _product(dims[layer.outputs[0]]) * _product(dims[layer.inputs[1]][1:])
        elif layer.op in ("Gemm", "MatMul"):
            total += _product(dims[layer.outputs[0]]) * dims[layer.inputs[0]][-1]
    return np.rint(total).astype(np.int64)


class ActivationMemory:
    """The most bytes of activations that are alive at once, operators that only reshape sharing their input's.

    Where a float kernel meets a tensor held in int8, both forms of it are alive while the kernel runs.
    """

    def __init__(self, graph: ModelGraph, steps: Sequence[Step]) -> None:
        self._graph = graph
        views: dict[str, str] = {}
        made: list[tuple[Step, str, list[str]]] = []
        for step in steps:
            layer = step.layer
            if not layer.outputs or step.folded:
                continue
            reads = [views.get(t, t) for t in layer.activations]
            if layer.op in VIEWS and reads:
                views[step.result] = reads[0]
                made.append((step, "", reads))
            else:
                made.append((step, step.result, reads))
        last = {tensor: position for position, (_, _, reads) in enumerate(made) for tensor in reads}
        kept = {views.get(t, t) for t in graph.outputs}
        self._plan = [
            (step, result, reads, tuple(dict.fromkeys(t for t in reads if last[t] == position and t not in kept)))
            for position, (step, result, reads) in enumerate(made)
        ]

    def peak_bytes(
        self, dims: Dims, held: Mapping[str, Mask], int8: Mapping[str, Mask], count: int, batch: int
    ) -> np.ndarray:
        """Bytes under each plan; a tensor held in int8 takes one an element.

        Args:
            dims: the shape of each tensor under each plan.
            held: the plans under which a tensor is held in int8.
            int8: the plans under which a weight layer computes in int8.
            count: plans.
            batch: samples of one run.
        """

        def elements(tensor: str) -> Number:
            return batch * _product(dims[tensor])

        def size_of(tensor: str) -> Number:
            width = _BYTES.get(self._graph.tensors[tensor].dtype, 4)
            return elements(tensor) * (np.where(held[tensor], 1, width) if tensor in held else width)

        none = np.zeros(count, dtype=bool)
        sizes: dict[str, Number] = {t: size_of(t) for t in self._graph.inputs}
        live = np.zeros(count, dtype=np.int64) + sum(sizes.values())
        peak = live.copy()
        for step, result, reads, dead in self._plan:
            if result:
                in_float = ~_in_int8(step, held, int8, none)
                both = sum(4 * elements(t) * (held[t] & in_float) for t in {result, *reads} if t in held)
                sizes[result] = size_of(result)
                live = live + sizes[result]
                np.maximum(peak, live + both, out=peak)
            for tensor in dead:
                live = live - sizes.get(tensor, 0)
        return peak


def _in_int8(step: Step, held: Mapping[str, Mask], int8: Mapping[str, Mask], none: Mask) -> Mask:
    """The plans under which a layer reads and writes integers."""
    if step.weight:
        return int8.get(step.layer.name, none)
    if step.layer.op not in FOLLOWERS:
        return none
    found = held.get(step.result, none)
    for tensor in step.layer.activations:
        found = found & held.get(tensor, none)
    return found


def _product(sizes: Sequence[Number]) -> Number:
    count: Number = 1
    for size in sizes:
        count = count * size
    return count
