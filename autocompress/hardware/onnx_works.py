"""What the nodes of an executed ONNX file are to a cost model: kernels of a class, with their work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autocompress.hardware.kernels import Work, conv_work, gemm_work, move_work
from autocompress.hardware.onnx_footprint import node_macs
from autocompress.hardware.onnx_half import in_half
from autocompress.hardware.onnx_kernels import ExecutedGraph, ExecutedNode
from autocompress.hardware.reading import describe

OTHER = "other_fp32"
"""The class of whatever operator ``reading.describe`` has no name for."""


@dataclass(frozen=True)
class NodeWork:
    """The class of one kernel (of ``kernels.KINDS``), its work, and whether it really is of that class."""

    name: str
    op: str
    kind: str
    work: Work
    known: bool


def describe_node(executed: ExecutedNode, graph: ExecutedGraph, block: int) -> NodeWork:
    """The class and work of a kernel.

    One of no known class is described by what it does: as a convolution or matrix product where it multiplies, else by
    the bytes it moves.

    Args:
        executed: the node.
        graph: the graph it is of.
        block: channels that the runtime packs together.
    """
    # A weight may be computed at run time, from integers for example: then its shape is as good as a stored one's.
    for shapes in (graph.weights, {**graph.values, **graph.weights}):
        try:
            kind, work = describe(executed.node, dict(executed.arguments), dict(shapes), block)
        except (KeyError, IndexError, ValueError):
            continue
        if kind == OTHER:
            return _stand_in(executed, graph, work)
        return NodeWork(executed.name, executed.node.op_type, kind, work, True)
    read = sum(graph.bytes.get(name, 0.0) for name in executed.node.input)
    written = sum(graph.bytes.get(name, 0.0) for name in executed.node.output)
    return _stand_in(executed, graph, move_work(read, written))


def _stand_in(executed: ExecutedNode, graph: ExecutedGraph, moved: Work) -> NodeWork:
    """What prices an operator of no known class."""
    op, macs = executed.node.op_type, node_macs(executed, graph)
    kind, work = OTHER, moved
    if macs:
        out = executed.outputs[0][2]
        weight = graph.shape(executed.node.input[1]) if "Conv" in op else None
        if weight:
            kind = "conv_plain_fp32"
            window, positions = math.prod(weight[2:]), math.prod(out) // out[1]
            inputs = max(1, macs // (positions * window * out[1]))
            work = conv_work(kind, positions, window, inputs, out[1], positions, 1)
        else:
            kind = "matmul_int8" if any(word in op for word in ("Integer", "Quant", "QLinear")) else "matmul_fp32"
            rows = math.prod(out) // out[-1]
            work = gemm_work(kind, rows, macs // (rows * out[-1]), out[-1])
    return NodeWork(executed.name, op, kind, work, False)


def for_another_device(graph: ExecutedGraph, *, half: bool) -> tuple[ExecutedGraph, list[NodeWork]]:
    """A graph executed here as another device executes it: its own multiply-accumulates, on no grid of this machine's.

    Args:
        graph: executed without this machine's layouts.
        half: the file is of float16, which the device computes in.

    Returns:
        The graph, without conversions that only this machine needs, and the work of each of its nodes.
    """
    types = graph.types
    if half:
        graph = in_half(graph)
    works = []
    for executed in graph.nodes:
        found = describe_node(executed, graph, 1)
        work = replace(found.work, macs=node_macs(executed, graph) or found.work.macs)
        # What this machine packs and what it does not is no concern of another's.
        kind = found.kind.replace("_plain", "").replace("_few", "")
        if half and kind.endswith("fp32"):
            kind = kind.removesuffix("fp32") + "fp16"
            if types.get(executed.node.output[0]) == "float":
                work = _narrowed(work)
        works.append(replace(found, kind=kind, work=work))
    return graph, works


def _narrowed(work: Work) -> Work:
    return replace(
        work,
        read_bytes=work.read_bytes / 2,
        written_bytes=work.written_bytes / 2,
        weight_bytes=work.weight_bytes / 2,
    )
