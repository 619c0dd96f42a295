"""A float16 file as a device that computes in float16 executes it.

The runtime here has no float16 kernels: it converts to float32 and back.  For a device that has them those conversions
are taken out of what was executed, and the numbers between them are as wide as the file says.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from autocompress.hardware.onnx_kernels import WIDTHS, ExecutedGraph, ExecutedNode

_HALF, _SINGLE = "float16", "float"


def is_half(model: onnx.ModelProto) -> bool:
    """Whether most of a model's stored floating-point numbers are float16."""
    counts = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in counts:
            counts[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
    return counts[onnx.TensorProto.FLOAT16] > counts[onnx.TensorProto.FLOAT]


def in_half(graph: ExecutedGraph) -> ExecutedGraph:
    """The graph without conversions between float16 and float32, its float32 tensors half as wide."""
    same: dict[str, str] = {}
    nodes = []
    for executed in graph.nodes:
        node = executed.node
        source = same.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Cast" and _only_widens(executed):
            same[node.output[0]] = source
            continue
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        renamed.input[:] = [same.get(name, name) for name in node.input]
        nodes.append(ExecutedNode(executed.name, renamed, executed.arguments))
    half = {name: shape for name, shape in graph.values.items() if graph.types[name] in (_HALF, _SINGLE)}
    narrow = {name: WIDTHS[_HALF] * float(np.prod(shape, dtype=np.int64)) for name, shape in half.items()}
    types = {**graph.types, **dict.fromkeys(half, _HALF)}
    outputs = tuple(same.get(name, name) for name in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs, bytes={**graph.bytes, **narrow}, types=types)


def _only_widens(executed: ExecutedNode) -> bool:
    """Whether a Cast only changes the width of floating-point numbers."""
    read = executed.arguments["input_type_shape"]
    types = {kind for entry in read for kind in entry} | {kind for _, kind, _ in executed.outputs}
    return bool(read) and types <= {_HALF, _SINGLE}
