"""Small model graphs made by hand, with random weights: what export and runtime tests run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import activation_formats, affine_parameters, weight_axis
from autocompress.methods.rounding_formats import round_to_format
from autocompress.methods.statistics import from_matrix, weight_matrix
from autocompress.plan import Attribute, CompressionPlan, Layer, LayerPlan, ModelGraph, Tensor


@dataclass
class GraphMaker:
    """Appends layers in ONNX terms and keeps shapes and weights as it goes."""

    seed: int = 0
    layers: list[Layer] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        self.tensors[name] = Tensor(id=name, shape=shape)
        return name

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights[name] = torch.from_numpy(values)
        self.tensors[name] = Tensor(id=name, shape=values.shape, dtype=str(values.dtype))
        return name

    def op(
        self,
        op: str,
        inputs: tuple[str, ...],
        output: str,
        shape: tuple[int, ...],
        name: str = "",
        **attributes: Attribute,
    ) -> str:
        self.tensors[output] = Tensor(id=output, shape=shape)
        self.layers.append(
            Layer(
                name=name or output,
                op=op,
                inputs=inputs,
                outputs=(output,),
                weights=tuple(i for i in inputs if i in self.weights),
                attributes=attributes,
                module_path=name or None,
            )
        )
        return output

    def conv(self, source: str, out: int, name: str, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        channels, height, width = self.tensors[source].shape
        fan_in = channels // group * kernel * kernel
        values = self.rng.standard_normal((out, channels // group, kernel, kernel)) * (2 / fan_in) ** 0.5
        weight = self.weight(f"{name}.weight", values.astype(np.float32))
        bias = self.weight(f"{name}.bias", (self.rng.standard_normal(out) * 0.1).astype(np.float32))
        attributes: dict[str, Attribute] = {}
        if kernel > 1:
            attributes["pads"] = (kernel // 2,) * 4
        if stride > 1:
            attributes["strides"] = (stride, stride)
        if group > 1:
            attributes["group"] = group
        size = tuple((s + 2 * (kernel // 2) - kernel) // stride + 1 for s in (height, width))
        return self.op("Conv", (source, weight, bias), f"{name}_out", (out, *size), name=name, **attributes)

    def relu(self, source: str) -> str:
        return self.op("Relu", (source,), f"{source}_relu", self.tensors[source].shape)

    def add(self, first: str, second: str, name: str) -> str:
        return self.op("Add", (first, second), name, self.tensors[first].shape)

    def max_pool(self, source: str, name: str) -> str:
        channels, height, width = self.tensors[source].shape
        shape = (channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
        window: dict[str, Attribute] = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
        return self.op("MaxPool", (source,), name, shape, **window)

    def head(self, source: str, classes: int, output: str) -> str:
        channels = self.tensors[source].shape[0]
        pooled = self.op("GlobalAveragePool", (source,), "pooled", (channels, 1, 1))
        flat = self.op("Flatten", (pooled,), "flat", (channels,))
        return self.gemm(flat, classes, "fc", output)

    def gemm(self, source: str, out: int, name: str, output: str = "") -> str:
        (features,) = self.tensors[source].shape
        values = self.rng.standard_normal((out, features)) * features**-0.5
        weight = self.weight(f"{name}.weight", values.astype(np.float32))
        bias = self.weight(f"{name}.bias", (self.rng.standard_normal(out) * 0.1).astype(np.float32))
        return self.op("Gemm", (source, weight, bias), output or f"{name}_out", (out,), name=name, transB=1)

    def matmul(self, source: str, out: int, name: str) -> str:
        *rows, features = self.tensors[source].shape
        values = self.rng.standard_normal((features, out)) * features**-0.5
        weight = self.weight(f"{name}.weight", values.astype(np.float32))
        return self.op("MatMul", (source, weight), f"{name}_out", (*rows, out), name=name)

    def build(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ModelGraph:
        return ModelGraph(layers=tuple(self.layers), tensors=self.tensors, inputs=inputs, outputs=outputs)


def resnet(
    widths: tuple[int, ...] = (16, 32, 64), blocks: int = 3, size: int = 28, stem_pool: bool = False, seed: int = 0
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """A CIFAR ResNet: ``blocks=3`` is ResNet-20, ``blocks=1`` ResNet-8."""
    maker = GraphMaker(seed)
    x = maker.relu(maker.conv(maker.input("image", (1, size, size)), widths[0], "conv1"))
    if stem_pool:
        x = maker.max_pool(x, "stem_pool")
    channels = widths[0]
    for stage, width in enumerate(widths, start=1):
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = maker.relu(maker.conv(x, width, f"{path}.conv1", stride=stride))
            y = maker.conv(y, width, f"{path}.conv2")
            if stride > 1 or channels != width:
                x = maker.conv(x, width, f"{path}.downsample", kernel=1, stride=stride)
            x = maker.relu(maker.add(y, x, f"{path}.add"))
            channels = width
    maker.head(x, 10, "logits")
    return maker.build(("image",), ("logits",)), maker.weights


def evaluate(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    compressed: CompressedModel | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of a graph with one input, in float64; with ``compressed`` activations are rounded to their grid."""
    functional = torch.nn.functional

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        if compressed is None or name not in compressed.plan.activations:
            return value
        scale, zero = affine_parameters(*compressed.ranges[name])
        return (torch.clamp(torch.round(value / scale) + zero, 0, 255) - zero) * scale

    values = {graph.inputs[0]: stored(graph.inputs[0], inputs.double())}
    for layer in graph.layers:
        args = [values[i] if i in values else weights[i].double() for i in layer.inputs]
        at = layer.attributes
        if layer.op == "Conv":
            pads: Any = at.get("pads", (0,) * 4)
            strides: Any = at.get("strides", (1, 1))
            group: Any = at.get("group", 1)
            out = functional.conv2d(args[0], args[1], args[2], strides, pads[:2], groups=group)
        elif layer.op == "Gemm":
            out = functional.linear(args[0], args[1], args[2])
        elif layer.op == "MatMul":
            out = args[0] @ args[1]
        elif layer.op == "Relu":
            out = functional.relu(args[0])
        elif layer.op == "Clip":
            out = torch.clamp(args[0], args[1], args[2])
        elif layer.op == "Add":
            out = args[0] + args[1]
        elif layer.op == "Concat":
            out = torch.cat(args, dim=1)
        elif layer.op == "MaxPool":
            out = functional.max_pool2d(args[0], 3, 2, 1)
        elif layer.op == "GlobalAveragePool":
            out = args[0].mean((2, 3), keepdim=True)
        elif layer.op == "Flatten":
            out = args[0].flatten(1)
        else:
            raise NotImplementedError(layer.op)
        values[layer.outputs[0]] = stored(layer.outputs[0], out)
    return values


