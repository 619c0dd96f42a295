"""Reads kernels and their times out of a profiled OpenVINO session, in the classes of ``kernels.KINDS``.

OpenVINO keeps one mean a kernel, cut to whole microseconds, over all runs of a session.  The first runs and those that
other work disturbed are taken out again: the former by what the counters stood at after them, the latter by the wall
times of the runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from autocompress.hardware.kernels import Work, gemm_work, move_work
from autocompress.hardware.openvino_lowering import brgemm_work, conv_kind
from autocompress.hardware.reading import TimedKernel
from autocompress.runtime.openvino import INTEGERS, OpenvinoSession, RuntimeInput, RuntimeNode, matrix_weights

_WARM_UP = 20
_CUT_US = 0.5
"""What cutting to whole microseconds takes away on average."""

_LEAST_US = 0.2
_WIDTHS = {"u8": 1, "i8": 1, "boolean": 1, "f16": 2, "bf16": 2, "f32": 4, "i32": 4, "i64": 8}
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_NORMS = {"MVN": "norm_fp32", "RMSNorm": "norm_fp32", "Softmax": "softmax_fp32", "LogSoftmax": "softmax_fp32"}
_CURVES = frozenset({"Sigmoid", "Swish", "Gelu", "Erf", "Tanh", "Exp", "HSwish", "HSigmoid", "Elu", "Mish", "SoftPlus"})
_MOVES = {"Pooling": "pool", "Reduce": "global_pool", "Concatenation": "concat"}


@dataclass(frozen=True)
class _Counters:
    runs: int
    means: Mapping[str, float]


class OpenvinoProfile:
    """A session that counts the time of its kernels; ``finish`` reads them."""

    def __init__(self, model: bytes, feed: dict[str, np.ndarray], threads: int) -> None:
        batch = next(iter(feed.values())).shape[0]
        self._session = OpenvinoSession(model, threads, batch, profiling=True)
        self._feed = feed
        for _ in range(_WARM_UP):
            self._session.run(feed)
        self._start = _Counters(_WARM_UP, self._session.microseconds())
        self._walls: list[float] = []

    def run(self) -> None:
        begin = time.perf_counter()
        self._session.run(self._feed)
        self._walls.append(time.perf_counter() - begin)

    def finish(self, block: int) -> list[TimedKernel]:
        """Ends profiling; times are means of the undisturbed runs."""
        runs, walls = len(self._walls), np.sort(self._walls)
        if not runs:
            return []
        # Disturbances fall on all kernels alike: the quieter third says how much faster they are without.
        quiet = float(walls[: max(1, runs // 3)].mean() / walls.mean())
        means = self._session.microseconds()
        found = []
        for node in self._session.nodes():
            described = describe(node, block)
            if described is None:
                continue
            before, after = self._start.means.get(node.name, 0.0), means.get(node.name, 0.0)
            # Both are means since the session was opened, so their weighted difference is the mean in between.
            total = (after + _CUT_US) * (self._start.runs + runs) - (before + _CUT_US) * self._start.runs
            found.append(TimedKernel(*described, max(_LEAST_US, quiet * total / runs)))
        return found


def describe(node: RuntimeNode, block: int) -> tuple[str, Work] | None:
    """The class and work of a kernel; None where the runtime only looks at the same memory in another way."""
    activations = [given for given in node.inputs if not given.constant]
    read = sum(_WIDTHS.get(given.dtype, 4) * _count(given.shape) for given in activations)
    written = _WIDTHS.get(node.written, 4) * _count(node.shape)
    kind = "int8" if node.precision in INTEGERS else "fp32"
    if node.op in _VIEWS or not activations:
        return None
    if node.op == "Convolution" and node.inputs[1].constant:
        return _convolution(node, block, read, written)
    if node.op in ("FullyConnected", "MatMul"):
        first = node.inputs[0].shape
        name = f"gemm_{kind}" if len(first) == 2 else f"matmul_{kind}"
        if not node.inputs[1].constant:
            # Both factors are activations: what is read is no weight, and comes from the cache.
            return "attention_fp32", Work(macs=_count(node.shape) * first[-1], read_bytes=read, written_bytes=written)
        work = gemm_work(name, _count(first[:-1]), first[-1], node.shape[-1])
        return name, replace(work, read_bytes=read, written_bytes=written)
    weights = matrix_weights(node)
    if weights:
        works = [gemm_work(f"gemm_{kind}", _count(activations[0].shape[:-1]), w[1], w[0]) for w in weights]
        total = Work(macs=sum(w.macs for w in works), weight_bytes=sum(w.weight_bytes for w in works))
        return f"gemm_{kind}", replace(total, read_bytes=read, written_bytes=written)
    if _attends(node, activations):
        scores = _count(activations[0].shape) * activations[1].shape[-1]
        return "attention_fp32", Work(macs=2 * scores, read_bytes=read, written_bytes=written)
    if node.op in _NORMS:
        return _NORMS[node.op], move_work(read, written)
    if node.op == "Reorder" and node.precision == node.written:
        if _in_place(node):
            return None
        if kind == "int8":
            return "transpose_int8", move_work(read, written)
        return ("reorder_input" if _channels_last(node) else "reorder_output"), move_work(read, written)
    if node.op == "Transpose":
        return f"transpose_{kind}", move_work(read, written)
    if node.op in _MOVES:
        return f"{_MOVES[node.op]}_{kind}", move_work(read, written)
    if node.op not in ("Reorder", "Convert") and node.computes & _CURVES:
        integers = kind == "int8" and node.written in INTEGERS
        return ("curve_int8" if integers else "curve_fp32"), move_work(read, written)
    if len(activations) > 1:
        integers = all(given.dtype in INTEGERS for given in activations) and node.written in INTEGERS
        return ("add_int8" if integers else "add_fp32"), move_work(read, written)
    if node.written in INTEGERS:
        # From integers to integers of another scale counts as what it computes: a sum with nothing added.
        return ("add_int8" if kind == "int8" else "quantize"), move_work(read, written)
    if kind == "int8":
        return "dequantize", move_work(read, written)
    return ("elementwise_fp32" if node.op in ("Eltwise", "Subgraph") else "other_fp32"), move_work(read, written)


def _convolution(node: RuntimeNode, block: int, read: int, written: int) -> tuple[str, Work]:
    data, weight = node.inputs[0].shape, node.inputs[1].shape
    # Grouped weights have the groups in front; a tensor of as many axes as the data has none.
    groups = weight[0] if len(weight) > len(data) else 1
    shape = weight[1:] if len(weight) > len(data) else weight
    depthwise = groups > 1 and shape[0] == shape[1] == 1
    outputs, inputs, window = groups * shape[0], shape[1], _count(shape[2:])
    base = "depthwise" if depthwise else "pointwise" if window == 1 else "conv"
    kind = conv_kind(base, node.integer, groups > 1 and not depthwise)
    positions, input_positions = data[0] * _count(node.shape[2:]), data[0] * _count(data[2:])
    work = brgemm_work(kind, positions, window, inputs, outputs, input_positions, block)
    # A sum that runs inside reads its other operand too.  Integers written as float32 cost more bandwidth but no more
    # arithmetic, so the wider bytes count as bandwidth and not as results.
    extra = read - _WIDTHS.get(node.inputs[0].dtype, 4) * _count(data)
    wider = max(0, written - (1 if node.integer else 4) * _count(node.shape))
    return kind, replace(work, read_bytes=work.read_bytes + extra + wider)


def packed_block(threads: int = 1) -> int:
    """Floats in one vector of the convolutions of this machine."""
    weight = numpy_helper.from_array(np.ones((16, 16, 3, 3), dtype=np.float32), "w")
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 6, 6])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "block", [image], [result], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    nodes = OpenvinoSession(made.SerializeToString(), threads, 1).nodes()
    primitive = next(node.primitive for node in nodes if node.op == "Convolution")
    return 16 if "avx512" in primitive else 8 if "avx2" in primitive else 4


def _attends(node: RuntimeNode, activations: list[RuntimeInput]) -> bool:
    """Queries, keys with their last two axes exchanged, and values, in one kernel."""
    if node.op != "Subgraph" or len(activations) < 3 or any(len(given.shape) != 4 for given in activations[:3]):
        return False
    query, key, value = (given.shape for given in activations[:3])
    return query == value and sorted(query) == sorted(key) and query[3] == key[2]


def _in_place(node: RuntimeNode) -> bool:
    """One channel, or one position: both layouts are the same memory."""
    shape = node.shape
    return len(shape) < 3 or shape[1] == 1 or _count(shape[2:]) == 1


def _channels_last(node: RuntimeNode) -> bool:
    return node.layout.startswith("ac")


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) if shape else 1
