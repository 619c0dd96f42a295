"""Reads kernels and their times out of a profiled ONNX Runtime session."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from autocompress.hardware.kernels import (
    LIGHT,
    VIEWS,
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

_PACKED_DOMAIN = "com.microsoft.nchwc"
_MOVES = {
    "QuantizeLinear": "quantize", "DynamicQuantizeLinear": "quantize_dynamic", "DequantizeLinear": "dequantize",
    "ReorderInput": "reorder_input", "ReorderOutput": "reorder_output",
    "QLinearGlobalAveragePool": "global_pool_int8", "QLinearSigmoid": "curve_int8", "QLinearLeakyRelu": "curve_int8",
    "QLinearSoftmax": "softmax_fp32",
}  # fmt: skip
"""Kernels that come into being when the graph is optimized, with one input beside constants."""

_LAYOUTS = ((0, 2, 3, 1), (0, 3, 1, 2))
_POOLS = {"QLinearAveragePool": "average_pool_int8", "AveragePool": "pool_plain_fp32", "NhwcMaxPool": "pool_int8"}
_PRODUCTS = {
    "Gemm": "gemm_fp32", "FusedGemm": "gemm_fp32", "QGemm": "gemm_int8", "MatMul": "matmul_fp32",
    "FusedMatMul": "matmul_fp32", "QLinearMatMul": "matmul_int8", "MatMulIntegerToFloat": "matmul_int8",
    "DynamicQuantizeMatMul": "matmul_dynamic_int8", "MatMulInteger": "matmul_dynamic_int8",
}  # fmt: skip
_WEIGHT_PLACE = {"QGemm": 3, "QLinearMatMul": 3}
_WIDTHS = {"float": 4, "uint8": 1, "int8": 1, "int32": 4, "int64": 8, "float16": 2, "bool": 1, "double": 8}


@dataclass(frozen=True)
class TimedKernel:
    """One node of the optimized graph with what it does and the time it took, the timing of it included."""

    kind: str
    work: Work
    microseconds: float


class ProfiledSession:
    """A session that records its kernels; ``finish`` reads them."""

    def __init__(self, model: bytes, feed: dict[str, np.ndarray], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="autocompress-")
        folder = Path(self._folder.name)
        self._optimized = folder / "optimized.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(self._optimized)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.log_severity_level = 3  # it warns that the optimized graph is for this machine only, which is the point
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._feed = feed

    def run(self) -> None:
        self._session.run(None, self._feed)

    def finish(self, block: int) -> list[TimedKernel]:
        """Ends profiling; times are means over the undisturbed half of the runs."""
        try:
            events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
            return timed_kernels(onnx.load(self._optimized), events, block)
        finally:
            self._folder.cleanup()


def timed_kernels(optimized: onnx.ModelProto, events: Sequence[dict[str, Any]], block: int) -> list[TimedKernel]:
    """Joins the runtime's profile with its optimized graph.

    The profile gives times and shapes, the graph weights and attributes.  Nodes without a name are called
    ``<op>_<index>`` in the profile; they are matched in order of execution.
    """
    runs = _runs(events)
    if not runs:
        return []
    durations: dict[str, list[float]] = defaultdict(list)
    for kernels in runs:
        for name, duration, _ in kernels:
            durations[name].append(duration)
    named = {node.name: node for node in optimized.graph.node if node.name}
    unnamed: dict[str, deque[onnx.NodeProto]] = defaultdict(deque)
    for node in optimized.graph.node:
        if not node.name:
            unnamed[node.op_type].append(node)
    weights = {i.name: tuple(i.dims) for i in optimized.graph.initializer}
    found = []
    for name, _, arguments in runs[0]:
        waiting = unnamed.get(str(arguments["op_name"]))
        matched = named.get(name) or (waiting.popleft() if waiting else None)
        if matched is None:
            continue
        kind, work = describe(matched, arguments, weights, block)
        found.append(TimedKernel(kind, work, float(np.mean(durations[name]))))
    return found


def _runs(events: Sequence[dict[str, Any]]) -> list[list[tuple[str, float, dict[str, Any]]]]:
    """The kernels of each run, the slower half of the runs and the first left out."""
    runs: list[tuple[float, list[tuple[str, float, dict[str, Any]]]]] = []
    current: list[tuple[str, float, dict[str, Any]]] = []
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            current.append((name.removesuffix("_kernel_time"), float(event["dur"]), event["args"]))
        elif name == "model_run":
            runs.append((float(event["dur"]), current))
            current = []
    kept = sorted(runs[1:], key=lambda r: r[0])[: max(1, len(runs) // 3)]
    return [kernels for _, kernels in kept]


def describe(
    node: onnx.NodeProto, arguments: dict[str, Any], weights: dict[str, tuple[int, ...]], block: int
) -> tuple[str, Work]:
    """The class and work of an optimized node, from its shapes in the profile and its weights in the graph."""
    inputs = [_shape(entry) for entry in arguments["input_type_shape"]]
    outputs = [_shape(entry) for entry in arguments["output_type_shape"]]
    op = node.op_type
    (kind_in, first), (kind_out, out) = inputs[0] if inputs else ("float", ()), outputs[0] if outputs else ("float", ())
    activations = [pair for name, pair in zip(filter(None, node.input), inputs, strict=False) if name not in weights]
    read = sum(_WIDTHS.get(kind, 4) * _count(shape) for kind, shape in activations[: 1 if op in _MOVES else None])
    written = sum(_WIDTHS.get(kind, 4) * _count(shape) for kind, shape in outputs)
    if op in ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"):
        return _convolution(node, first, out, weights, block)
    if op in _PRODUCTS:
        return _product(node, first, out, read, written, weights)
    if op == "MatMulNBits":
        return _product_of_few_bits(node, first, out)
    if op in ("QLinearAdd", "QLinearMul"):
        kind = "add_int8" if op == "QLinearAdd" else "mul_int8"
        return kind, move_work(sum(_count(shape) for _, shape in inputs[:4:3]), written)
    if op == "Transpose":
        return _transposition(node, kind_in, first, read, written)
    if op == "MaxPool" or op in _POOLS:
        sizes = _attribute(node, "kernel_shape")
        plain = "pool_plain_int8" if kind_in == "uint8" else "pool_plain_fp32"
        kind = "pool_fp32" if node.domain == _PACKED_DOMAIN else _POOLS.get(op, plain)
        return kind, pool_work(kind, _count(first), _count(out), _count(sizes.ints) if sizes else 1)
    if op in _MOVES:
        return _MOVES[op], move_work(read, written)
    if op in VIEWS:
        return "view", Work()
    if op == "QLinearConcat" or (op in LIGHT and kind_out in ("uint8", "int8")):
        return "concat_int8", light_work("concat_int8", read, written)
    kind = LIGHT.get(op, "other_fp32")
    return kind, light_work(kind, read, written)


def _transposition(
    node: onnx.NodeProto, dtype: str, shape: tuple[int, ...], read: int, written: int
) -> tuple[str, Work]:
    kind = "transpose_int8" if dtype in ("uint8", "int8") else "transpose_fp32"
    order = _attribute(node, "perm")
    if len(shape) != 4 or order is None or tuple(order.ints) not in _LAYOUTS:
        return kind, move_work(read, written)
    channels = shape[1] if tuple(order.ints) == _LAYOUTS[0] else shape[3]
    return kind, layout_work(_count(shape), _count(shape) // max(channels, 1), 1 if kind.endswith("int8") else 4)


def _product(
    node: onnx.NodeProto, first: tuple[int, ...], out: tuple[int, ...], read: int, written: int,
    weights: dict[str, tuple[int, ...]],
) -> tuple[str, Work]:  # fmt: skip
    kind = _PRODUCTS[node.op_type]
    flipped = _attribute(node, "transA")
    inputs = first[-2] if flipped is not None and flipped.i and len(first) > 1 else first[-1]
    rows = _count(first) // max(inputs, 1)
    if node.input[_WEIGHT_PLACE.get(node.op_type, 1)] in weights:
        return kind, gemm_work(kind, rows, inputs, out[-1])
    # Both factors are activations: what is read is no weight, and comes from the cache.
    return ("attention_fp32" if kind.endswith("fp32") else kind), Work(
        macs=_count(out) * inputs, read_bytes=read, written_bytes=written
    )


def _product_of_few_bits(node: onnx.NodeProto, first: tuple[int, ...], out: tuple[int, ...]) -> tuple[str, Work]:
    level, bits = _attribute(node, "accuracy_level"), _attribute(node, "bits")
    kind = "matmul_nbits" if level is not None and level.i == 4 else "matmul_nbits_slow"
    return kind, few_bits_work(_count(first[:-1]), first[-1], out[-1], bits.i if bits is not None else 4)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _convolution(
    node: onnx.NodeProto, first: tuple[int, ...], out: tuple[int, ...], weights: dict[str, tuple[int, ...]], block: int
) -> tuple[str, Work]:
    int8 = node.op_type in ("QLinearConv", "ConvInteger")
    shape = weights[node.input[3 if node.op_type == "QLinearConv" else 1]]
    attributes = {a.name: a for a in node.attribute}
    groups = attributes["group"].i if "group" in attributes else 1
    channels_last = "channels_last" in attributes and bool(attributes["channels_last"].i)
    space_in, space_out = (first[1:-1], out[1:-1]) if channels_last else (first[2:], out[2:])
    window = _count(shape[2:])
    depthwise = groups > 1 and shape[1] == 1
    packed = node.domain == _PACKED_DOMAIN
    base = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
    if int8:
        aligned = bool(aligned_int8(shape[1], shape[0], depthwise)) and (depthwise or groups == 1)
        kind = f"{base}_int8" if aligned else f"{base}_plain_int8"
        if node.op_type == "ConvInteger":
            kind = "conv_dynamic_int8"
    elif not packed:
        kind = "depthwise_plain_fp32" if depthwise else "conv_plain_fp32"
    else:
        # Weights of packed convolutions are stored padded to the block, but for inputs fewer than that.
        kind = f"{base}_few_fp32" if not depthwise and shape[1] < block else f"{base}_fp32"
    positions, input_positions = first[0] * _count(space_out), first[0] * _count(space_in)
    work = conv_work(kind, positions, window, shape[1], shape[0], input_positions, block)
    if packed and len(node.input) > 3 and node.input[3]:
        work = replace(work, read_bytes=work.read_bytes + 4 * _count(out))
    return kind, work


def packed_block(optimized: onnx.ModelProto) -> int:
    """Channels per block of a packed graph whose convolution has 4 output channels; 0 where nothing is packed."""
    weights = {i.name: tuple(i.dims) for i in optimized.graph.initializer}
    for node in optimized.graph.node:
        if node.op_type == "Conv" and node.domain == _PACKED_DOMAIN:
            return int(weights[node.input[1]][0])
    return 0


def _shape(entry: dict[str, list[int]]) -> tuple[str, tuple[int, ...]]:
    kind, shape = next(iter(entry.items()))
    return kind, tuple(shape)


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) if shape else 1
