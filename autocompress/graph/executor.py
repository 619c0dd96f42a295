"""Runs a ``ModelGraph`` in torch: the simulation of what the runtime computes, and what recovery trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph.ops import OPERATORS
from autocompress.plan import Layer, ModelGraph

Tap = Callable[[torch.Tensor], torch.Tensor]


class GraphModule(nn.Module):
    """A graph with weights as an ``nn.Module``.

    Parameters keep the names they had in the model that was read (``layer1.0.conv1.weight``), so a state dict of
    the one is readable beside the other.  What the model does not learn (constants, running statistics) is a buffer.
    Four dictionaries change what is computed and are empty by default:

    - ``taps[tensor]``: replaces an activation by what the callable gives for it (observe it, or quantize it);
    - ``input_taps[layer]``: replaces a layer's first input, for that layer alone;
    - ``weight_taps[layer]``: replaces a layer's weight in the same way;
    - ``norms[layer]``: a module applied to a layer's output before anything reads it (batch norm while training).
    """

    def __init__(self, graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.graph = graph
        unknown = sorted({layer.op for layer in graph.layers} - OPERATORS.keys())
        if unknown:
            raise UsageError(
                f"the model uses ONNX operators that cannot be simulated: {', '.join(unknown)}; "
                f"known: {', '.join(sorted(OPERATORS))}"
            )
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self.taps: dict[str, Tap] = {}
        self.input_taps: dict[str, Tap] = {}
        self.weight_taps: dict[str, Tap] = {}
        self.norms = nn.ModuleDict()
        self._last_reader = _last_readers(graph)
        self._own = frozenset(dir(self))
        trained = _trained(graph)
        for name in graph.weight_names():
            self._place(name, weights[name], name in trained)
        # Bounds are wanted as numbers on every run; a tensor would have to be read out each time.
        bounds = {name for layer in graph.layers if layer.op == "Clip" for name in layer.weights}
        self._bounds = {name: float(weights[name]) for name in bounds if not weights[name].is_meta}

    def _place(self, name: str, value: torch.Tensor, trained: bool) -> None:
        owner: nn.Module = self
        *path, leaf = name.split(".")
        # A model may call its own parts what this class calls its own.
        if path and path[0] in self._own:
            path[0] += "_"
        elif not path and leaf in self._own:
            leaf += "_"
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if trained and value.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(value.detach().clone()))
        else:
            owner.register_buffer(leaf, value.detach().clone())
        self._places[name] = (owner, leaf)

    def weight(self, name: str) -> torch.Tensor:
        """The stored tensor of this name."""
        owner, leaf = self._places[name]
        return getattr(owner, leaf)  # type: ignore[no-any-return]

    def weights(self) -> dict[str, torch.Tensor]:
        """All stored tensors, detached copies on the CPU."""
        return {name: self.weight(name).detach().cpu().clone() for name in self._places}

    def on(self, device: torch.device) -> GraphModule:
        """Moves the module, its norms and what rounds its weights to a device, in place.

        Integers and single numbers stay on the CPU: they are shapes, positions and factors, and torch asks for them
        as numbers.
        """
        for owner, leaf in self._places.values():
            value = getattr(owner, leaf)
            if value.device == device or not travels(value):
                continue
            if isinstance(value, nn.Parameter):
                value.data, value.grad = value.data.to(device), None  # The same object: optimizers know it.
            else:
                setattr(owner, leaf, value.to(device))
        for part in (self.norms, *self.weight_taps.values()):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def norm_of(self, layer: Layer) -> nn.Module | None:
        return self.norms._modules.get(layer.name.replace(".", "/"))

    def set_norm(self, layer: Layer, norm: nn.Module) -> None:
        self.norms[layer.name.replace(".", "/")] = norm

    def forward(self, *inputs: torch.Tensor) -> Any:
        values = self.enter(*inputs)
        self.advance(values, 0, len(self.graph.layers))
        return self.leave(values)

    def enter(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The activations before the first layer, by name."""
        named = zip(self.graph.inputs, inputs, strict=True)
        return {name: self.taps[name](value) if name in self.taps else value for name, value in named}

    def advance(self, values: dict[str, torch.Tensor], start: int, stop: int) -> None:
        """Runs the layers at positions ``start`` to ``stop - 1``.

        Args:
            values: the activations that layers from ``start`` on read; changed to those that layers from ``stop`` on
                read, so that another pass can begin there.
            start: position in ``graph.layers``.
            stop: the position after the last layer to run.
        """
        for position in range(start, stop):
            self._run(self.graph.layers[position], values)
            for name in self._last_reader.get(position, ()):
                values.pop(name, None)

    def leave(self, values: Mapping[str, torch.Tensor]) -> Any:
        """The model's outputs once every layer has run."""
        outputs = tuple(values[name] for name in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, layer: Layer, values: dict[str, torch.Tensor]) -> None:
        arguments: list[torch.Tensor | float | None] = []
        for slot, name in enumerate(layer.inputs):
            if not name:
                arguments.append(None)
            elif name in self._bounds:
                arguments.append(self._bounds[name])
            elif name in self._places:
                stored = self.weight(name)
                tap = self.weight_taps.get(layer.name) if slot == 1 else None
                arguments.append(tap(stored) if tap else stored)
            else:
                tap = self.input_taps.get(layer.name) if slot == 0 else None
                arguments.append(tap(values[name]) if tap else values[name])
        result = OPERATORS[layer.op](layer.attributes, *arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        norm = self.norm_of(layer)
        for name, value in zip(layer.outputs, outputs, strict=False):
            if not name:
                continue
            value = norm(value) if norm is not None else value
            values[name] = self.taps[name](value) if name in self.taps else value


def travels(value: torch.Tensor) -> bool:
    """Whether a stored tensor goes with the module to another device."""
    return value.dim() > 0 and (value.is_floating_point() or value.dtype == torch.bool)


def _trained(graph: ModelGraph) -> set[str]:
    """Stored tensors that training may change: weights, biases, scales of norms, and vectors added or multiplied."""
    names: set[str] = set()
    for layer in graph.layers:
        if layer.op in ("Conv", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization"):
            names |= {name for name in layer.inputs[1:3] if name in layer.weights}
        elif layer.op in ("Add", "Mul", "PRelu", "Gather", "Concat", "Expand"):
            names |= {name for name in layer.weights if graph.tensors[name].elements > 1}
    return names


def _last_readers(graph: ModelGraph) -> dict[int, tuple[str, ...]]:
    """Which activations are free once the layer at a position has run."""
    last: dict[str, int] = {}
    for position, layer in enumerate(graph.layers):
        for name in (*layer.activations, *layer.outputs):
            last[name] = position
    table: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in graph.outputs:
            table.setdefault(position, []).append(name)
    return {position: tuple(names) for position, names in table.items()}


def build_module(graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> GraphModule:
    """The graph as a float32 module in evaluation mode; the weights are copied."""
    module = GraphModule(graph, weights)
    module.eval()
    return module
