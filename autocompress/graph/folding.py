"""Leaves out of a graph what need not run: layers of stored tensors alone, and layers that nothing reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autocompress.graph.ops import OPERATORS
from autocompress.plan import Layer


def folded(layers: Sequence[Layer], weights: dict[str, torch.Tensor], outputs: Sequence[str]) -> list[Layer]:
    """Computes what depends on stored tensors alone, where that takes no more numbers than it is made of.

    Args:
        layers: in execution order.
        weights: the stored tensors; results are added under the names of the layers' outputs.
        outputs: of the model, whose producers stay.
    """
    kept: list[Layer] = []
    for layer in layers:
        stored = tuple(name for name in layer.inputs if name in weights)
        layer = layer if stored == layer.weights else layer.model_copy(update={"weights": stored})
        if layer.op not in OPERATORS or len(layer.outputs) != 1 or layer.outputs[0] in outputs:
            kept.append(layer)
            continue
        if not stored or len(stored) != sum(1 for name in layer.inputs if name):
            kept.append(layer)
            continue
        with torch.no_grad():
            value = OPERATORS[layer.op](layer.attributes, *(weights[n] if n else None for n in layer.inputs))
        if value.numel() <= sum(weights[name].numel() for name in stored):
            weights[layer.outputs[0]] = value.contiguous()
        else:
            kept.append(layer)
    return kept


def without_dead(layers: Sequence[Layer], outputs: Sequence[str]) -> list[Layer]:
    """Leaves out layers whose results nothing reads."""
    needed = set(outputs)
    kept: list[Layer] = []
    for layer in reversed(layers):
        if needed & set(layer.outputs):
            kept.append(layer)
            needed.update(layer.inputs)
    return kept[::-1]
