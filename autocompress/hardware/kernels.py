"""Kernel classes and their features: what a kernel's time is fitted on, computed alike when fitting and when pricing.

A kernel is one node of the runtime's optimized graph.  Its class is the operator, its kind and the type it computes
in (``conv_int8``).  ``_plain`` marks the slower path for channel counts off the runtime's alignment grid, ``_few`` a
float32 convolution with fewer input channels than the runtime packs together.  ``attention`` is a product of two
activations, ``curve`` an activation function that needs more than a comparison, ``gelu`` one that needs an error
function.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

FEATURES = ("one", "mmac", "mtap", "mpoint", "mwindow", "read_mb", "written_mb", "weight_mb", "far_mb")
"""A constant; multiply-accumulates on padded channels; inputs gathered (positions x window x input channels, once for
each pass over the output channels); output positions, once for each pass; positions x window; bytes of activations
read and written; bytes of weights; bytes of all of these beyond ``NEAR_BYTES``.  All but the constant in millions."""

NEAR_BYTES = 1 << 20
"""What the cache next to a core holds: a kernel that goes through more waits for the rest."""

Number = Any
"""An int or float, or an array of them with one entry a plan: the arithmetic is the same."""

INT8_IN_STEP = 4
"""Input channels that int8 kernels consume at a time."""

OUT_STEP = 16
"""Output channels that one vector of the int8 kernels holds."""

PASS = 64
"""Output channels of one pass over the input."""

_FAMILY_KINDS = {
    "fp32": (
        "conv_fp32", "pointwise_fp32", "depthwise_fp32", "conv_few_fp32", "pointwise_few_fp32", "conv_plain_fp32",
        "depthwise_plain_fp32", "gemm_fp32", "matmul_fp32", "attention_fp32",
    ),
    "int8": (
        "conv_int8", "pointwise_int8", "depthwise_int8", "conv_plain_int8", "conv_dynamic_int8",
        "pointwise_plain_int8", "depthwise_plain_int8", "gemm_int8", "matmul_int8", "matmul_dynamic_int8",
        "matmul_nbits", "matmul_nbits_slow",
    ),
    "light": (
        "add_fp32", "elementwise_fp32", "curve_fp32", "gelu_fp32", "softmax_fp32", "norm_fp32", "skip_norm_fp32",
        "pool_fp32", "pool_plain_fp32", "global_pool_fp32", "batch_norm_fp32", "concat_fp32", "other_fp32", "view",
        "add_int8", "mul_int8", "curve_int8", "pool_int8", "pool_plain_int8", "average_pool_int8", "global_pool_int8",
        "concat_int8",
    ),
    "boundary": (
        "quantize", "quantize_dynamic", "dequantize", "cast", "reorder_input", "reorder_output", "transpose_int8",
        "transpose_fp32",
    ),
}  # fmt: skip

KINDS = {kind: family for family, kinds in _FAMILY_KINDS.items() for kind in kinds}
"""Every kernel class, with the family whose calibration scale it shares."""

MEMORY = "memory"
"""The family of what is paid beside the kernels' own costs: weights that do not stay in the cache between runs."""

FAMILIES = (*_FAMILY_KINDS, MEMORY)

SUBSTITUTES = {
    "skip_norm_fp32": "norm_fp32", "conv_dynamic_int8": "conv_plain_int8",
    "conv_plain_fp32": "conv_fp32", "conv_few_fp32": "conv_fp32", "pointwise_few_fp32": "pointwise_fp32",
    "pointwise_fp32": "conv_fp32", "depthwise_plain_fp32": "depthwise_fp32", "matmul_fp32": "gemm_fp32",
    "matmul_int8": "gemm_int8", "conv_plain_int8": "conv_int8", "pointwise_plain_int8": "pointwise_int8",
    "pointwise_int8": "conv_int8", "depthwise_plain_int8": "depthwise_int8", "other_fp32": "elementwise_fp32",
    "concat_fp32": "elementwise_fp32", "concat_int8": "add_int8", "pool_int8": "add_int8",
    "pool_plain_int8": "pool_int8", "transpose_fp32": "reorder_output", "attention_fp32": "matmul_fp32",
    "matmul_dynamic_int8": "matmul_int8", "matmul_nbits": "matmul_dynamic_int8", "softmax_fp32": "curve_fp32",
    "norm_fp32": "softmax_fp32", "gelu_fp32": "curve_fp32", "average_pool_int8": "pool_int8",
    "curve_fp32": "elementwise_fp32", "curve_int8": "mul_int8", "mul_int8": "add_int8", "batch_norm_fp32": "norm_fp32",
    "pool_plain_fp32": "pool_fp32", "cast": "dequantize", "matmul_nbits_slow": "matmul_nbits",
    "quantize_dynamic": "quantize", "pool_fp32": "elementwise_fp32", "global_pool_fp32": "elementwise_fp32",
    "add_fp32": "elementwise_fp32", "global_pool_int8": "add_int8", "add_int8": "elementwise_fp32",
    "view": "elementwise_fp32", "gemm_fp32": "conv_fp32", "gemm_int8": "conv_int8", "depthwise_fp32": "conv_fp32",
    "depthwise_int8": "conv_int8", "conv_int8": "conv_fp32", "quantize": "elementwise_fp32",
    "dequantize": "elementwise_fp32", "reorder_input": "elementwise_fp32", "reorder_output": "elementwise_fp32",
    "transpose_int8": "elementwise_fp32",
}  # fmt: skip
"""The class whose coefficients stand in for one that was never measured; the estimate names it as unmodelled."""


