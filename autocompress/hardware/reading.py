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

from autocompress.hardware.kernels import Work, aligned_int8, conv_work, gemm_work, move_work

_PACKED_DOMAIN = "com.microsoft.nchwc"
_ELEMENTWISE = frozenset({"Relu", "Clip", "Mul", "Sub", "Div", "LeakyRelu"})
_VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape"})
_MOVES = {
    "QuantizeLinear": "quantize", "DequantizeLinear": "dequantize", "ReorderInput": "reorder_input",
    "ReorderOutput": "reorder_output", "QLinearGlobalAveragePool": "global_pool_int8",
    "GlobalAveragePool": "global_pool_fp32", "QLinearAveragePool": "pool_int8", "AveragePool": "pool_fp32",
    "NhwcMaxPool": "pool_int8", "QLinearConcat": "concat_int8", "Concat": "concat_fp32",
}  # fmt: skip
_PRODUCTS = {
    "Gemm": "gemm_fp32", "FusedGemm": "gemm_fp32", "QGemm": "gemm_int8", "MatMul": "matmul_fp32",
    "FusedMatMul": "matmul_fp32", "QLinearMatMul": "matmul_int8", "MatMulIntegerToFloat": "matmul_int8",
}  # fmt: skip
_WIDTHS = {"float": 4, "uint8": 1, "int8": 1, "int32": 4, "int64": 8, "float16": 2, "bool": 1}


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
    read = sum(_WIDTHS.get(kind, 4) * _count(shape) for kind, shape in inputs[: 2 if op == "Add" else 1])
    written = _WIDTHS.get(kind_out, 4) * _count(out)
    if op in ("Conv", "FusedConv", "QLinearConv"):
        return _convolution(node, first, out, weights, block)
    if op in _PRODUCTS:
        kind = _PRODUCTS[op]
        return kind, gemm_work(kind, _count(first[:-1]), first[-1], out[-1])
    if op == "Add":
        return "add_fp32", move_work(read, written)
    if op == "QLinearAdd":
        return "add_int8", move_work(2 * read, written)
    if op == "Transpose":
        return ("transpose_int8" if kind_in in ("uint8", "int8") else "transpose_fp32"), move_work(read, written)
    if op == "MaxPool":
        return ("pool_plain_int8" if kind_in == "uint8" else "pool_fp32"), move_work(read, written)
    if op in ("Concat", "QLinearConcat"):
        return _MOVES[op], move_work(written, written)
    if op in _MOVES:
        return _MOVES[op], move_work(read, written)
    if op in _VIEWS:
        return "view", Work()
    return ("elementwise_fp32" if op in _ELEMENTWISE else "other_fp32"), move_work(read, written)


def _convolution(
    node: onnx.NodeProto, first: tuple[int, ...], out: tuple[int, ...], weights: dict[str, tuple[int, ...]], block: int
) -> tuple[str, Work]:
    int8 = node.op_type == "QLinearConv"
    shape = weights[node.input[3 if int8 else 1]]
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
