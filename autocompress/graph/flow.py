"""Follows channels through a graph: which elements of which tensors must be kept or removed together.

Every stored or computed number bears a label, and operators are run on labels instead of numbers: a convolution makes
new ones, an activation hands them on, an Add ties those of its two sides, a Concat lines them up.  Labels that are tied
leave together (the dependency graph of DepGraph, 2301.12900, but read off the very graph that is deployed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from autocompress.graph.ops import OPERATORS
from autocompress.plan import Layer, ModelGraph, is_weight_layer

UNARY = frozenset({
    "Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Erf", "Sqrt", "Reciprocal", "Exp", "Log", "Neg", "Abs",
    "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Softplus", "Softsign", "Mish", "Identity", "Cast", "Floor",
    "Ceil", "Round", "Sin", "Cos",
})  # fmt: skip
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
MOVERS = frozenset({"Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand"})
PICKERS = frozenset({"Split", "Slice", "Gather", "Pad"})
REDUCERS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax"})

LARGEST_CONSTANT = 1 << 20
"""Stored tensors outside weight layers are followed up to this many elements; an embedding table is not."""


@dataclass(frozen=True)
class Place:
    """The labels along one axis of a stored tensor."""

    tensor: str
    axis: int
    role: Literal["out", "in", "through"]
    labels: torch.Tensor


class Flow:
    """Labels of a whole graph.

    Attributes:
        places: where labels stand in stored tensors.
        values: the labels of every floating activation, for a batch of one sample; integers as they are.
        classes: for each label, the number of the set of labels that leave together.
        frozen: for each class that cannot leave, the reason.
    """

    def __init__(self, graph: ModelGraph, weights: Mapping[str, torch.Tensor]) -> None:
        self.graph, self.weights = graph, weights
        self.places: list[Place] = []
        self._count = 0
        self._edges: list[torch.Tensor] = []
        self._reasons: dict[int, str] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._shared = {name for layer in graph.layers for name in layer.shared_with}
        self.values: dict[str, torch.Tensor] = {}
        for name in graph.inputs:
            tensor = graph.tensors[name]
            if tensor.dtype.startswith("float"):
                self.values[name] = self._fixed((1, *tensor.shape), "they are the model's input")
            else:
                self.values[name] = torch.zeros(1, *tensor.shape[1:], dtype=torch.int64)
        for layer in graph.layers:
            self._run(layer)
        for name in graph.outputs:
            self._freeze(self.values[name], "they are the model's output")
        self._place_constants()
        self.classes, self.frozen = self._resolve()

    # ------------------------------------------------------------------------------------------------ bookkeeping

    def _new(self, count: int) -> torch.Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _tie(self, a: torch.Tensor, b: torch.Tensor) -> None:
        a, b = narrowed(*torch.broadcast_tensors(a, b))  # type: ignore[no-untyped-call]
        pairs = torch.stack([a.flatten(), b.flatten()])
        self._edges.append(pairs[:, pairs[0] != pairs[1]])

    def _fixed(self, shape: tuple[int, ...], reason: str) -> torch.Tensor:
        label = self._new(1)
        self._reasons[int(label)] = reason
        return label.expand(shape)

    def _freeze(self, labels: torch.Tensor, reason: str) -> None:
        self._tie(labels, self._fixed((1,), reason))

    def _resolve(self) -> tuple[np.ndarray, dict[int, str]]:
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self._edges], dim=1).numpy()
        matrix = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), (self._count, self._count))
        _, classes = connected_components(matrix, directed=False)
        frozen: dict[int, str] = {}
        for label, reason in self._reasons.items():
            frozen.setdefault(int(classes[label]), reason)
        return classes, frozen

    def _place_constants(self) -> None:
        """Notes along which axis each stored tensor outside weight layers carries channels."""
        if not self._constants:
            return
        classes, frozen = self._resolve()
        for name, labels in self._constants.items():
            found = torch.from_numpy(classes[labels.numpy()])
            axes = varying_axes(found)
            if len(axes) == 1:
                self.places.append(Place(name, axes[0], "through", along_axis(labels, axes[0])))
            elif axes and not set(found.flatten().tolist()) <= frozen.keys():
                self._freeze(labels, f"{name} holds them along more than one axis")

    # -------------------------------------------------------------------------------------------------- operators

    def _run(self, layer: Layer) -> None:
        dtypes = [self.graph.tensors[name].dtype for name in layer.outputs if name]
        if not all(dtype.startswith("float") for dtype in dtypes):
            self._integers(layer)
        elif is_weight_layer(layer):
            self._weight_layer(layer)
        elif layer.op in UNARY and self._is_float(layer.inputs[0]):
            self._set(layer, self._labels(layer.inputs[0]))
        elif layer.op in BINARY or layer.op == "Where":
            sides = [name for name in layer.inputs if self._is_float(name)]
            result = self._labels(sides[0])
            for side in sides[1:]:
                result = self._joined(result, self._labels(side))
            self._set(layer, result)
        elif layer.op in POOLS:
            labels = self._channels(self._labels(layer.inputs[0]), 1)
            shape = self._shapes(layer)[0]
            self._set(layer, labels.reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape))
        elif layer.op == "BatchNormalization":
            labels = self._channels(self._labels(layer.inputs[0]), 1)
            self.places += [Place(name, 0, "through", labels) for name in layer.weights]
            self._set(layer, self._labels(layer.inputs[0]))
        elif layer.op == "LayerNormalization":
            labels = self._labels(layer.inputs[0])
            for name in layer.weights:
                labels = self._joined(labels, self._labels(name))
            self._set(layer, labels)
        elif layer.op in ("Softmax", "LogSoftmax"):
            labels = self._labels(layer.inputs[0])
            axis = int(layer.attributes.get("axis", -1)) % labels.dim()  # type: ignore[arg-type]
            self._freeze_along(labels, [axis], f"{layer.name} normalises over them")
            self._set(layer, labels)
        elif layer.op in (*MOVERS, *PICKERS, *REDUCERS, "Concat"):
            self._moved(layer)
        else:
            self._opaque(layer)

    def _weight_layer(self, layer: Layer) -> None:
        weight = self.graph.tensors[layer.inputs[1]].shape
        x = self._labels(layer.inputs[0])
        convolution = layer.op == "Conv"
        out_axis = 0 if convolution or (layer.op == "Gemm" and layer.attributes.get("transB")) else 1
        axis = 1 if convolution else x.dim() - 1
        groups = int(layer.attributes.get("group", 1)) if convolution else 1  # type: ignore[arg-type]
        if not convolution and (layer.attributes.get("transA") or len(weight) != 2):
            self._opaque(layer)
            return
        read, made = self._channels(x, axis), self._new(weight[out_axis])
        if groups > 1:
            # A grouped convolution can only lose whole groups: all that one reads and all that it makes.
            blocks = read.view(groups, -1)
            self._tie(blocks, blocks[:, :1])
            self._tie(made.view(groups, -1), blocks[:, :1])
        role: Literal["out", "through"] = "through" if groups > 1 else "out"
        self.places.append(Place(layer.inputs[1], out_axis, role, made))
        self.places += [Place(name, 0, role, made) for name in layer.inputs[2:3] if name in layer.weights]
        if groups == 1:
            self.places.append(Place(layer.inputs[1], 1 - out_axis, "in", read))
        if layer.shared_with or layer.name in self._shared:
            self._freeze(made, "its weights are used more than once")
            self._freeze(read, f"{layer.name}, which reads them, is used more than once")
        shape = self._shapes(layer)[0]
        ones = (1,) * (len(shape) - axis - 1)
        self._set(layer, made.view(-1, *ones).expand(shape))

    def _moved(self, layer: Layer) -> None:
        """Operators that only move or pick values are run on the labels themselves."""
        if not self._is_float(layer.inputs[0]) or any(
            self._is_float(n) for n in layer.inputs[1:] if layer.op != "Concat"
        ):
            self._opaque(layer)
            return
        labels = [self._labels(name) for name in layer.inputs if name and self._is_float(name)]
        others = [self.values.get(n, self.weights.get(n)) if n else None for n in layer.inputs[len(labels) :]]
        x = labels[0]
        if layer.op == "Concat":
            axis = int(layer.attributes["axis"]) % x.dim()  # type: ignore[arg-type]
            size = sum(part.shape[axis] for part in labels)
            shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
            parts = narrowed(*labels, but=axis)
            self._set(layer, torch.cat(parts, axis).expand(shape))
            return
        if layer.op in ("Split", "Gather"):
            default = 0
            axes = [int(layer.attributes.get("axis", default)) % x.dim()]  # type: ignore[arg-type]
        elif layer.op == "Slice":
            axes = (
                [int(a) % x.dim() for a in others[2]] if others[2:] and others[2] is not None else list(range(x.dim()))
            )
        elif layer.op == "Pad":
            out = self._shapes(layer)[0]
            axes = [axis for axis in range(x.dim()) if out[axis] != x.shape[axis]]
        elif layer.op in REDUCERS:
            given = others[0] if others and others[0] is not None else layer.attributes.get("axes", ())
            axes = [int(a) % x.dim() for a in given] or list(range(x.dim()))  # type: ignore[union-attr]
        else:
            axes = []
        self._freeze_along(x, axes, f"{layer.name} ({layer.op}) picks among them or sums over them")
        if layer.op in REDUCERS:
            keep = bool(layer.attributes.get("keepdims", 1))
            for axis in sorted(axes, reverse=True):
                x = x.narrow(axis, 0, 1) if keep else x.select(axis, 0)
            self._set(layer, x)
        elif layer.op == "Pad":
            for axis in axes:
                x = x.narrow(axis, 0, 1)
            self._set(layer, x.expand(self._shapes(layer)[0]))
        else:
            self._set(layer, OPERATORS[layer.op](layer.attributes, x, *others))

    def _joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Labels of an elementwise operator of two sides; what is broadcast over channels leaves them alone."""
        dims = max(a.dim(), b.dim())
        a, b = (x.reshape((1,) * (dims - x.dim()) + x.shape) for x in (a, b))
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        varying_a, varying_b = set(varying_axes(a)), set(varying_axes(b))
        broadcast = any(1 in (a.shape[axis], b.shape[axis]) and shape[axis] > 1 for axis in varying_a | varying_b)
        if broadcast and not varying_a & varying_b:
            wider = a if a.numel() >= b.numel() else b
            return wider.expand(shape)
        if varying_a or varying_b:
            self._tie(a, b)
        else:
            self._tie(a[(0,) * dims], b[(0,) * dims])
        return (a if varying_a else b).expand(shape)

    def _integers(self, layer: Layer) -> None:
        """Shapes and indices are computed as they are, for one sample."""
        arguments = [self._argument(name, meta=False) for name in layer.inputs]
        self._set(layer, OPERATORS[layer.op](layer.attributes, *arguments))

    def _opaque(self, layer: Layer) -> None:
        """An operator whose channels are not understood: they stay as they are on both sides."""
        reason = f"{layer.name} ({layer.op}) needs them all"
        for name in layer.inputs:
            if name in self.values and self._is_float(name):
                self._freeze(self.values[name], reason)
        for name, shape in zip(layer.outputs, self._shapes(layer), strict=False):
            self.values[name] = self._fixed(shape, reason)

    # ---------------------------------------------------------------------------------------------------- helpers

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.graph.tensors[name].dtype.startswith("float")

    def _labels(self, name: str) -> torch.Tensor:
        if name in self.values:
            return self.values[name]
        if name not in self._constants:
            shape = self.graph.tensors[name].shape
            count = self.graph.tensors[name].elements
            if count > LARGEST_CONSTANT or count == 1:
                return self._fixed(shape, f"{name} is read as a whole") if count > 1 else self._new(1).view(shape)
            self._constants[name] = self._new(count).view(shape)
        return self._constants[name]

    def _set(self, layer: Layer, labels: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        for name, value in zip(layer.outputs, labels if isinstance(labels, tuple) else (labels,), strict=False):
            self.values[name] = value

    def _channels(self, labels: torch.Tensor, axis: int) -> torch.Tensor:
        """The labels along an axis; a reader shares its weights among positions, so those of all positions are tied."""
        vector = along_axis(labels, axis)
        spread = vector.view(-1, *(1,) * (labels.dim() - axis - 1))
        (narrow,) = narrowed(labels, but=axis)
        if narrow.numel() != vector.numel():
            self._tie(labels, spread)
        return vector

    def _freeze_along(self, labels: torch.Tensor, axes: list[int], reason: str) -> None:
        if set(axes) & set(varying_axes(labels)):
            self._freeze(labels, reason)

    def _argument(self, name: str, meta: bool) -> torch.Tensor | None:
        if not name:
            return None
        value = self.values.get(name, self.weights.get(name))
        assert value is not None
        if meta and self._is_float(name) and value.dim() > 0:
            return torch.empty(value.shape, device="meta")
        return value

    def _shapes(self, layer: Layer) -> list[tuple[int, ...]]:
        """The shapes an operator gives, one sample at a time."""
        arguments = [self._argument(name, meta=True) for name in layer.inputs]
        result = OPERATORS[layer.op](layer.attributes, *arguments)
        return [tuple(value.shape) for value in (result if isinstance(result, tuple) else (result,))]


def narrowed(*labels: torch.Tensor, but: int = -1) -> tuple[torch.Tensor, ...]:
    """Tensors that only repeat themselves along an axis, all of them, with one element there."""
    for axis in range(labels[0].dim()):
        if axis != but and all(x.stride(axis) == 0 or x.shape[axis] == 1 for x in labels):
            labels = tuple(x.narrow(axis, 0, 1) for x in labels)
    return labels


def varying_axes(labels: torch.Tensor) -> list[int]:
    """The axes along which labels differ."""
    (narrow,) = narrowed(labels)
    return [a for a in range(narrow.dim()) if narrow.shape[a] > 1 and bool((narrow != narrow.narrow(a, 0, 1)).any())]


def along_axis(labels: torch.Tensor, axis: int) -> torch.Tensor:
    """The first vector along an axis."""
    return labels[tuple(slice(None) if a == axis else 0 for a in range(labels.dim()))]
