"""Number formats of layers and activations, and the arithmetic of affine quantization (Jacob et al., 1712.05877)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from autocompress.plan import UINT8_ACTIVATION, Layer, LayerPlan, ModelGraph, NumFormat, is_weight_layer

FUSED_ACTIVATIONS = ("Relu", "Clip")
"""Activations that every runtime folds into the operator before them."""

MOVERS = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
"""Operators that only move values: what they give lies in the range of what they read."""

FOLLOWERS = MOVERS | {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}
"""Operators without weights that stay in int8 when what they read is int8."""


def fused_output(graph: ModelGraph, layer: Layer) -> str:
    """The tensor that leaves ``layer`` once the activation behind it is folded in.

    A Relu or Clip that is the only reader of the layer's output belongs to the layer: the tensor between the two
    is never stored, so it has no number format.
    """
    out = layer.outputs[0]
    readers = graph.consumers.get(out, ())
    if len(readers) == 1 and readers[0].op in FUSED_ACTIVATIONS and out not in graph.outputs:
        return readers[0].outputs[0]
    return out


def activation_formats(graph: ModelGraph, layers: Mapping[str, LayerPlan]) -> dict[str, NumFormat]:
    """The activations that a plan holds in 8 bits: everything an int8 layer reads or writes.

    A format belongs to the tensor, so every reader sees the same quantized values.  Operators without weights keep
    int8 when all they read is int8.  The model's outputs stay float32.
    """
    formats: dict[str, NumFormat] = {}

    def hold(tensor: str) -> None:
        if tensor not in graph.outputs:
            formats[tensor] = UINT8_ACTIVATION

    def computes_int8(layer: Layer) -> bool:
        plan = layers.get(layer.name)
        return is_weight_layer(layer) and plan is not None and plan.compute == "int8"

    for layer in graph.layers:
        if computes_int8(layer):
            for tensor in layer.activations:
                hold(tensor)
            hold(fused_output(graph, layer))
    for layer in graph.layers:
        if layer.op not in FOLLOWERS or not all(t in formats for t in layer.activations):
            continue
        if layer.op in ("Add", "Mul") and len(layer.activations) < 2:
            continue  # a constant operand has no integer kernel
        if layer.activations:
            for output in layer.outputs[1:]:
                hold(output)
            hold(fused_output(graph, layer))
    return dict(sorted(formats.items()))


def assign_ranges(
    graph: ModelGraph, activations: Iterable[str], choose: Callable[[str], tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """The range of each quantized activation.

    Operators that only move values pass the range on, so that nothing is rounded twice.  Behind a Relu nothing is
    negative: a range that claims otherwise would keep the runtime from folding the Relu away.

    Args:
        graph: of the model.
        activations: the quantized tensors.
        choose: gives the range of a tensor from calibration.
    """
    wanted = set(activations)
    ranges = {name: choose(name) for name in graph.inputs if name in wanted}
    for layer in graph.layers:
        for name in layer.outputs:
            if name not in wanted:
                continue
            source = layer.activations[0] if layer.activations else ""
            if layer.op in MOVERS and source in ranges:
                ranges[name] = ranges[source]
            else:
                low, high = choose(name)
                ranges[name] = (max(low, 0.0), max(high, 1e-6)) if layer.op == "Relu" else (low, high)
    return dict(sorted(ranges.items()))


def affine_parameters(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of unsigned affine integers that cover ``[low, high]`` and hold 0 exactly.

    >>> affine_parameters(0.0, 2.55)
    (0.01, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = max((high - low) / levels, 1e-8)
    return scale, min(max(round(-low / scale), 0), levels)


def weight_axis(layer: Layer) -> int:
    """The axis of the layer's weight that runs over output channels."""
    if layer.op == "Conv":
        return 0
    return 0 if layer.op == "Gemm" and layer.attributes.get("transB") else 1
