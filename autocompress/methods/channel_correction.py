"""Restores the mean and deviation of channels, which pruning and rounding shrink, in one pass over a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from autocompress.graph.executor import Tap
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.rounding import snap
from autocompress.methods.simulation import build_compressed
from autocompress.methods.statistics import from_matrix, weight_matrix
from autocompress.plan import Layer, ModelGraph


class StatisticsCorrection:
    """Rescales each output channel to the mean and deviation it had in the original, layer after layer in one pass.

    Pruning and rounding shrink activations a little at every layer, and the loss compounds with depth (REPAIR,
    2211.08403).  Only biases and scales change, so weights stay on their grids.

    Args:
        compressed: the model as stitched.
        means: of the original's outputs, for each layer to correct, ``[channels kept]``.
        deviations: likewise.

    Attributes:
        module: its pass over data corrects; each layer may be passed once.
        taps: the rounding of activations that ``module`` does behind the correction.
        weights: of the layers passed, corrected; the others as they were.
        scales: likewise.
    """

    def __init__(
        self,
        compressed: CompressedModel,
        means: Mapping[str, torch.Tensor],
        deviations: Mapping[str, torch.Tensor],
    ) -> None:
        self._compressed, self._means, self._deviations = compressed, means, deviations
        self.module = build_compressed(compressed)
        self.taps = dict(self.module.taps)
        self.weights = dict(compressed.weights)
        self.scales = dict(compressed.weight_scales)
        shared = sharing(compressed.graph)
        for layer in compressed.graph.compressible:
            if layer.op == "Conv" and layer.name in means and layer.name not in shared:
                self.module.taps[layer.outputs[0]] = self._corrector(layer)

    def result(self) -> CompressedModel:
        """The model as far as it was corrected."""
        compressed = self._compressed
        return CompressedModel(compressed.graph, self.weights, compressed.plan, self.scales, compressed.ranges)

    def _corrector(self, layer: Layer) -> Tap:
        inner = self.taps.get(layer.outputs[0])
        weights, scales = self.weights, self.scales
        means, deviations = self._means[layer.name], self._deviations[layer.name]

        def tap(value: torch.Tensor) -> torch.Tensor:
            others = [axis for axis in range(value.dim()) if axis != 1]
            mean = value.mean(dim=others)
            deviation = (value.square().mean(dim=others) - mean.square()).clamp_min(0.0).sqrt()
            gain = (deviations / deviation.clamp_min(1e-6)).clamp(0.5, 2.0)
            gain = torch.where(deviation < 1e-6, torch.ones_like(gain), gain)
            shift = means - mean * gain
            weight = weights[layer.inputs[1]]
            weight = weight * gain.reshape(-1, *(1,) * (weight.dim() - 1))
            if layer.name in scales:
                scales[layer.name] = scales[layer.name] * gain
                weight = from_matrix(layer, snap(weight_matrix(layer, weight), scales[layer.name]), weight.shape)
            weights[layer.inputs[1]] = weight
            if len(layer.inputs) > 2:
                weights[layer.inputs[2]] = weights[layer.inputs[2]] * gain + shift
            places = (1, -1, *(1,) * (value.dim() - 2))
            value = value * gain.reshape(places) + shift.reshape(places)
            return inner(value) if inner else value

        return tap


def correct_statistics(
    compressed: CompressedModel,
    batches: Iterable[tuple[torch.Tensor, ...]],
    means: Mapping[str, torch.Tensor],
    deviations: Mapping[str, torch.Tensor],
) -> CompressedModel:
    """The model after a ``StatisticsCorrection`` on the first batch."""
    correction = StatisticsCorrection(compressed, means, deviations)
    with torch.no_grad():
        correction.module(*next(iter(batches)))
    return correction.result()


def sharing(graph: ModelGraph) -> set[str]:
    """Layers whose weights are used more than once."""
    return {name for layer in graph.layers if layer.shared_with for name in (layer.name, *layer.shared_with)}
