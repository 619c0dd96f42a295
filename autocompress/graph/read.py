"""Reads an ``nn.Module`` once into a ``ModelGraph`` and its weights; the module is never changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph.attention import joined_transposes
from autocompress.graph.executor import GraphModule
from autocompress.graph.exporting import Exported, export
from autocompress.graph.folding import folded, without_dead
from autocompress.graph.groups import find_groups
from autocompress.graph.normalise import name_layers, name_weights, normalise
from autocompress.graph.shapes import trace, trace_shapes
from autocompress.plan import Layer, ModelGraph, Tensor, is_weight_layer

TOLERANCE = 1e-3
"""How far the graph may lie from the module, relative to the largest output."""


def read_model(
    module: nn.Module, example_inputs: tuple[torch.Tensor, ...], output_names: Sequence[str] = ()
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """Reads a model as the runtime will see it.

    Args:
        module: the trained model.
        example_inputs: one batch of at least two samples, on the CPU.
        output_names: what its outputs are called, one for each; by default, what torch calls them.

    Returns:
        The graph (batch norms folded, coupled groups found) and its weights by name.

    Raises:
        UsageError: torch cannot export the model, or an operator cannot be simulated.
    """
    module = _prepared(module)
    exported = name_weights(export(module, example_inputs, output_names), module)
    weights = exported.weights
    raw = _untraced(exported, exported.layers, weights)
    shapes = {name: shape for name, (shape, _) in trace(raw, weights, example_inputs).items()}
    layers = joined_transposes(normalise(exported, weights, shapes), shapes, exported.outputs)
    layers = folded(layers, weights, exported.outputs)
    layers = name_layers(without_dead(layers, exported.outputs))
    used = {name for layer in layers for name in layer.weights}
    weights = {name: value for name, value in weights.items() if name in used}
    graph = _untraced(exported, layers, weights)
    graph = graph.model_copy(update={"tensors": graph.tensors | trace_shapes(graph, weights, example_inputs)})
    _check(module, graph, weights, example_inputs)
    groups, skipped = find_groups(graph, weights, example_inputs)
    skipped |= {
        layer.name: f"{layer.op} multiplies two activations: it has no weights to compress"
        for layer in layers
        if layer.op in ("MatMul", "Gemm") and not is_weight_layer(layer)
    }
    return graph.model_copy(update={"groups": groups, "skipped": skipped}), weights


class _GlobalPool(nn.Module):
    """Global average pooling that exports to one operator; torch's own adds a stride trick on channels-last tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(-2, -1), keepdim=True)


def _prepared(module: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, spelt so that it exports to the fewest operators."""
    module = copy.deepcopy(module).cpu().eval()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1)):
                setattr(parent, name, _GlobalPool().eval())
    return module


def _untraced(exported: Exported, layers: list[Layer], weights: dict[str, torch.Tensor]) -> ModelGraph:
    """The graph with the shapes of its stored tensors alone."""
    stored = {
        name: Tensor(id=name, shape=tuple(weights[name].shape), dtype=str(weights[name].dtype).removeprefix("torch."))
        for name in {name: None for layer in layers for name in layer.weights}
    }
    return ModelGraph(layers=tuple(layers), tensors=stored, inputs=exported.inputs, outputs=exported.outputs)


def _check(
    module: nn.Module, graph: ModelGraph, weights: dict[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> None:
    """The graph must compute what the module computes, or nothing built on it can be trusted."""
    with torch.no_grad():
        expected = module(*example_inputs)
        given = GraphModule(graph, weights).eval()(*example_inputs)
    expected = expected if isinstance(expected, torch.Tensor) else next(iter(expected))
    given = given if isinstance(given, torch.Tensor) else given[0]
    if bool(expected.isnan().any()):
        broken = [name for name, value in weights.items() if bool(value.isnan().any())]
        cause = f"weight {broken[0]!r} holds some" if broken else "its weights hold none, so look at the inputs"
        raise UsageError(
            f"the outputs of {type(module).__name__} are not numbers (nan) on real samples ({cause}); check its "
            "weights and how the inputs are normalised"
        )
    scale = float(expected.abs().max()) + 1e-6
    error = float((expected - given).abs().max()) / scale
    if not error <= TOLERANCE:
        raise UsageError(
            f"the graph read from {type(module).__name__} departs from the module by {error:.1e} of its largest "
            "output; a module that behaves at random in eval mode, or keeps state between calls, cannot be compressed"
        )
