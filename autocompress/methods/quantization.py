"""Number formats of layers and activations, and the arithmetic of affine quantization (Jacob et al., 1712.05877)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from autocompress.plan import UINT8_ACTIVATION, Layer, LayerPlan, ModelGraph, NumFormat, is_weight_layer

FUSED_ACTIVATIONS = ("Relu", "Clip")
"""Activations that every runtime folds into the operator before them."""

MOVERS = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
"""Operators that only move values: what they give lies in the range of what they read."""

FOLLOWERS = MOVERS | {
    "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "HardSigmoid", "LeakyRelu",
}  # fmt: skip
"""Operators without weights that stay in int8 when what they read is int8."""

EXTENDED = 2 / 3
"""A range that holds this share of where a HardSigmoid rises is widened to hold it all."""


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


def gives_float(graph: ModelGraph, layer: Layer) -> bool:
    """Whether a layer must compute in floats: no integer convolution gives a model's float output."""
    return layer.op == "Conv" and fused_output(graph, layer) in graph.outputs


def gates(graph: ModelGraph) -> dict[str, str]:
    """For each Sigmoid or HardSigmoid that nothing but the product with its own input reads, the name of that product.

    The two are one activation: ``x * sigmoid(x)`` (SiLU) and ``x * hard_sigmoid(x)`` (hard-swish).
    """
    found: dict[str, str] = {}
    for layer in graph.layers:
        if layer.op not in ("Sigmoid", "HardSigmoid") or layer.outputs[0] in graph.outputs:
            continue
        readers = graph.consumers.get(layer.outputs[0], ())
        own = {layer.inputs[0], layer.outputs[0]}
        if len(readers) == 1 and readers[0].op == "Mul" and set(readers[0].activations) == own:
            found[layer.name] = readers[0].name
    return found


def smooth_gates(graph: ModelGraph) -> dict[str, str]:
    """The ``gates`` that are Sigmoids."""
    return {gate: product for gate, product in gates(graph).items() if graph.by_name[gate].op == "Sigmoid"}


def activation_formats(graph: ModelGraph, layers: Mapping[str, LayerPlan]) -> dict[str, NumFormat]:
    """The activations that a plan holds in 8 bits: everything an int8 layer reads or writes.

    A format belongs to the tensor, so every reader sees the same quantized values.  Operators without weights keep
    int8 when all they read is int8; within ``x * sigmoid(x)`` only the product is rounded.  The model's outputs stay
    float32.
    """
    formats: dict[str, NumFormat] = {}
    smooth = smooth_gates(graph)
    unrounded = {graph.by_name[gate].outputs[0] for gate in smooth}

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
        if layer.op not in FOLLOWERS or layer.name in smooth:
            continue
        if not all(t in formats for t in layer.activations if t not in unrounded):
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
    gate_of_product = {product: gate for gate, product in gates(graph).items()}
    for layer in graph.layers:
        for name in layer.outputs:
            if name not in wanted:
                continue
            source = layer.activations[0] if layer.activations else ""
            if layer.op in MOVERS and source in ranges:
                ranges[name] = ranges[source]
            elif layer.op == "HardSigmoid":
                ranges[name] = (0.0, 1.0)
            elif (bent := _bend(graph, name, gate_of_product)) is not None:
                ranges[name] = _for_hard_sigmoid(*choose(name), bent)
            else:
                low, high = choose(name)
                ranges[name] = (max(low, 0.0), max(high, 1e-6)) if layer.op == "Relu" else (low, high)
    return dict(sorted(ranges.items()))


def _bend(graph: ModelGraph, tensor: str, gate_of_product: Mapping[str, str]) -> tuple[float, float | None] | None:
    """Beyond what values of a tensor its readers do not tell one from another; None where they tell them all.

    Below the first bound a HardSigmoid is 0, and so is a hard-swish; above the second a HardSigmoid is 1.
    """
    readers = graph.consumers.get(tensor, ())
    curves = [layer for layer in readers if layer.op == "HardSigmoid"]
    if tensor in graph.outputs or len(curves) != 1:
        return None
    rest = [layer for layer in readers if layer is not curves[0]]
    if any(gate_of_product.get(layer.name) != curves[0].name for layer in rest):
        return None
    alpha, beta = hard_sigmoid_line(curves[0])
    return -beta / alpha, None if rest else (1 - beta) / alpha


def hard_sigmoid_line(layer: Layer) -> tuple[float, float]:
    """Slope and offset of a HardSigmoid."""
    return float(layer.attributes.get("alpha", 0.2)), float(layer.attributes.get("beta", 0.5))  # type: ignore[arg-type]


def _for_hard_sigmoid(low: float, high: float, bend: tuple[float, float | None]) -> tuple[float, float]:
    """A range whose integers a HardSigmoid needs only shift: its lowest value is where the curve begins to rise.

    Nothing below is told apart, so cutting there is free; a range that nearly reaches there is widened.  The step is
    made to divide the distance to 0, which puts the zero point on an integer without an error.
    """
    start, stop = bend
    if low > EXTENDED * start or start >= 0:
        return low, high
    high = max(high if stop is None else min(high, stop), 1e-6)
    step = (high - start) / 255
    count = int(-start / step)
    return (start, start - 255 * start / count) if count else (low, high)


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
