"""The torch simulation of a compressed model: the same scales, zero points and rounding as the exported file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.input_rounding import behind_halves, input_taps
from autocompress.methods.quantization import affine_parameters
from autocompress.plan import Layer


def activation_tap(low: float, high: float) -> Tap:
    """Quantizes to unsigned 8 bits over ``[low, high]`` and back; gradients pass straight through inside the range."""
    scale, zero_point = affine_parameters(low, high)

    def tap(value: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            # The same arithmetic without the mask that a backward pass would need: three times as fast.
            return value.mul(1.0 / scale).round_().clamp_(-zero_point, 255 - zero_point).mul_(scale)
        return torch.fake_quantize_per_tensor_affine(value.float(), scale, zero_point, 0, 255)

    return tap


def activation_taps(ranges: Mapping[str, tuple[float, float]]) -> dict[str, Tap]:
    """One tap for each quantized tensor."""
    return {name: activation_tap(low, high) for name, (low, high) in ranges.items()}


def build_compressed(compressed: CompressedModel) -> GraphModule:
    """The compressed model as a torch module in evaluation mode.

    Weights already lie on their grids; biases of int8 layers, activations that the plan holds in 8 bits, and inputs
    that a layer rounds while it runs are rounded as the runtime rounds them.  The module takes and gives what the
    original does.
    """
    module = GraphModule(compressed.graph, {**compressed.weights, **integer_biases(compressed)})
    taps = activation_taps({name: compressed.ranges[name] for name in compressed.plan.activations})
    module.taps = behind_halves(compressed, taps)
    module.input_taps = input_taps(compressed.plan)
    module.eval()
    return module


def bias_steps(compressed: CompressedModel, layer: Layer) -> torch.Tensor:
    """What one integer of an int8 layer's bias stands for, in float32 as in the runtime: input times weight scale."""
    scale, _ = affine_parameters(*compressed.ranges[layer.inputs[0]])
    return torch.tensor(scale, dtype=torch.float32) * compressed.weight_scales[layer.name].float()


def bias_integers(compressed: CompressedModel, layer: Layer) -> torch.Tensor | None:
    """The int32 bias that the runtime adds to an int8 layer's sums, as float32."""
    if len(layer.inputs) < 3 or not layer.inputs[2]:
        return None
    limit = 2.0**31 - 128  # the largest float32 below 2^31
    bias = compressed.weights[layer.inputs[2]].float().reshape(-1)
    return (bias / bias_steps(compressed, layer)).round().clamp(-limit, limit)


def integer_biases(compressed: CompressedModel) -> dict[str, torch.Tensor]:
    """The biases of int8 layers as the runtime adds them: 32-bit integers times input scale times weight scale."""
    graph = compressed.graph
    found: dict[str, torch.Tensor] = {}
    for layer in graph.compressible:
        plan = compressed.plan.layers.get(layer.name)
        bias = layer.inputs[2] if len(layer.inputs) > 2 else ""
        if plan is None or plan.compute != "int8" or not bias or len(graph.consumers[bias]) > 1:
            continue
        if layer.inputs[0] in compressed.plan.activations and layer.name in compressed.weight_scales:
            integers = bias_integers(compressed, layer)
            assert integers is not None
            value = compressed.weights[bias]
            found[bias] = (integers * bias_steps(compressed, layer)).to(value.dtype).reshape(value.shape)
    return found
