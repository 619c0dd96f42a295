"""Models with random weights, made to be timed: chains in the families people deploy, of random widths and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import activation_formats, weight_axis
from autocompress.methods.rounding_formats import round_to_format
from autocompress.methods.statistics import from_matrix, weight_matrix
from autocompress.plan import (
    INT8_WEIGHT,
    Attribute,
    CompressionPlan,
    Layer,
    LayerPlan,
    ModelGraph,
    Tensor,
)  # fmt: skip

INT8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
_POSITIVE = frozenset({"Relu", "Clip"})
_KEEPS_SIGN = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape"})


@dataclass
class GraphMaker:
    """Builds a ``ModelGraph`` layer by layer."""

    layers: list[Layer] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        self.tensors[name] = Tensor(id=name, shape=shape, dtype=dtype)
        return name

    def op(self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], **attributes: Attribute) -> str:
        out = self.tensor(f"{op.lower()}_{len(self.layers)}", shape)
        self.layers.append(Layer(name=out, op=op, inputs=inputs, outputs=(out,), attributes=attributes))
        return out

    def conv(self, source: str, outputs: int, window: int = 3, stride: int = 1, depthwise: bool = False) -> str:
        inputs, height, width = self.tensors[source].shape
        name, pad = f"conv_{len(self.layers)}", window // 2
        weight = self.tensor(f"{name}.weight", (outputs, 1 if depthwise else inputs, window, window))
        bias = self.tensor(f"{name}.bias", (outputs,))
        size = tuple((s + 2 * pad - window) // stride + 1 for s in (height, width))
        attributes: dict[str, Attribute] = {}
        if pad:
            attributes["pads"] = (pad,) * 4
        if stride > 1:
            attributes["strides"] = (stride, stride)
        if depthwise:
            attributes["group"] = outputs
        out = self.tensor(f"{name}.out", (outputs, *size))
        self.layers.append(
            Layer(
                name=name, op="Conv", inputs=(source, weight, bias), outputs=(out,), weights=(weight, bias),
                attributes=attributes, module_path=name,
            )
        )  # fmt: skip
        return out

    def gemm(self, source: str, outputs: int) -> str:
        *rows, inputs = self.tensors[source].shape
        name = f"gemm_{len(self.layers)}"
        weight, bias = self.tensor(f"{name}.weight", (outputs, inputs)), self.tensor(f"{name}.bias", (outputs,))
        out = self.tensor(f"{name}.out", (*rows, outputs))
        self.layers.append(
            Layer(
                name=name, op="Gemm", inputs=(source, weight, bias), outputs=(out,), weights=(weight, bias),
                attributes={"transB": 1}, module_path=name,
            )
        )  # fmt: skip
        return out

    def matmul(self, source: str, outputs: int) -> str:
        *rows, inputs = self.tensors[source].shape
        name = f"matmul_{len(self.layers)}"
        weight, out = self.tensor(f"{name}.weight", (inputs, outputs)), self.tensor(f"{name}.out", (*rows, outputs))
        self.layers.append(
            Layer(
                name=name, op="MatMul", inputs=(source, weight), outputs=(out,), weights=(weight,), module_path=name
            )
        )  # fmt: skip
        return out

    def norm(self, source: str, op: str = "LayerNormalization") -> str:
        """A layer norm over the last axis, or a batch norm over the first."""
        shape = self.tensors[source].shape
        count = 4 if op == "BatchNormalization" else 2
        name = f"norm_{len(self.layers)}"
        size = shape[0] if op == "BatchNormalization" else shape[-1]
        weights = tuple(self.tensor(f"{name}.{index}", (size,)) for index in range(count))
        out = self.tensor(f"{name}.out", shape)
        self.layers.append(Layer(name=name, op=op, inputs=(source, *weights), outputs=(out,), weights=weights))
        return out

    def bias(self, source: str, op: str = "Add") -> str:
        """The tensor plus a vector, or times one number (``Mul``)."""
        shape = self.tensors[source].shape
        name = f"{op.lower()}_{len(self.layers)}"
        weight, out = self.tensor(f"{name}.weight", shape[-1:] if op == "Add" else ()), self.tensor(name, shape)
        self.layers.append(Layer(name=name, op=op, inputs=(source, weight), outputs=(out,), weights=(weight,)))
        return out

    def reshape(self, source: str, shape: tuple[int, ...]) -> str:
        name = f"reshape_{len(self.layers)}"
        target = self.tensor(f"{name}.shape", (len(shape) + 1,), "int64")
        out = self.tensor(name, shape)
        self.layers.append(
            Layer(name=name, op="Reshape", inputs=(source, target), outputs=(out,), weights=(target,))
        )  # fmt: skip
        return out

    def transpose(self, source: str, order: tuple[int, ...]) -> str:
        shape = self.tensors[source].shape
        return self.op("Transpose", (source,), tuple(shape[axis - 1] for axis in order[1:]), perm=order)

    def swish(self, source: str) -> str:
        return self.multiply(source, self.op("Sigmoid", (source,), self.tensors[source].shape))

    def multiply(self, first: str, second: str) -> str:
        return self.op("Mul", (first, second), self.tensors[first].shape)

    def product(self, first: str, second: str) -> str:
        """Of two activations."""
        return self.op(
            "MatMul", (first, second), (*self.tensors[first].shape[:-1], self.tensors[second].shape[-1])
        )  # fmt: skip

    def relu(self, source: str) -> str:
        return self.op("Relu", (source,), self.tensors[source].shape)

    def clip(self, source: str) -> str:
        shape = self.tensors[source].shape
        out = self.tensor(f"clip_{len(self.layers)}", shape)
        low, high = self.tensor(f"{out}.low", ()), self.tensor(f"{out}.high", ())
        self.layers.append(Layer(name=out, op="Clip", inputs=(source, low, high), outputs=(out,), weights=(low, high)))
        return out

    def pool(self, source: str, window: int, stride: int, op: str = "MaxPool") -> str:
        channels, *sizes = self.tensors[source].shape
        pad = (window - 1) // 2
        shape = (channels, *((s + 2 * pad - window) // stride + 1 for s in sizes))
        attributes: dict[str, Attribute] = {"kernel_shape": (window, window), "strides": (stride, stride)}
        if pad:
            attributes["pads"] = (pad,) * 4
        return self.op(op, (source,), shape, **attributes)

    def add(self, first: str, second: str) -> str:
        return self.op("Add", (first, second), self.tensors[first].shape)

    def concat(self, first: str, second: str) -> str:
        a, b = self.tensors[first].shape, self.tensors[second].shape
        return self.op("Concat", (first, second), (a[0] + b[0], *a[1:]), axis=1)

    def head(self, source: str, classes: int) -> str:
        channels = self.tensors[source].shape[0]
        pooled = self.op("GlobalAveragePool", (source,), (channels, 1, 1))
        return self.gemm(self.op("Flatten", (pooled,), (channels,)), classes)

    def build(self, output: str) -> ModelGraph:
        return ModelGraph(layers=tuple(self.layers), tensors=self.tensors, inputs=("input",), outputs=(output,))


def _width(rng: np.random.Generator, low: int, high: int, odd: bool = False) -> int:
    """A channel count, even over its logarithm: mostly on the grids pruning keeps to, some multiples of 4, few off."""
    step = int(rng.choice([4, 8, 16, 16, 3 if odd else 8]))
    value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return max(step, round(value / step) * step)


def residual_net(
    rng: np.random.Generator, size: int, widths: tuple[int, int], blocks: int = 2, odd: bool = False
) -> ModelGraph:
    """Basic blocks with shortcuts, as small ResNets have; above 64 pixels a strided stem and a pool come first."""
    make = GraphMaker()
    x = make.tensor("input", (int(rng.choice([1, 3, 3])), size, size))
    width = _width(rng, *widths, odd)
    large = size > 64
    x = make.relu(make.conv(x, width, 7 if large else 3, 2 if large else 1))
    if large:
        x = make.pool(x, 3, 2)
    for stage in range(3):
        if stage:
            width = _width(rng, width, max(width + 16, 2 * width), odd)
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            inner = _width(rng, max(4, width // 2), width + 4, odd)
            y = make.relu(make.conv(x, inner, 3, stride))
            y = make.conv(y, width, 3)
            if stride > 1 or make.tensors[x].shape[0] != width:
                x = make.conv(x, width, 1, stride)
            x = make.relu(make.add(y, x))
    return make.build(make.head(x, int(rng.choice([10, 100, 1000]))))


def inverted_net(
    rng: np.random.Generator, size: int, widths: tuple[int, int], blocks: int = 5, odd: bool = False
) -> ModelGraph:
    """Inverted residuals: pointwise, depthwise, pointwise, as MobileNets have; every third with gates and Swish."""
    make = GraphMaker()
    gated = rng.random() < 1 / 3
    act = make.swish if gated else make.clip
    x = make.tensor("input", (3, size, size))
    width = _width(rng, *widths, odd)
    x = act(make.conv(x, width, 3, 2 if size > 64 else 1))
    for block in range(blocks):
        stride = 2 if block % 2 else 1
        target = _width(rng, width, 2 * width, odd) if stride > 1 else width
        hidden = _width(rng, 2 * width, 6 * width, odd)
        y = act(make.conv(x, hidden, 1))
        y = act(make.conv(y, hidden, 3, stride, depthwise=True))
        if gated and block % 2:
            pooled = make.op("GlobalAveragePool", (y,), (hidden, 1, 1))
            squeezed = make.swish(make.conv(pooled, max(4, hidden // 16), 1))
            gate = make.conv(squeezed, hidden, 1)
            y = make.multiply(y, make.op("Sigmoid", (gate,), make.tensors[gate].shape))
        y = make.conv(y, target, 1)
        x = make.add(x, y) if stride == 1 else y
        width = target
    x = act(make.conv(x, _width(rng, 2 * width, 4 * width, odd), 1))
    return make.build(make.head(x, int(rng.choice([10, 100, 1000]))))


def plain_net(
    rng: np.random.Generator, size: int, widths: tuple[int, int], blocks: int = 3, odd: bool = False
) -> ModelGraph:
    """Convolutions and poolings in a row, then fully connected layers; some with a concatenation."""
    make = GraphMaker()
    x = make.tensor("input", (int(rng.choice([1, 3])), size, size))
    width = _width(rng, *widths, odd)
    for block in range(blocks):
        x = make.relu(make.conv(x, width, int(rng.choice([3, 3, 5]))))
        if block == 1 and rng.random() < 0.5:
            branch = make.relu(make.conv(x, _width(rng, 8, 64), 1))
            x = make.concat(x, branch)
        if make.tensors[x].shape[1] > 4:
            x = make.pool(x, 2, 2, "AveragePool" if block == 2 else "MaxPool")
        width = _width(rng, width, 2 * width, odd)
    shape = make.tensors[x].shape
    flat = make.op("Flatten", (x,), (shape[0] * shape[1] * shape[2],))
    hidden = make.relu(make.gemm(flat, int(rng.choice([32, 84, 128, 256]))))
    return make.build(make.gemm(hidden, 10))


def odd_net(rng: np.random.Generator, size: int, widths: tuple[int, int], odd: bool = True) -> ModelGraph:
    """Channel counts off every grid, branches and a pool behind them: the kernels that other families rarely run."""
    make = GraphMaker()
    x = make.tensor("input", (3, size, size))
    width = 6 * int(rng.integers(max(3, widths[0] // 6), max(4, widths[1] // 6))) // 2 * 2 + (2 if odd else 0)
    x = make.relu(make.conv(x, width + (width % 4 == 0) * 2))
    width = make.tensors[x].shape[0]
    y = make.clip(make.conv(x, width, 3, 1, depthwise=True))
    z = make.relu(make.conv(y, 16 * int(rng.integers(1, 3)), 3))
    joined = make.concat(z, make.relu(make.conv(x, 16, 1)))
    if rng.random() < 0.5:
        joined = make.relu(make.norm(joined, "BatchNormalization"))
    pooled = make.pool(joined, 2, 2)
    few = make.relu(make.conv(pooled, int(rng.choice([6, 8, 12])), 1))
    wide = make.relu(make.conv(few, 16 * int(rng.integers(2, 5)), 1))
    return make.build(make.head(make.pool(make.relu(make.conv(wide, 48, 3)), 3, 2), 10))


def token_net(rng: np.random.Generator, size: int, widths: tuple[int, int], odd: bool = False) -> ModelGraph:
    """Matrix products over ``size`` tokens, as the perceptrons of transformers have."""
    make = GraphMaker()
    width = _width(rng, *widths, odd)
    x = make.tensor("input", (size, width))
    for _ in range(2):
        x = make.matmul(make.relu(make.matmul(x, 4 * width)), width)
    return make.build(make.relu(x))


def encoder_net(rng: np.random.Generator, size: int, widths: tuple[int, int], odd: bool = False) -> ModelGraph:
    """Transformer encoder blocks over ``size`` tokens: attention and a perceptron, a norm before or behind each."""
    make = GraphMaker()
    heads = int(rng.choice([2, 4, 6]))
    width = heads * int(rng.choice([d for d in (32, 64) if heads * d >= widths[0]] or [64]))
    first = rng.random() < 0.5
    x = make.tensor("input", (size, width))
    for _ in range(2):
        y = make.norm(x) if first else x
        parts = [make.bias(make.matmul(y, width)) for _ in range(3)]
        split = [make.reshape(part, (size, heads, width // heads)) for part in parts]
        query, value = (make.transpose(part, (0, 2, 1, 3)) for part in split[::2])
        key = make.transpose(split[1], (0, 2, 3, 1))
        scores = make.product(make.bias(query, "Mul"), key)
        mixed = make.product(make.op("Softmax", (scores,), make.tensors[scores].shape, axis=-1), value)
        joined = make.reshape(make.transpose(mixed, (0, 2, 1, 3)), (size, width))
        # As torch exports its attention: a fully connected layer over all tokens in a row.
        rows = make.op("Flatten", (joined,), (size, width), axis=2)
        x = make.add(x, make.reshape(make.gemm(rows, width), (size, width)))
        x = y = make.norm(x) if not first else x
        hidden = make.bias(make.matmul(make.norm(y) if first else y, int(rng.choice([1, 2, 4])) * width))
        hidden = make.op("Gelu", (hidden,), make.tensors[hidden].shape)
        x = make.add(x, make.bias(make.matmul(hidden, width)))
        x = x if first else make.norm(x)
    return make.build(make.norm(x) if first else x)


def joined_net(rng: np.random.Generator, size: int, widths: tuple[int, int]) -> ModelGraph:
    """Residual additions that a layer norm alone reads, and changes of the number format on the way."""
    make = GraphMaker()
    width = _width(rng, *widths)
    x = make.tensor("input", (size, width))
    for _ in range(3):
        x = make.norm(make.add(x, make.matmul(x, width)))
        half = make.op("Cast", (x,), make.tensors[x].shape, to=10)
        x = make.op("Cast", (half,), make.tensors[x].shape, to=1)
    return make.build(x)


def heavy_net(channels: int, depth: int, size: int = 6) -> ModelGraph:
    """Wide convolutions on small images: almost nothing but weights, which outgrow the caches as depth grows."""
    make = GraphMaker()
    x = make.tensor("input", (channels, size, size))
    for _ in range(depth):
        x = make.relu(make.conv(x, channels, 3))
    return make.build(make.head(x, 10))


def random_formats(graph: ModelGraph, rng: np.random.Generator, style: str) -> dict[str, LayerPlan]:
    """``fp32``, ``int8``, ``mixed`` (each layer by chance) or ``runs`` (stretches of one type)."""
    names = [layer.name for layer in graph.compressible]
    if style == "fp32":
        return {}
    if style == "int8":
        return dict.fromkeys(names, INT8)
    if style == "mixed":
        return {name: INT8 for name in names if rng.random() < 0.5}
    chosen, current = {}, bool(rng.random() < 0.5)
    for name in names:
        if rng.random() < 0.25:
            current = not current
        if current:
            chosen[name] = INT8
    return chosen


def with_ranges(
    graph: ModelGraph, plan: CompressionPlan, weights: Mapping[str, torch.Tensor], rng: np.random.Generator
) -> CompressedModel:
    """A compressed model fit for timing and sizing: largest-value weight scales, made-up activation ranges.

    ``plan.groups`` must already be carried out in ``graph`` and ``weights``.  No two ranges are equal, as in a real
    artifact, because the exporter stores equal scales once.
    """
    formats = activation_formats(graph, plan.layers)
    scales: dict[str, torch.Tensor] = {}
    for layer in graph.compressible:
        layer_plan = plan.layers.get(layer.name)
        if layer_plan is None:
            continue
        if layer_plan.storage.scheme != "affine" or layer_plan.storage.granularity == "block":
            given = weights[layer.inputs[1]]
            rounded, found = round_to_format(weight_matrix(layer, given).float().contiguous(), layer_plan.storage)
            weights = {**weights, layer.inputs[1]: from_matrix(layer, rounded, given.shape).contiguous()}
            scales |= {} if found is None else {layer.name: found}
            continue
        weight, axis = weights[layer.inputs[1]].detach().float(), weight_axis(layer)
        others = [d for d in range(weight.dim()) if d != axis]
        scales[layer.name] = (weight.abs().amax(others) / (2 ** (layer_plan.storage.bits - 1) - 1)).clamp_min(1e-8)
    positive: set[str] = set()
    for layer in graph.layers:
        if layer.op in _POSITIVE or (layer.op in _KEEPS_SIGN and layer.inputs[0] in positive):
            positive.update(layer.outputs)
    ranges = {}
    for tensor in formats:
        high = float(rng.uniform(2.0, 6.0))
        ranges[tensor] = (0.0 if tensor in positive else -high * float(rng.uniform(0.5, 1.0)), high)
    made = plan.model_copy(update={"activations": formats})
    return CompressedModel(graph=graph, weights=weights, plan=made, weight_scales=scales, ranges=ranges)


def random_weights(graph: ModelGraph, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Normal weights of every stored float; Clip bounds are 0 and 6."""
    weights: dict[str, torch.Tensor] = {}
    for layer in graph.layers:
        for position, name in enumerate(layer.inputs):
            if name not in layer.weights or name in weights:
                continue
            shape = graph.tensors[name].shape
            if layer.op == "Clip":
                weights[name] = torch.tensor(0.0 if position == 1 else 6.0)
            elif layer.op == "Reshape":
                weights[name] = torch.tensor([-1, *graph.tensors[layer.outputs[0]].shape])
            else:
                fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 100.0
                values = np.asarray(rng.standard_normal(shape) * fan_in**-0.5, dtype=np.float32)
                variance = layer.op == "BatchNormalization" and position == 4
                weights[name] = torch.from_numpy(np.abs(values) + 0.1 if variance else values)
    return weights


def random_model(graph: ModelGraph, layers: Mapping[str, LayerPlan], rng: np.random.Generator) -> CompressedModel:
    """The graph with random weights and made-up ranges, ready for export."""
    return with_ranges(graph, CompressionPlan(layers=dict(layers)), random_weights(graph, rng), rng)
