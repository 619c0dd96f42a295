"""Reads an ``nn.Module`` once into a ``ModelGraph`` and its weights; the module is never changed."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph.executor import GraphModule
from autocompress.graph.groups import find_groups
from autocompress.plan import Attribute, Layer, ModelGraph, Tensor, is_weight_layer

logger = logging.getLogger(__name__)

OPSET = 21
"""The first opset with 4-bit integers in DequantizeLinear."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {"auto_pad": "NOTSET", "group": 1, "strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)},
    "MaxPool": {
        "auto_pad": "NOTSET", "ceil_mode": 0, "dilations": (1, 1), "pads": (0, 0, 0, 0), "storage_order": 0,
        "strides": (1, 1),
    },
    "AveragePool": {
        "auto_pad": "NOTSET", "ceil_mode": 0, "count_include_pad": 0, "dilations": (1, 1), "pads": (0, 0, 0, 0),
        "strides": (1, 1),
    },
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "LayerNormalization": {"stash_type": 1, "axis": -1},
    "ReduceMean": {"keepdims": 1, "noop_with_empty_axes": 0},
    "Softmax": {"axis": -1},
    "Gelu": {"approximate": "none"},
    "Flatten": {"axis": 1},
}  # fmt: skip


def read_model(
    module: nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """Reads a model as the runtime will see it.

    Args:
        module: the trained model.
        example_inputs: one batch of at least two samples, on the CPU.

    Returns:
        The graph (batch norms folded, coupled groups found) and its weights by name.

    Raises:
        UsageError: torch cannot export the model, or an operator cannot be simulated.
    """
    module = copy.deepcopy(module).cpu().eval()
    layers, weights, inputs, outputs = _export(module, example_inputs)
    layers = _normalise(layers, weights, example_inputs, inputs, outputs)
    layers = _name_layers(layers)
    used = {name for layer in layers for name in layer.weights}
    weights = {name: value for name, value in weights.items() if name in used}
    tensors = _shapes(layers, weights, inputs, outputs, example_inputs)
    graph = ModelGraph(layers=tuple(layers), tensors=tensors, inputs=inputs, outputs=outputs)
    _check(module, graph, weights, example_inputs)
    groups, skipped = find_groups(module, graph, weights, example_inputs)
    skipped |= {
        layer.name: f"{layer.op} multiplies two activations: it has no weights to compress"
        for layer in layers
        if layer.op in ("MatMul", "Gemm") and not is_weight_layer(layer)
    }
    return graph.model_copy(update={"groups": groups, "skipped": skipped}), weights


def _export(
    module: nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> tuple[list[Layer], dict[str, torch.Tensor], tuple[str, ...], tuple[str, ...]]:
    """Exports to ONNX in memory, with constants folded and batch norms merged by torch's own optimizer."""
    names = list(inspect.signature(module.forward).parameters)[: len(example_inputs)]
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in example_inputs)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, example_inputs, dynamo=True, optimize=True, opset_version=OPSET, dynamic_shapes=dynamic,
                input_names=names, verbose=False,
            )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"torch.onnx.export cannot read {type(module).__name__} with a dynamic batch: {reason}; "
            "avoid control flow that depends on tensor values or on the batch size"
        ) from error
    assert program is not None
    model = program.model
    weights = {name: _to_torch(value.const_value) for name, value in model.graph.initializers.items()}
    weights = _rename_weights(weights, module)
    renamed = weights.pop("", {})
    layers: list[Layer] = []
    for node in model.graph:
        if node.op_type == "Constant":
            value = next(iter(node.attributes.values())).value
            weights[node.outputs[0].name] = _to_torch(value)
            continue
        attributes = {a.name: _attribute(a.value) for a in node.attributes.values()}
        layer_inputs = tuple(renamed.get(i.name, i.name) if i is not None else "" for i in node.inputs)
        layers.append(
            Layer(
                name=node.outputs[0].name,
                op=node.op_type,
                inputs=layer_inputs,
                outputs=tuple(o.name for o in node.outputs),
                attributes=attributes,
            )
        )
    stored = set(weights)
    layers = [layer.model_copy(update={"weights": tuple(i for i in layer.inputs if i in stored)}) for layer in layers]
    return (
        layers,
        weights,
        tuple(value.name for value in model.graph.inputs),
        tuple(value.name for value in model.graph.outputs),
    )


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps the exporter's account of its passes out of the caller's log."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


def _to_torch(value: Any) -> torch.Tensor:
    array = np.array(value.numpy() if hasattr(value, "numpy") else value)
    return torch.from_numpy(array.copy())


def _attribute(value: Any) -> Attribute:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value  # type: ignore[no-any-return]


def _rename_weights(weights: dict[str, torch.Tensor], module: nn.Module) -> dict[str, Any]:
    """Finds the parameter behind each initializer the exporter renamed (linear weights are transposed on the way).

    The names given up stand under ``""``.
    """
    state = dict(module.named_parameters())
    renamed: dict[str, str] = {}
    named: dict[str, Any] = {}
    for name, value in weights.items():
        target = name
        if name not in state and value.is_floating_point() and value.dim() == 2:
            for candidate, parameter in state.items():
                taken = candidate in weights or candidate in renamed.values()
                if not taken and parameter.dim() == 2 and parameter.shape == value.t().shape:
                    if torch.equal(parameter.detach().t(), value):
                        target = candidate
                        break
        if target != name:
            renamed[name] = target
        named[target] = value
    named[""] = renamed
    return named


