"""What of a graph's lowering holds for every plan: which layers join, and which tensors int8 layers hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autocompress.methods.quantization import FOLLOWERS, FUSED_ACTIVATIONS, fused_output, smooth_gates
from autocompress.plan import Layer, ModelGraph, is_weight_layer

Mask = np.ndarray
"""One truth value a plan."""

_LIFTED_OVER = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that the runtime moves a quantizer before."""


@dataclass(frozen=True)
class Step:
    """What of a layer does not depend on the plan."""

    layer: Layer
    result: str
    """The tensor that leaves the layer once the activation behind it is folded in."""
    weight: bool
    folded: bool
    """An activation that belongs to the layer before it."""
    sole: bool
    """Whether ``result`` is read once and is no output of the model."""
    fused: str = ""
    """What the float graph's optimizer makes of it: see ``_float_fusions``."""
    gated: str = ""
    """Of a product ``x * sigmoid(x)``: x."""


def make_steps(graph: ModelGraph) -> tuple[Step, ...]:
    """Prepares a graph's layers for lowering."""
    steps: list[Step] = []
    folded: set[str] = set()
    for layer in graph.layers:
        fusing = is_weight_layer(layer) or layer.op in FOLLOWERS
        result = fused_output(graph, layer) if fusing else (layer.outputs[0] if layer.outputs else "")
        if layer.outputs and result != layer.outputs[0]:
            folded.add(result)
        sole = len(graph.consumers.get(result, ())) == 1 and result not in graph.outputs
        is_folded = layer.op in FUSED_ACTIVATIONS and layer.outputs[0] in folded
        steps.append(Step(layer, result, is_weight_layer(layer), is_folded, sole))
    fusions = _float_fusions(graph)
    gated = {product: graph.by_name[gate].inputs[0] for gate, product in smooth_gates(graph).items()}
    return tuple(
        replace(step, fused=fusions.get(step.layer.name, ""), gated=gated.get(step.layer.name, "")) for step in steps
    )


def _float_fusions(graph: ModelGraph) -> dict[str, str]:
    """Layers that the optimizer joins with others where they run in float32.

    ``gone``: runs inside a neighbour (the scale or the last transposition before a product of two activations, the
    bias before a Gelu, a Sigmoid behind a convolution); ``gate`` and ``swish``: ``x * sigmoid(x)``; ``split`` and
    ``part``: Gathers of one tensor.
    """
    found: dict[str, str] = {}

    def sole_reader(layer: Layer) -> Layer | None:
        readers = graph.consumers.get(layer.outputs[0], ()) if layer.outputs else ()
        return readers[0] if len(readers) == 1 and layer.outputs[0] not in graph.outputs else None

    smooth = smooth_gates(graph)
    gathered: dict[str, list[str]] = {}
    for layer in graph.layers:
        reader = sole_reader(layer)
        if layer.op == "Gather" and layer.activations and len(layer.inputs) > 1 and layer.inputs[1] in layer.weights:
            gathered.setdefault(layer.activations[0], []).append(layer.name)
        if reader is None:
            continue
        constant = len(layer.activations) == 1
        producer = graph.producers.get(layer.activations[0]) if layer.activations else None
        after_convolution = (
            producer is not None and producer.op == "Conv" and len(graph.consumers[layer.activations[0]]) == 1
        )
        if layer.op in ("Sigmoid", "LeakyRelu") and after_convolution:
            found[layer.name] = "gone"
        elif layer.name in smooth:
            found[layer.name], found[smooth[layer.name]] = "gate", "swish"
        elif layer.op == "Add" and constant and reader.op == "Gelu":
            found[layer.name] = "gone"
        elif reader.op == "MatMul" and not is_weight_layer(reader):
            scales = layer.op in ("Mul", "Div") and constant
            order = layer.attributes.get("perm")
            last = isinstance(order, tuple) and len(order) > 2 and order == (
                *range(len(order) - 2), len(order) - 1, len(order) - 2,
            )  # fmt: skip
            if scales or (layer.op == "Transpose" and last):
                found[layer.name] = "gone"
    for names in gathered.values():
        if len(names) > 1:
            found[names[0]] = "split"
            found.update(dict.fromkeys(names[1:], "part"))
    return found


def quantized_tensors(
    graph: ModelGraph, steps: tuple[Step, ...], int8: Mapping[str, Mask], count: int
) -> dict[str, Mask]:
    """``methods.quantization.activation_formats`` for many plans: under which of them each tensor is held in int8."""
    held: dict[str, Mask] = {}
    outputs = set(graph.outputs)

    def hold(tensor: str, mask: Mask) -> None:
        if tensor not in outputs:
            held[tensor] = held[tensor] | mask if tensor in held else mask

    for step in steps:
        if step.weight and step.layer.name in int8:
            mask = int8[step.layer.name]
            for tensor in step.layer.activations:
                hold(tensor, mask)
            hold(step.result, mask)
    none = np.zeros(count, dtype=bool)
    for step in steps:
        activations = step.layer.activations
        if step.layer.op in ("Add", "Mul") and len(activations) < 2:
            continue  # a constant operand has no integer kernel
        if step.layer.op in FOLLOWERS and activations and step.fused != "gate":
            sources = (step.gated,) if step.gated else activations
            mask = held.get(sources[0], none)
            for tensor in sources[1:]:
                mask = mask & held.get(tensor, none)
            if mask.any():
                hold(step.result, mask)
    return held


def lifted_tensors(graph: ModelGraph, held: Mapping[str, Mask]) -> dict[str, Mask]:
    """``held`` with what the optimizer adds: a quantizer is moved before what only changes its tensor's shape."""
    lifted = dict(held)
    for layer in reversed(graph.layers):
        if layer.op not in _LIFTED_OVER or not layer.activations or not layer.outputs:
            continue
        source, mask = layer.activations[0], lifted.get(layer.outputs[0])
        if mask is not None and len(graph.consumers[source]) == 1 and source not in graph.outputs:
            lifted[source] = lifted[source] | mask if source in lifted else mask
    return lifted
