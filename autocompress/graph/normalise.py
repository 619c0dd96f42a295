"""Brings equal operators to one spelling, and gives weights back to the modules that own them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autocompress.graph.exporting import Exported
from autocompress.graph.shapes import BATCH
from autocompress.plan import Attribute, Layer, is_embedding, is_weight_layer, weight_of

Shape = tuple[int, ...]

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

_LEAVES = {
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "Add": {0: "bias", 1: "bias"},
}
"""What a module calls the tensor in each input of its operator."""


# --------------------------------------------------------------------------------------------- who owns a weight


def name_weights(exported: Exported, module: nn.Module) -> Exported:
    """Gives every weight the name it has in the module, and a tensor of its own to every module that has one.

    The exporter transposes linear weights, which then bear a made-up name, and merges small tensors of equal values
    (two norms that were never trained), which would tie layers together that have nothing to do with each other.
    """
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    state = {name: value.detach() for name, value in state.items()}
    first: dict[int, str] = {}
    for name, value in state.items():
        first.setdefault(value.data_ptr() if value.numel() else id(value), name)
    tied = {name: first.get(value.data_ptr(), name) for name, value in state.items() if name in exported.weights}
    tied = {name: owner for name, owner in tied.items() if owner != name and owner not in exported.weights}
    weights = {tied.get(name, name): value for name, value in exported.weights.items()}
    layers = [_with_inputs(layer, tied) for layer in exported.layers]
    layers, weights = _untransposed(layers, weights, state)
    layers = _unshared(layers, weights, exported.scopes, state)
    return Exported(layers, weights, exported.scopes, exported.inputs, exported.outputs)


def _untransposed(
    layers: list[Layer], weights: dict[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> tuple[list[Layer], dict[str, torch.Tensor]]:
    renamed: dict[str, str] = {}
    taken = set(weights)
    for name, value in weights.items():
        if name in state or not value.is_floating_point() or value.dim() != 2:
            continue
        for candidate, parameter in state.items():
            if candidate not in taken and parameter.shape == value.t().shape and torch.equal(parameter.t(), value):
                renamed[name] = candidate
                taken.add(candidate)
                break
    weights = {renamed.get(name, name): value for name, value in weights.items()}
    return [_with_inputs(layer, renamed) for layer in layers], weights


def _with_inputs(layer: Layer, renamed: Mapping[str, str]) -> Layer:
    if not any(name in renamed for name in layer.weights):
        return layer
    update = {
        "inputs": tuple(renamed.get(name, name) for name in layer.inputs),
        "weights": tuple(renamed.get(name, name) for name in layer.weights),
    }
    return layer.model_copy(update=update)


_Use = tuple[str, str | None]
"""The module that was running, and what it calls the tensor."""


def _unshared(
    layers: list[Layer],
    weights: dict[str, torch.Tensor],
    scopes: Mapping[str, str],
    state: Mapping[str, torch.Tensor],
) -> list[Layer]:
    """Undoes the merging of equal tensors; those that the module itself uses in two places stay shared."""
    uses: dict[str, dict[_Use, str | None]] = {}
    for layer in layers:
        for slot, name in enumerate(layer.inputs):
            if name in layer.weights and weights[name].is_floating_point() and weights[name].numel() > 1:
                use = (scopes.get(layer.name, ""), _LEAVES.get(layer.op, {}).get(slot))
                wanted = ".".join(filter(None, use)) if use[1] else None
                owner = _owner(name, wanted, weights[name], state)
                if uses.setdefault(name, {}).get(use) is None:
                    uses[name][use] = owner
    owned: dict[tuple[str, _Use], str] = {}
    taken = set(weights) | {owner for found in uses.values() for owner in found.values() if owner}
    for name, found in uses.items():
        if len(found) < 2:
            continue
        held = name in found.values()
        for use, owner in found.items():
            if owner is None and held:
                # A norm merged into a layer hides the layer's own path: any weight of the module not yet seen fits.
                owner = next((c for c, v in state.items() if c not in taken and _equal(v, weights[name])), None)
                owner = owner or "/".join((name, *filter(None, use)))
                taken.add(owner)
            held = True
            owned[name, use] = owner or name
    result = []
    for layer in layers:
        inputs = list(layer.inputs)
        for slot, name in enumerate(layer.inputs):
            use = (scopes.get(layer.name, ""), _LEAVES.get(layer.op, {}).get(slot))
            if (name, use) in owned:
                inputs[slot] = owned[name, use]
                if inputs[slot] not in weights:
                    weights[inputs[slot]] = weights[name].clone()
        stored = tuple(name for name in inputs if name in weights)
        result.append(layer.model_copy(update={"inputs": tuple(inputs), "weights": stored}))
    return result


def _owner(name: str, wanted: str | None, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str | None:
    """Which of the module's tensors stands in a place; None where the path does not say."""
    if wanted is None or wanted not in state or not _equal(state[wanted], value):
        return None
    if name in state and state[name].data_ptr() == state[wanted].data_ptr():
        return name
    return wanted


