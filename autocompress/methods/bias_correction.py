"""Biases that take back the shift rounding gives to a layer's mean output (Nagel et al., 1906.04721, section 4.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autocompress.graph.executor import Tap, build_module
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.simulation import build_compressed
from autocompress.plan import Layer, ModelGraph

MOST_SAMPLES = 64
"""Samples that run through the model together: all of a layer's inputs must be corrected before its own turn."""


def correct_biases(
    compressed: CompressedModel,
    weights: Mapping[str, torch.Tensor],
    batches: Sequence[tuple[torch.Tensor, ...]],
) -> CompressedModel:
    """Shifts each bias by what the layer's mean output departs from the float model's, in execution order.

    Each layer is measured behind layers already corrected, on the same samples in both models, so that what is
    corrected is rounding and not chance.  Weights stay on their grids.

    Args:
        compressed: the quantized model.
        weights: of the float model it was made from (equalized, where it was).
        batches: calibration inputs; the first ``MOST_SAMPLES`` samples are used.
    """
    places = {place.tensor: place for place in correctable(compressed)}
    if not places:
        return compressed
    sample = _together(batches)
    means: dict[str, torch.Tensor] = {}

    def observe(place: Place) -> Tap:
        def tap(value: torch.Tensor) -> torch.Tensor:
            means[place.tensor] = place.mean(value)
            return value

        return tap

    module = build_module(compressed.graph, weights)
    module.taps = {name: observe(place) for name, place in places.items()}
    made = dict(compressed.weights)
    simulated = build_compressed(compressed)
    inner = dict(simulated.taps)

    def correct(place: Place) -> Tap:
        def tap(value: torch.Tensor) -> torch.Tensor:
            shift = means[place.tensor] - place.mean(value)
            made[place.bias] = (made[place.bias] + shift).to(made[place.bias].dtype)
            value = value + shift.reshape(-1, *(1,) * (value.dim() - 2 if place.of_images else 0))
            return inner[place.tensor](value) if place.tensor in inner else value

        return tap

    simulated.taps = {**inner, **{name: correct(place) for name, place in places.items()}}
    with torch.no_grad():
        module(*sample)
        simulated(*sample)
    return replace(compressed, weights=made)


@dataclass(frozen=True)
class Place:
    """A bias, the tensor that it shifts, and whether that has its channels first (else last)."""

    bias: str
    tensor: str
    of_images: bool

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of each channel."""
        axis = 1 if self.of_images else value.dim() - 1
        return value.mean(dim=[d for d in range(value.dim()) if d != axis])


def correctable(compressed: CompressedModel) -> list[Place]:
    """Biases of layers that have a number format, in execution order."""
    graph, formats = compressed.graph, compressed.plan.layers
    uses = Counter(name for layer in graph.layers for name in layer.weights)
    found = []
    for layer in graph.compressible:
        place = _bias_of(graph, layer)
        if layer.name in formats and place is not None and uses[place.bias] == 1:
            channels = graph.tensors[place.tensor].shape[0 if place.of_images else -1]
            if graph.tensors[place.bias].shape == (channels,):
                found.append(place)
    return found


def _bias_of(graph: ModelGraph, layer: Layer) -> Place | None:
    """The layer's own bias, or that of the Add behind it, which is how a Linear on several tokens is written."""
    if len(layer.inputs) > 2 and layer.inputs[2] in layer.weights:
        return Place(layer.inputs[2], layer.outputs[0], layer.op == "Conv")
    readers = graph.consumers.get(layer.outputs[0], ())
    if layer.op == "MatMul" and len(readers) == 1 and readers[0].op == "Add" and len(readers[0].weights) == 1:
        return Place(readers[0].weights[0], readers[0].outputs[0], False)
    return None


def _together(batches: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The first samples of the batches as one batch."""
    taken: list[tuple[torch.Tensor, ...]] = []
    count = 0
    for batch in batches:
        part = tuple(value[: MOST_SAMPLES - count] for value in batch)
        count += len(part[0])
        taken.append(part)
        if count >= MOST_SAMPLES:
            break
    return tuple(torch.cat(column) for column in zip(*taken, strict=True))
