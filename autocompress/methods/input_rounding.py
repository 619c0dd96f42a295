"""What layers that quantize their input while they run make of it, in torch as in the runtime."""

from __future__ import annotations

import torch

from autocompress.graph.executor import Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import BLOCK
from autocompress.plan import CompressionPlan


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


def behind_halves(compressed: CompressedModel, taps: dict[str, Tap]) -> dict[str, Tap]:
    """The taps, with one before them where a layer that computes in 16-bit floats gives its result."""

    def both(first: Tap, second: Tap | None) -> Tap:
        return first if second is None else lambda value: second(first(value))

    for layer in compressed.graph.compressible:
        plan = compressed.plan.layers.get(layer.name)
        if plan is not None and plan.compute == "fp16":
            taps[layer.outputs[0]] = both(half_tap, taps.get(layer.outputs[0]))
    return taps