def _normalise(
    layers: list[Layer],
    weights: dict[str, torch.Tensor],
    example_inputs: tuple[torch.Tensor, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> list[Layer]:
    """Brings equal operators to one spelling: pooling, flattening, biases; attributes at their default are dropped."""
    shapes = _shapes(layers, weights, inputs, outputs, example_inputs)
    result: list[Layer] = []
    for layer in layers:
        if layer.op == "ReduceMean" and _is_global_pool(layer, weights, shapes):
            keep = bool(layer.attributes.get("keepdims", 1))
            pooled = layer.outputs[0] if keep else f"{layer.outputs[0]}/pool"
            source = (layer.inputs[0],)
            result.append(Layer(name=pooled, op="GlobalAveragePool", inputs=source, outputs=(pooled,)))
            if not keep:
                result.append(Layer(name=layer.name, op="Flatten", inputs=(pooled,), outputs=layer.outputs))
            continue
        if layer.op == "Reshape" and _is_flatten(layer, weights, shapes):
            result.append(Layer(name=layer.name, op="Flatten", inputs=layer.inputs[:1], outputs=layer.outputs))
            continue
        if layer.op in ("Conv", "Gemm") and is_weight_layer(layer) and (len(layer.inputs) < 3 or not layer.inputs[2]):
            weight = layer.inputs[1]
            bias = weight.removesuffix("weight") + "bias" if weight.endswith("weight") else weight + ".bias"
            axis = 0 if layer.op == "Conv" or layer.attributes.get("transB") else 1
            weights[bias] = torch.zeros(weights[weight].shape[axis])
            layer = layer.model_copy(update={"inputs": (*layer.inputs[:2], bias), "weights": (*layer.weights, bias)})
        defaults = _DEFAULTS.get(layer.op, {})
        attributes = {k: v for k, v in layer.attributes.items() if k not in defaults or defaults[k] != v}
        if layer.op == "Conv":
            attributes.pop("kernel_shape", None)
        result.append(layer.model_copy(update={"attributes": attributes}))
    return result


def _is_global_pool(layer: Layer, weights: dict[str, torch.Tensor], shapes: dict[str, Tensor]) -> bool:
    source = shapes[layer.inputs[0]].shape
    axes = weights[layer.inputs[1]].tolist() if len(layer.inputs) > 1 and layer.inputs[1] in weights else []
    return len(source) == 3 and sorted(int(a) % 4 for a in axes) == [2, 3]


def _is_flatten(layer: Layer, weights: dict[str, torch.Tensor], shapes: dict[str, Tensor]) -> bool:
    """Whether a Reshape keeps the batch and lays the rest out in one axis."""
    source, result = shapes[layer.inputs[0]], shapes[layer.outputs[0]]
    return len(source.shape) == 3 and len(result.shape) == 1 and source.elements == result.elements


def _name_layers(layers: list[Layer]) -> list[Layer]:
    """Names weight layers after their module; a module used twice gets a suffix and is marked as shared."""
    seen: dict[str, str] = {}
    result = []
    for layer in layers:
        if is_weight_layer(layer):
            weight = layer.inputs[1]
            path = weight.removesuffix(".weight") if weight.endswith(".weight") else None
            name = path or layer.name
            if weight in seen:
                layer = layer.model_copy(update={"name": f"{name}/{len(result)}", "shared_with": (seen[weight],)})
            else:
                layer = layer.model_copy(update={"name": name})
                seen[weight] = name
            layer = layer.model_copy(update={"module_path": path})
        result.append(layer)
    return result


def _shapes(
    layers: list[Layer],
    weights: dict[str, torch.Tensor],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    example_inputs: tuple[torch.Tensor, ...],
) -> dict[str, Tensor]:
    """The shape of every tensor, found by running the graph on meta tensors."""
    tensors = {
        name: Tensor(id=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in weights.items()
        if any(name in layer.weights for layer in layers)
    }
    graph = ModelGraph(layers=tuple(layers), tensors=tensors, inputs=inputs, outputs=outputs)
    activations = trace_shapes(graph, weights, example_inputs)
    return tensors | {name: Tensor(id=name, shape=shape, dtype=dtype) for name, (shape, dtype) in activations.items()}


def trace_shapes(
    graph: ModelGraph, weights: dict[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Runs the graph on meta tensors; gives the shape without batch and the dtype of every activation."""
    meta = {n: (w.to("meta") if w.is_floating_point() and w.dim() > 0 else w) for n, w in weights.items()}
    module = GraphModule(graph, meta)
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def record(name: str) -> Any:
        def tap(value: torch.Tensor) -> torch.Tensor:
            shape = tuple(value.shape)
            integers = not value.is_floating_point()
            found[name] = (shape if integers else shape[1:], str(value.dtype).removeprefix("torch."))
            return value

        return tap

    names = [*graph.inputs, *(out for layer in graph.layers for out in layer.outputs if out)]
    module.taps = {name: record(name) for name in names}
    with torch.no_grad():
        module(*(x.to("meta") if x.is_floating_point() else x for x in example_inputs))
    return found


def _check(
    module: nn.Module, graph: ModelGraph, weights: dict[str, torch.Tensor], example_inputs: tuple[torch.Tensor, ...]
) -> None:
    """The graph must compute what the module computes, or nothing built on it can be trusted."""
    with torch.no_grad():
        expected = module(*example_inputs)
        given = GraphModule(graph, weights).eval()(*example_inputs)
    expected = expected if isinstance(expected, torch.Tensor) else next(iter(expected))
    given = given if isinstance(given, torch.Tensor) else given[0]
    scale = float(expected.abs().max()) + 1e-6
    error = float((expected - given).abs().max()) / scale
    if error > 1e-3:
        raise UsageError(
            f"the graph read from {type(module).__name__} departs from the module by {error:.1e} of its largest output; "
            "a module that behaves at random in eval mode, or keeps state between calls, cannot be compressed"
        )