def _equal(stored: torch.Tensor, value: torch.Tensor) -> bool:
    forms = (stored, stored.t()) if stored.dim() == 2 else (stored,)
    return any(form.shape == value.shape and torch.equal(form, value) for form in forms)


# ------------------------------------------------------------------------------------------------- one spelling


def normalise(exported: Exported, weights: dict[str, torch.Tensor], shapes: Mapping[str, Shape]) -> list[Layer]:
    """One spelling for pooling, flattening, matrix products and biases; attributes at their default are dropped.

    Args:
        exported: the graph.
        weights: its stored tensors; biases that were missing are added.
        shapes: of its activations, as traced: the batch among them.
    """
    layers = _without_identities(exported.layers, exported.outputs)
    uses: dict[str, int] = dict.fromkeys(exported.outputs, 1)
    for layer in layers:
        for name in layer.inputs:
            uses[name] = uses.get(name, 0) + 1
    result: list[Layer] = []
    for layer in _joined(layers, weights, shapes, uses):
        if layer.op == "ReduceMean" and _is_global_pool(layer, weights, shapes):
            keep = bool(layer.attributes.get("keepdims", 1))
            pooled = layer.outputs[0] if keep else f"{layer.outputs[0]}/pool"
            source = (layer.inputs[0],)
            result.append(Layer(name=pooled, op="GlobalAveragePool", inputs=source, outputs=(pooled,)))
            if not keep:
                result.append(Layer(name=layer.name, op="Flatten", inputs=(pooled,), outputs=layer.outputs))
            continue
        if layer.op == "HardSwish":
            result += _hard_swish(layer)
            continue
        if layer.op == "Reshape" and _is_flatten(layer, shapes):
            result.append(Layer(name=layer.name, op="Flatten", inputs=layer.inputs[:1], outputs=layer.outputs))
            continue
        if layer.op == "Reshape":
            layer = _relative(layer, weights, shapes)
        if layer.op in ("Conv", "Gemm") and is_weight_layer(layer):
            layer = _with_bias(layer, weights)
        defaults = _DEFAULTS.get(layer.op, {})
        attributes = {k: v for k, v in layer.attributes.items() if k not in defaults or defaults[k] != v}
        if layer.op == "Conv":
            attributes.pop("kernel_shape", None)
        result.append(layer.model_copy(update={"attributes": attributes}))
    return result


def _without_identities(layers: list[Layer], outputs: tuple[str, ...]) -> list[Layer]:
    """Leaves out operators that hand on what they read; one that gives the model's output stays."""
    same: dict[str, str] = {}
    result: list[Layer] = []
    for layer in layers:
        if any(name in same for name in layer.inputs):
            layer = layer.model_copy(update={"inputs": tuple(same.get(name, name) for name in layer.inputs)})
        if layer.op == "Identity" and layer.activations and layer.outputs[0] not in outputs:
            same[layer.outputs[0]] = layer.inputs[0]
        else:
            result.append(layer)
    return result


def _joined(
    layers: list[Layer], weights: dict[str, torch.Tensor], shapes: Mapping[str, Shape], uses: Mapping[str, int]
) -> list[Layer]:
    """Turns MatMul of a matrix by a stored one, with the Add of a stored vector behind it, into Gemm."""
    readers = {name: layer for layer in layers for name in layer.inputs}
    gone: set[str] = set()
    result: list[Layer] = []
    for layer in layers:
        if layer.name in gone:
            continue
        if layer.op != "MatMul" or not is_weight_layer(layer) or not _is_matrix(layer, weights, shapes, uses):
            result.append(layer)
            continue
        weight = layer.inputs[1]
        weights[weight] = weights[weight].t().contiguous()
        inputs, outputs = layer.inputs, layer.outputs
        after = readers.get(outputs[0])
        if after is not None and after.op == "Add" and uses[outputs[0]] == 1:
            bias = [name for name in after.weights if weights[name].shape == weights[weight].shape[:1]]
            if bias:
                inputs, outputs = (*inputs, bias[0]), after.outputs
                gone.add(after.name)
        result.append(
            Layer(
                name=outputs[0],
                op="Gemm",
                inputs=inputs,
                outputs=outputs,
                weights=inputs[1:],
                attributes={"transB": 1},
            )
        )
    return result


