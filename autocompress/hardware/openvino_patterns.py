"""Groups of layers that OpenVINO runs as one kernel, found in a graph whatever the plan."""

from __future__ import annotations

from dataclasses import dataclass

from autocompress.hardware.kernels import LIGHT
from autocompress.methods.quantization import MOVERS
from autocompress.plan import Layer, ModelGraph

_POSITIVE = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax"})

JOINING = frozenset({"elementwise_fp32", "add_fp32", "curve_fp32", "gelu_fp32", "batch_norm_fp32"})
"""Classes of elementwise operators."""


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
        return len(layer.activations) == 1 and (moves or LIGHT.get(layer.op) in JOINING)

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


def never_negative(graph: ModelGraph) -> set[str]:
    """Tensors whose values start at 0, so that their integers have no zero point."""
    found: set[str] = set()
    for layer in graph.layers:
        keeps = layer.op in MOVERS or layer.op in ("AveragePool", "GlobalAveragePool", "Concat")
        if layer.op in _POSITIVE or (layer.activations and keeps and all(t in found for t in layer.activations)):
            found.update(layer.outputs)
    return found
