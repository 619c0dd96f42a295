"""The torch simulation of a compressed model: the same scales, zero points and rounding as the exported file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import BLOCK
from autocompress.methods.quantization import affine_parameters
from autocompress.plan import CompressionPlan


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


def dynamic_tap() -> Tap:
    """Quantizes to unsigned 8 bits over the range that the whole tensor has, 0 included, and back.

    As ONNX's DynamicQuantizeLinear defines it: a batch has one scale, so what a sample becomes depends on the others.
    """

    def tap(value: torch.Tensor) -> torch.Tensor:
        low, high = value.detach().amin().clamp_max(0.0), value.detach().amax().clamp_min(0.0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero_point = (-low / scale).round().clamp(0, 255)
        rounded = ((value / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
        return _straight(value, rounded)

    return tap


def block_tap(block: int) -> Tap:
    """Quantizes each block of a row to signed 8 bits by its largest value and back.

    As MatMulNBits does with accuracy_level 4 (``QuantizeARow_CompInt8`` in onnxruntime's MLAS).
    """

    def tap(value: torch.Tensor) -> torch.Tensor:
        columns = value.shape[-1]
        padded = torch.nn.functional.pad(value.detach(), (0, -columns % block))
        padded = padded.reshape(*value.shape[:-1], -1, block)
        largest = padded.abs().amax(dim=-1, keepdim=True)
        inverse = torch.where(largest > 0, 127.0 / largest.clamp_min(1e-30), torch.zeros_like(largest))
        rounded = (padded * inverse).round() * (largest / 127.0)
        return _straight(value, rounded.flatten(-2)[..., :columns])

    return tap


def _straight(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach() if torch.is_grad_enabled() else rounded


def input_taps(plan: CompressionPlan) -> dict[str, Tap]:
    """What layers that round their input while they run make of it."""
    taps: dict[str, Tap] = {}
    for name, layer in plan.layers.items():
        if layer.compute == "int8_dynamic":
            taps[name] = dynamic_tap()
        elif layer.compute == "weight_only":
            taps[name] = block_tap(layer.storage.block or BLOCK)
        elif layer.compute == "fp16":
            taps[name] = half_tap
    return taps


def half_tap(value: torch.Tensor) -> torch.Tensor:
    """Rounds to 16-bit floats."""
    return _straight(value, value.detach().half().to(value.dtype))


def _behind_halves(compressed: CompressedModel, taps: dict[str, Tap]) -> dict[str, Tap]:
    """The taps, with one before them where a layer that computes in 16-bit floats gives its result."""

    def both(first: Tap, second: Tap | None) -> Tap:
        return first if second is None else lambda value: second(first(value))

    for layer in compressed.graph.compressible:
        plan = compressed.plan.layers.get(layer.name)
        if plan is not None and plan.compute == "fp16":
            taps[layer.outputs[0]] = both(half_tap, taps.get(layer.outputs[0]))
    return taps


def integer_biases(compressed: CompressedModel) -> dict[str, torch.Tensor]:
    """The biases of int8 layers as the runtime adds them: 32-bit integers times input scale times weight scale.

    Where two layers share a bias it is left as it is.
    """
    graph, limits = compressed.graph, torch.iinfo(torch.int32)
    found: dict[str, torch.Tensor] = {}
    for layer in graph.compressible:
        plan = compressed.plan.layers.get(layer.name)
        bias = layer.inputs[2] if len(layer.inputs) > 2 else ""
        if plan is None or plan.compute != "int8" or not bias or len(graph.consumers[bias]) > 1:
            continue
        if layer.inputs[0] in compressed.plan.activations and layer.name in compressed.weight_scales:
            scale = affine_parameters(*compressed.ranges[layer.inputs[0]])[0] * compressed.weight_scales[layer.name]
            value = compressed.weights[bias]
            integers = (value.double().reshape(-1) / scale).round().clamp(limits.min, limits.max)
            found[bias] = (integers * scale).to(value.dtype).reshape(value.shape)
    return found


def build_compressed(compressed: CompressedModel) -> GraphModule:
    """The compressed model as a torch module in evaluation mode.

    Weights already lie on their grids; activations that the plan holds in 8 bits, and inputs that a layer quantizes
    while it runs, are rounded as the runtime rounds them.  The module takes and gives what the original does.
    """
    module = GraphModule(compressed.graph, {**compressed.weights, **integer_biases(compressed)})
    taps = activation_taps({name: compressed.ranges[name] for name in compressed.plan.activations})
    module.taps = _behind_halves(compressed, taps)
    module.input_taps = input_taps(compressed.plan)
    module.eval()
    return module
