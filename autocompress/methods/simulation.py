"""The torch simulation of a compressed model: the same scales, zero points and rounding as the exported file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autocompress.graph.executor import GraphModule, Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import affine_parameters


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

    Weights already lie on their grids; activations that the plan holds in 8 bits are rounded as the runtime rounds
    them.  The module takes and gives what the original does.
    """
    module = GraphModule(compressed.graph, compressed.weights)
    module.taps = activation_taps({name: compressed.ranges[name] for name in compressed.plan.activations})
    module.eval()
    return module
