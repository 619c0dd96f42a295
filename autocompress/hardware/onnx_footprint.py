"""What an ONNX file occupies and computes: bytes on disk, bytes of activations alive at once, multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

from autocompress.errors import UsageError
from autocompress.hardware.kernels import VIEWS
from autocompress.hardware.onnx_kernels import ExecutedGraph, ExecutedNode

_SHARES_BUFFER = VIEWS - {"Shape"}
"""Operators whose output is their first input under another shape."""

_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATRIX_PRODUCTS = frozenset(
    {"MatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulNBits"}
)
_GEMMS = frozenset({"Gemm", "FusedGemm", "QGemm"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_UNCOUNTED = frozenset(
    {
        "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "DeformConv", "QMoE", "MoE",
        "LinearAttention", "DecoderMaskedMultiHeadAttention", "SparseAttention", "PackedAttention",
    }
)  # fmt: skip


def artifact_bytes(path: Path, model: onnx.ModelProto) -> int:
    """Bytes of the file and of every file beside it that it keeps numbers in.

    Raises:
        UsageError: one of those is missing.
    """
    beside: dict[str, None] = {}
    for tensor in _stored(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            beside.update((entry.value, None) for entry in tensor.external_data if entry.key == "location")
    total = path.stat().st_size
    for location in beside:
        part = path.parent / location
        if not part.is_file():
            raise UsageError(f"{str(path)!r} keeps numbers in {str(part)!r}, which is not there")
        total += part.stat().st_size
    return total


def peak_activation_bytes(graph: ExecutedGraph) -> int:
    """The most bytes of activations alive at once, executed in the runtime's order.

    A kernel's outputs are there before its inputs may go; an operator that only reshapes shares its input's buffer.
    The model's inputs and outputs count, weights and what a kernel needs inside do not.
    """
    shared: dict[str, str] = {}
    steps: list[tuple[list[str], list[str]]] = []
    for executed in graph.nodes:
        reads = [shared.get(t, t) for t in executed.node.input if t in graph.bytes]
        writes = [name for name, _, _ in executed.outputs]
        if executed.node.op_type in _SHARES_BUFFER and reads and writes:
            shared[writes[0]] = reads[0]
            writes = writes[1:]
        steps.append((reads, writes))
    last = {tensor: position for position, (reads, writes) in enumerate(steps) for tensor in (*writes, *reads)}
    kept = {shared.get(t, t) for t in graph.outputs}
    live: dict[str, float] = {t: graph.bytes[t] for t in graph.inputs}
    peak = sum(live.values())
    for position, (reads, writes) in enumerate(steps):
        live.update((t, graph.bytes[t]) for t in writes)
        peak = max(peak, sum(live.values()))
        for tensor in (*reads, *writes):
            if last[tensor] == position and tensor not in kept:
                live.pop(tensor, None)
    return math.ceil(peak)


def multiply_accumulates(graph: ExecutedGraph) -> tuple[int, list[str]]:
    """Multiply-accumulates of one run, and the operators that multiply but are not counted.

    Args:
        graph: the file executed as written: in an optimized one, channels are padded.
    """
    total = 0
    uncounted = []
    for executed in graph.nodes:
        op = executed.node.op_type
        if op in _UNCOUNTED:
            uncounted.append(op)
        else:
            total += node_macs(executed, graph)
    return total, uncounted


def node_macs(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    """Multiply-accumulates of one operator; 0 for one that multiplies nothing or is not counted."""
    return _macs_of(executed.node.op_type)(executed, graph)


def _macs_of(op: str) -> Callable[[ExecutedNode, ExecutedGraph], int]:
    if op in _CONVOLUTIONS:
        return _convolution
    if op == "ConvTranspose":
        return _transposed_convolution
    if op in _GEMMS:
        return _gemm
    if op in _MATRIX_PRODUCTS:
        return _product
    return _recurrent if op in _RECURRENT else _none


def _convolution(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    weight = graph.shape(executed.node.input[_CONVOLUTIONS[executed.node.op_type]]) or ()
    return _written(executed) * math.prod(weight[1:])


def _transposed_convolution(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    weight = graph.shape(executed.node.input[1]) or ()
    return math.prod(_input(executed, graph)) * math.prod(weight[1:])


def _gemm(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    rows, columns = executed.outputs[0][2]
    return math.prod(_input(executed, graph)) * columns if rows else 0


def _product(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    return _written(executed) * _input(executed, graph)[-1]


def _recurrent(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    steps, batch, _ = _input(executed, graph)
    weights = sum(math.prod(graph.shape(name) or (0,)) for name in executed.node.input[1:3])
    return steps * batch * weights


def _none(executed: ExecutedNode, graph: ExecutedGraph) -> int:
    return 0


def _written(executed: ExecutedNode) -> int:
    return math.prod(executed.outputs[0][2])


def _input(executed: ExecutedNode, graph: ExecutedGraph) -> tuple[int, ...]:
    return graph.shape(executed.node.input[0]) or ()


def _stored(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
        else:
            for attribute in nodes.pop().attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    graphs.append(attribute.g)