def _is_matrix(
    layer: Layer, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], uses: Mapping[str, int]
) -> bool:
    """Whether both sides are matrices, and the stored one can be turned because nothing else reads it."""
    source, weight = layer.inputs[:2]
    return len(shapes[source]) == 2 and weights[weight].dim() == 2 and uses[weight] == 1


def _hard_swish(layer: Layer) -> list[Layer]:
    """Its two halves, which is what runtimes execute: in int8 each has a format of its own."""
    gate = f"{layer.outputs[0]}/gate"
    line: dict[str, Attribute] = {"alpha": 1 / 6, "beta": 0.5}
    return [
        Layer(name=gate, op="HardSigmoid", inputs=layer.inputs, outputs=(gate,), attributes=line),
        Layer(name=layer.name, op="Mul", inputs=(layer.inputs[0], gate), outputs=layer.outputs),
    ]


def _with_bias(layer: Layer, weights: dict[str, torch.Tensor]) -> Layer:
    if len(layer.inputs) > 2 and layer.inputs[2]:
        return layer
    weight = layer.inputs[1]
    bias = weight.removesuffix("weight") + "bias" if weight.endswith(".weight") else weight + "_bias"
    axis = 0 if layer.op == "Conv" or layer.attributes.get("transB") else 1
    size, dtype = weights[weight].shape[axis], weights[weight].dtype
    if bias not in weights:  # A module that runs twice has one bias too.
        weights[bias] = torch.zeros(size, dtype=dtype)
    return layer.model_copy(
        update={"inputs": (*layer.inputs[:2], bias), "weights": (*(w for w in layer.weights if w), bias)}
    )


def _is_global_pool(layer: Layer, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> bool:
    axes = weights[layer.inputs[1]].tolist() if len(layer.inputs) > 1 and layer.inputs[1] in weights else []
    return len(shapes[layer.inputs[0]]) == 4 and sorted(int(a) % 4 for a in axes) == [2, 3]


def _is_flatten(layer: Layer, shapes: Mapping[str, Shape]) -> bool:
    """Whether a Reshape keeps the batch and lays the rest out in one axis."""
    source, result = shapes[layer.inputs[0]], shapes[layer.outputs[0]]
    return source[0] == BATCH and len(source) > 2 and result == (BATCH, math.prod(source[1:]))


def _relative(layer: Layer, weights: dict[str, torch.Tensor], shapes: Mapping[str, Shape]) -> Layer:
    """A Reshape that says "as it was" (0) for axes that stay, so that it still holds when they shrink."""
    target, source = weights.get(layer.inputs[1]), shapes[layer.inputs[0]]
    if target is None or bool((target == 0).any()):
        return layer
    sizes = [0 if i < len(source) and size == source[i] else size for i, size in enumerate(target.tolist())]
    if sizes == target.tolist():
        return layer
    name = f"{layer.inputs[1]}/{layer.name}"
    weights[name] = torch.tensor(sizes, dtype=target.dtype)
    attributes = {key: value for key, value in layer.attributes.items() if key != "allowzero"}
    update = {"inputs": (layer.inputs[0], name), "weights": (name,), "attributes": attributes}
    return layer.model_copy(update=update)


def name_layers(layers: list[Layer]) -> list[Layer]:
    """Names weight layers after their module; a module used twice gets a suffix and is marked as shared.

    Another layer that happens to be called like one of these modules gets a suffix too: a name means one layer.
    """
    paths = [_path(layer) for layer in layers]
    owned = set(filter(None, paths))
    seen: dict[str, str] = {}
    result: list[Layer] = []
    for layer, path in zip(layers, paths, strict=True):
        if path is None and layer.name in owned:
            layer = layer.model_copy(update={"name": f"{layer.name}/{layer.op}"})
        if path is not None or is_weight_layer(layer):
            weight, name = weight_of(layer), path or layer.name
            if weight in seen:
                layer = layer.model_copy(update={"name": f"{name}/{len(result)}", "shared_with": (seen[weight],)})
            else:
                layer = layer.model_copy(update={"name": name})
                seen[weight] = name
            layer = layer.model_copy(update={"module_path": path})
        result.append(layer)
    return result


def _path(layer: Layer) -> str | None:
    """The module that owns a layer's weights; None where they are a bare parameter's, or it has none."""
    if not is_weight_layer(layer) and not is_embedding(layer):
        return None
    weight = weight_of(layer)
    return weight.removesuffix(".weight") if weight.endswith(".weight") else None