def compress(
    graph: ModelGraph, weights: Mapping[str, torch.Tensor], layers: Mapping[str, LayerPlan], samples: int = 8
) -> CompressedModel:
    """Round-to-nearest weights, min-max ranges over random inputs, and the formats the project's rule gives."""
    generator = torch.Generator().manual_seed(1)
    calibration = torch.rand((samples, *graph.tensors[graph.inputs[0]].shape), generator=generator)
    values = evaluate(graph, weights, calibration)
    rounded, scales = dict(weights), {}
    for name, plan in layers.items():
        layer = graph.by_name[name]
        weight, axis = weights[layer.inputs[1]], weight_axis(layer)
        if plan.storage.scheme != "affine" or plan.storage.granularity == "block":
            matrix, scale = round_to_format(weight_matrix(layer, weight).contiguous(), plan.storage)
            rounded[layer.inputs[1]] = from_matrix(layer, matrix, weight.shape).contiguous()
            scales |= {} if scale is None else {name: scale}
            continue
        dims = [d for d in range(weight.dim()) if d != axis]
        top = 2 ** (plan.storage.bits - 1) - 1
        scale = (weight.abs().amax(dims) / top).clamp_min(1e-8)
        shape = [-1 if d == axis else 1 for d in range(weight.dim())]
        scales[name] = scale
        rounded[layer.inputs[1]] = (weight / scale.view(shape)).round().clamp(-top, top) * scale.view(shape)
    formats = activation_formats(graph, layers)
    ranges = {name: (float(values[name].min()), float(values[name].max())) for name in formats}
    plan = CompressionPlan(layers=dict(layers), activations=formats)
    return CompressedModel(graph=graph, weights=rounded, plan=plan, weight_scales=scales, ranges=ranges)
