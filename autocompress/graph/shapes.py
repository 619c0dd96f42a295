"""The shapes of a graph's tensors, found by running it on meta tensors: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from autocompress.graph.executor import GraphModule
from autocompress.plan import ModelGraph, Tensor

BATCH = 1009
"""The batch shapes are traced with: a prime, so that an axis with the batch in it shows itself by its size."""


def on_meta(graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without their values; integers and scalars keep theirs, for they may be shapes and axes.

    What a layer multiplies by or adds is neither, even where it is a single number: the bias of one output.
    """
    factors = {name for layer in graph.compressible for name in layer.weights}
    return {
        name: value.to("meta") if value.is_floating_point() and (value.numel() > 1 or name in factors) else value
        for name, value in weights.items()
    }


def trace_shapes(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> dict[str, Tensor]:
    """Every activation with its shape for one sample, the batch axis left out.

    An axis that holds the batch times something (tokens laid out with the samples) keeps the something.  Integer
    tensors, which are shapes and indices, keep all their axes.
    """
    return {
        name: Tensor(id=name, shape=one_sample(shape) if dtype.startswith("float") else shape, dtype=dtype)
        for name, (shape, dtype) in trace(graph, weights, example_inputs).items()
    }


def trace(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The whole shape and the type of every activation at a batch of ``BATCH``."""
    module = GraphModule(graph, on_meta(graph, weights))
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def record(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def tap(value: torch.Tensor) -> torch.Tensor:
            found[name] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            return value

        return tap

    names = [*graph.inputs, *(out for layer in graph.layers for out in layer.outputs if out)]
    module.taps = {name: record(name) for name in names}
    with torch.no_grad():
        module(*(_enlarged(x) for x in example_inputs))
    return found


def one_sample(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A traced shape without its batch.

    >>> one_sample((1009, 3, 8, 8)), one_sample((1009 * 196, 768)), one_sample((196, 1009, 64))
    ((3, 8, 8), (196, 768), (196, 64))
    """
    for axis, size in enumerate(shape):
        if size and size % BATCH == 0:
            rest = (size // BATCH,) if size > BATCH else ()
            return shape[:axis] + rest + shape[axis + 1 :]
    return shape


def _enlarged(example: torch.Tensor) -> torch.Tensor:
    if example.is_floating_point():
        return torch.empty((BATCH, *example.shape[1:]), dtype=example.dtype, device="meta")
    return example[:1].expand(BATCH, *example.shape[1:])
