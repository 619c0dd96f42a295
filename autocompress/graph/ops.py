"""ONNX operators in torch: one function an operator, found by name.

Each takes the layer's attributes and its inputs (``None`` for an absent one) and gives its output or a tuple of them.
An operator that is not here cannot be simulated; ``read_model`` says so by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from autocompress.plan import Attribute

Attributes = Mapping[str, Attribute]
Operator = Callable[..., Any]

OPERATORS: dict[str, Operator] = {}

TORCH_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""onnx.TensorProto data types."""


def operator(name: str) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        OPERATORS[name] = function
        return function

    return register


def _together(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inputs on one device: integers stay on the CPU when a model is moved, or is asked for its shapes alone."""
    elsewhere = next((x.device for x in inputs if x.device.type != "cpu"), None)
    if elsewhere is None or all(x.device == elsewhere or x.dim() == 0 for x in inputs):
        return inputs
    return tuple(x.to(elsewhere) for x in inputs)


def _elementwise(name: str, function: Callable[..., Any]) -> None:
    OPERATORS[name] = lambda attributes, *inputs: function(*_together(inputs))


_ELEMENTWISE: dict[str, Operator] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "HardSwish": F.hardswish, "Erf": torch.erf,
    "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp, "Neg": torch.neg, "Abs": torch.abs,
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "MatMul": torch.matmul,
    "Max": lambda *x: functools.reduce(torch.maximum, x), "Min": lambda *x: functools.reduce(torch.minimum, x),
    "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x), "Log": torch.log, "Selu": F.selu,
    "Softsign": F.softsign, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sin": torch.sin,
    "Cos": torch.cos, "Not": torch.logical_not, "And": torch.logical_and, "Or": torch.logical_or,
    "Less": torch.lt, "Greater": torch.gt, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge,
    "Identity": lambda x: x, "Equal": torch.eq, "Where": torch.where, "Softplus": F.softplus, "Mish": F.mish,
    "IsNaN": torch.isnan, "Xor": torch.logical_xor,
}  # fmt: skip
for _name, _function in _ELEMENTWISE.items():
    _elementwise(_name, _function)


def _ints(values: Any) -> list[int]:
    return [int(v) for v in values]


def _padded(x: torch.Tensor, attributes: Attributes, dims: int, value: float = 0.0) -> tuple[torch.Tensor, list[int]]:
    """Gives the symmetric padding of an operator, padding explicitly first where it is not symmetric."""
    pads: list[int] = _ints(attributes.get("pads", (0,) * (2 * dims)))
    before, after = pads[:dims], pads[dims:]
    if before == after:
        return x, before
    flat = [p for axis in reversed(range(dims)) for p in (before[axis], after[axis])]
    return F.pad(x, flat, value=value), [0] * dims


@operator("Conv")
def _conv(
    attributes: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    dims = weight.dim() - 2
    x, padding = _padded(x, attributes, dims)
    strides = _ints(attributes.get("strides", (1,) * dims))
    dilations = _ints(attributes.get("dilations", (1,) * dims))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(x, weight, bias, strides, padding, dilations, int(attributes.get("group", 1)))  # type: ignore[arg-type]


@operator("Gemm")
def _gemm(attributes: Attributes, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    a = a.t() if attributes.get("transA") else a
    b = b if attributes.get("transB") else b.t()
    alpha, beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))  # type: ignore[arg-type]
    if alpha == 1.0 and beta == 1.0:
        return F.linear(a, b, c)
    out = alpha * F.linear(a, b)
    return out if c is None else out + beta * c


@operator("BatchNormalization")
def _batch_norm(
    attributes: Attributes,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
) -> torch.Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=float(attributes.get("epsilon", 1e-5)))  # type: ignore[arg-type]


@operator("LayerNormalization")
def _layer_norm(
    attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    axis = int(attributes.get("axis", -1)) % x.dim()  # type: ignore[arg-type]
    return F.layer_norm(x, x.shape[axis:], scale, bias, eps=float(attributes.get("epsilon", 1e-5)))  # type: ignore[arg-type]


@operator("Clip")
def _clip(
    attributes: Attributes,
    x: torch.Tensor,
    low: torch.Tensor | float | None = None,
    high: torch.Tensor | float | None = None,
) -> torch.Tensor:
    return torch.clamp(x, None if low is None else float(low), None if high is None else float(high))


@operator("HardSigmoid")
def _hard_sigmoid(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))  # type: ignore[arg-type]
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("LeakyRelu")
def _leaky_relu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, float(attributes.get("alpha", 0.01)))  # type: ignore[arg-type]


@operator("Elu")
def _elu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return F.elu(x, float(attributes.get("alpha", 1.0)))  # type: ignore[arg-type]


@operator("Gelu")
def _gelu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=str(attributes.get("approximate", "none")))


@operator("Softmax")
def _softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, int(attributes.get("axis", -1)))  # type: ignore[arg-type]


@operator("LogSoftmax")
def _log_softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, int(attributes.get("axis", -1)))  # type: ignore[arg-type]


@operator("GlobalAveragePool")
def _global_average_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("MaxPool")
def _max_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel = _ints(attributes["kernel_shape"])
    x, padding = _padded(x, attributes, len(kernel), value=float("-inf"))
    strides = _ints(attributes.get("strides", (1,) * len(kernel)))
    dilations = _ints(attributes.get("dilations", (1,) * len(kernel)))
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    pooled: torch.Tensor = pool(x, kernel, strides, padding, dilations, ceil_mode=bool(attributes.get("ceil_mode", 0)))
    return pooled


@operator("AveragePool")
def _average_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel = _ints(attributes["kernel_shape"])
    x, padding = _padded(x, attributes, len(kernel))
    strides = _ints(attributes.get("strides", (1,) * len(kernel)))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return pool(
        x, kernel, strides, padding, bool(attributes.get("ceil_mode", 0)), bool(attributes.get("count_include_pad", 0))
    )


def _axes(attributes: Attributes, given: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    axes = given.tolist() if given is not None else attributes.get("axes", ())
    return tuple(int(a) % dims for a in axes) or tuple(range(dims))  # type: ignore[union-attr]


@operator("ReduceMean")
def _reduce_mean(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    return x.mean(dim=_axes(attributes, axes, x.dim()), keepdim=bool(attributes.get("keepdims", 1)))


@operator("ReduceSum")
def _reduce_sum(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    return x.sum(dim=_axes(attributes, axes, x.dim()), keepdim=bool(attributes.get("keepdims", 1)))


@operator("ReduceMax")
def _reduce_max(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    return x.amax(dim=_axes(attributes, axes, x.dim()), keepdim=bool(attributes.get("keepdims", 1)))


@operator("InstanceNormalization")
def _instance_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=float(attributes.get("epsilon", 1e-5)))  # type: ignore[arg-type]


@operator("GroupNormalization")
def _group_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    groups = int(attributes["num_groups"])  # type: ignore[arg-type]
    return F.group_norm(x, groups, scale, bias, eps=float(attributes.get("epsilon", 1e-5)))  # type: ignore[arg-type]


@operator("Flatten")
def _flatten(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.flatten(x, int(attributes.get("axis", 1)))  # type: ignore[arg-type]


@operator("Reshape")
def _reshape(attributes: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    sizes = _ints(shape.tolist())
    if not attributes.get("allowzero"):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Transpose")
def _transpose(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.permute(_ints(attributes.get("perm", tuple(reversed(range(x.dim()))))))


@operator("Concat")
def _concat(attributes: Attributes, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(_together(parts), int(attributes["axis"]))  # type: ignore[arg-type]


@operator("Split")
def _split(attributes: Attributes, x: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    axis = int(attributes.get("axis", 0))  # type: ignore[arg-type]
    if sizes is not None:
        return torch.split(x, _ints(sizes.tolist()), axis)
    count = int(attributes["num_outputs"])  # type: ignore[arg-type]
    return torch.split(x, -(-x.shape[axis] // count), axis)


_FAR = 2**31
"""No axis is this long; exporters write the largest int64 for "to the end", which torch warns about."""


@operator("Slice")
def _slice(
    attributes: Attributes,
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    dims = axes.tolist() if axes is not None else list(range(len(starts)))
    strides = steps.tolist() if steps is not None else [1] * len(dims)
    for start, end, axis, stride in zip(starts.tolist(), ends.tolist(), dims, strides, strict=True):
        selection = [slice(None)] * x.dim()
        selection[axis] = slice(max(start, -_FAR), min(max(end, -_FAR), _FAR), stride)
        x = x[tuple(selection)]
    return x


@operator("Gather")
def _gather(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = int(attributes.get("axis", 0)) % x.dim()  # type: ignore[arg-type]
    flat = x.index_select(axis, indices.reshape(-1).to(x.device))
    return flat.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.gather(x, int(attributes.get("axis", 0)), indices.to(x.device))  # type: ignore[arg-type]


@operator("GatherND")
def _gather_nd(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if int(attributes.get("batch_dims", 0)):  # type: ignore[arg-type]
        raise NotImplementedError("GatherND with batch_dims")
    return x[tuple(indices.to(x.device).unbind(-1))]


@operator("Range")
def _range(attributes: Attributes, start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("Squeeze")
def _squeeze(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes.tolist())))


@operator("Unsqueeze")
def _unsqueeze(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    for axis in sorted(_ints(axes.tolist())):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def _expand(attributes: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape.tolist()))))  # type: ignore[no-untyped-call]


@operator("Shape")
def _shape(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    start = int(attributes.get("start", 0))  # type: ignore[arg-type]
    end = int(attributes.get("end", x.dim()))  # type: ignore[arg-type]
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Cast")
def _cast(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.to(TORCH_DTYPES[int(attributes["to"])])  # type: ignore[arg-type]


@operator("Pad")
def _pad(
    attributes: Attributes,
    x: torch.Tensor,
    pads: torch.Tensor,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    amounts = _ints(pads.tolist())
    dims = _ints(axes.tolist()) if axes is not None else list(range(x.dim()))
    half = len(dims)
    flat = [0] * (2 * x.dim())
    for position, axis in enumerate(dims):
        place = 2 * (x.dim() - 1 - axis % x.dim())
        flat[place], flat[place + 1] = amounts[position], amounts[half + position]
    mode = str(attributes.get("mode", "constant"))
    return (
        F.pad(x, flat, value=0.0 if value is None else float(value))
        if mode == "constant"
        else F.pad(x, flat, mode=mode)
    )