@dataclass(frozen=True)
class Work:
    """What one kernel does, in units of its cost; fields hold a number, or one a plan."""

    macs: Number = 0
    taps: Number = 0
    points: Number = 0
    windows: Number = 0
    read_bytes: Number = 0
    written_bytes: Number = 0
    weight_bytes: Number = 0

    def at(self, index: int) -> Work:
        """The work under one plan."""
        values = (np.atleast_1d(getattr(self, field.name)) for field in fields(self))
        return Work(*(float(value[index if len(value) > 1 else 0]) for value in values))

    def features(self) -> tuple[Number, ...]:
        """In the order of ``FEATURES``."""
        return (1.0, *(getattr(self, name) * 1e-6 for name in _COUNTS))

    @property
    def far_bytes(self) -> Number:
        """What of all it moves does not fit the near cache."""
        return np.maximum(self.read_bytes + self.written_bytes + self.weight_bytes - NEAR_BYTES, 0.0)


_COUNTS = ("macs", "taps", "points", "windows", "read_bytes", "written_bytes", "weight_bytes", "far_bytes")
"""What is counted for each of ``FEATURES`` but the constant."""


def round_up(value: Number, step: int) -> Number:
    """The next multiple of ``step``."""
    if step <= 1:
        return value
    return (value + (step - 1)) & -step if step & (step - 1) == 0 else -(-value // step) * step


def aligned_int8(inputs: Number, outputs: Number, depthwise: bool) -> Number:
    """Whether an int8 convolution takes the runtime's fast path for channel counts on its grid."""
    if depthwise:
        return outputs % OUT_STEP == 0
    return (inputs % INT8_IN_STEP == 0) & (outputs % INT8_IN_STEP == 0) & (outputs >= OUT_STEP)


def conv_work(
    kind: str, positions: Number, window: int, inputs: Number, outputs: Number, input_positions: Number, block: int
) -> Work:
    """A convolution: ``positions`` of ``outputs`` channels, each over a ``window`` of taps of ``inputs`` channels."""
    int8 = kind.endswith("int8")
    width = 1 if int8 else 4
    if kind.startswith("depthwise"):
        channels = outputs if "plain" in kind else round_up(outputs, OUT_STEP if int8 else block)
        # What half an int8 vector does not hold is computed one channel after the other.
        left = outputs % (OUT_STEP // 2) if int8 else 0 * outputs
        windows = positions * window
        bytes_in, bytes_out = width * channels * input_positions, width * channels * positions
        return Work(
            windows * channels, windows * left, positions, windows, bytes_in, bytes_out,
            width * window * channels,
        )  # fmt: skip
    if int8:
        ins, outs = round_up(inputs, INT8_IN_STEP), round_up(outputs, OUT_STEP)
    elif "few" in kind:
        ins, outs = inputs, round_up(outputs, block)
    elif "plain" in kind:
        ins, outs = inputs, outputs
    else:
        ins, outs = round_up(inputs, block), round_up(outputs, block)
    passes = round_up(outs, PASS) // PASS
    return Work(
        macs=positions * window * ins * outs,
        taps=positions * window * ins * passes,
        points=positions * passes,
        windows=positions * window,
        read_bytes=width * input_positions * ins,
        written_bytes=width * positions * outs,
        weight_bytes=width * window * ins * outs,
    )


def gemm_work(kind: str, rows: Number, inputs: Number, outputs: Number) -> Work:
    """``rows`` vectors of ``inputs`` numbers times a matrix with ``outputs`` columns.

    One row is no small matrix: another kernel streams the weights past it (``windows``).
    """
    width = 1 if kind.endswith("int8") else 4
    return Work(
        macs=rows * inputs * outputs,
        windows=inputs * outputs if rows == 1 else 0,
        read_bytes=width * rows * inputs,
        written_bytes=width * rows * outputs,
        weight_bytes=width * inputs * outputs,
    )


def few_bits_work(rows: Number, inputs: Number, outputs: Number, bits: int) -> Work:
    """A product with a matrix stored in ``bits`` bits a weight, which is unpacked on the way (``points``)."""
    return Work(
        macs=rows * inputs * outputs,
        points=inputs * outputs,
        windows=inputs * outputs if rows == 1 else 0,
        read_bytes=4 * rows * inputs,
        written_bytes=4 * rows * outputs,
        weight_bytes=inputs * outputs * bits / 8,
    )


def pool_work(kind: str, read: Number, written: Number, window: int) -> Work:
    """``written`` numbers, each taken from a ``window`` of the ``read`` ones."""
    width = 1 if kind.endswith("int8") else 4
    return Work(macs=written * window, read_bytes=width * read, written_bytes=width * written)


LIGHT = {
    "Sigmoid": "curve_fp32", "Tanh": "gelu_fp32", "Erf": "gelu_fp32", "Exp": "curve_fp32", "Log": "curve_fp32",
    "Sqrt": "curve_fp32", "Pow": "curve_fp32", "Gelu": "gelu_fp32", "BiasGelu": "gelu_fp32",
    "FastGelu": "gelu_fp32", "QuickGelu": "curve_fp32", "HardSwish": "curve_fp32", "HardSigmoid": "curve_fp32",
    "Elu": "curve_fp32", "Selu": "curve_fp32", "Softplus": "curve_fp32", "Mish": "gelu_fp32", "Swish": "curve_fp32",
    "Softmax": "softmax_fp32", "LogSoftmax": "softmax_fp32", "LayerNormalization": "norm_fp32",
    "SimplifiedLayerNormalization": "norm_fp32", "RMSNormalization": "norm_fp32",
    "SkipLayerNormalization": "skip_norm_fp32", "InstanceNormalization": "norm_fp32", "GroupNormalization": "norm_fp32",
    "BatchNormalization": "batch_norm_fp32", "GlobalAveragePool": "global_pool_fp32", "Cast": "cast",
    "Add": "add_fp32", "Sum": "add_fp32", "Relu": "elementwise_fp32", "Clip": "elementwise_fp32",
    "Mul": "elementwise_fp32", "Sub": "elementwise_fp32", "Div": "elementwise_fp32", "LeakyRelu": "elementwise_fp32",
    "PRelu": "elementwise_fp32", "Max": "elementwise_fp32", "Min": "elementwise_fp32", "Neg": "elementwise_fp32",
    "Concat": "concat_fp32", "Split": "concat_fp32", "Slice": "concat_fp32", "Gather": "concat_fp32",
    "Expand": "concat_fp32", "Pad": "concat_fp32", "Tile": "concat_fp32",
}  # fmt: skip
"""The class of operators without weights that run in float32, by what they do; any other is ``other_fp32``."""

VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape", "Dropout", "Constant"})
"""Operators that give their input another shape."""


def light_work(kind: str, read_bytes: Number, written_bytes: Number) -> Work:
    """An operator without weights; what only copies reads as much as it writes."""
    return move_work(written_bytes if kind.startswith("concat") else read_bytes, written_bytes)


def layout_work(elements: Number, positions: Number, width: int = 1) -> Work:
    """Between channels first and channels last: ``positions`` of an image in one go each."""
    return Work(points=positions, read_bytes=width * elements, written_bytes=width * elements)


def move_work(read_bytes: Number, written_bytes: Number) -> Work:
    """A kernel whose time goes with the bytes it moves."""
    return Work(read_bytes=read_bytes, written_bytes=written_bytes)


def cost_size(work: Work) -> Number:
    """One number for how much a kernel does: what it computes and the bytes it moves."""
    return work.macs + work.read_bytes + work.written_bytes


def cold_megabytes(weight_bytes: Number, cache_mb: float) -> Number:
    """Megabytes of a model's weights that have left a cache of that size when they are needed again.

    A run reads all weights in order, so a cache that keeps what was used last keeps none of them once they outgrow it:
    from none at its size to all at twice its size.
    """
    megabytes = weight_bytes * 1e-6
    return megabytes * np.clip(megabytes / cache_mb - 1.0, 0.0, 1.0)


def cost_us(coefficients: tuple[float, ...], work: Work) -> Number:
    """The fitted time of a kernel, in microseconds."""
    fixed, *rest = coefficients
    total: Number = fixed
    for weight, name in zip(rest, _COUNTS, strict=True):
        if weight:
            total = total + (weight * 1e-6) * getattr(work, name)
    return total


def feature_row(work: Work) -> np.ndarray:
    """The features of one kernel as floats."""
    return np.array([float(f) for f in work.features()])
