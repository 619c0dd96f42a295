"""Matrix products whose weights alone are integers: dynamic int8 and few bits, as ONNX files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_ROUND = 128
"""Weights that share one scale: what the runtime is fastest with."""


def dynamic_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every constant matrix in int8; activations are quantized while it runs (dynamic quantization)."""

    def convert(node: onnx.NodeProto, weight: np.ndarray) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        name, (source, _), (out,) = node.input[1], node.input, node.output
        scale = np.maximum(np.abs(weight).max(axis=0), 1e-8).astype(np.float32) / 127
        integers = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        stored = [numpy_helper.from_array(integers, f"{name}.q"), numpy_helper.from_array(scale, f"{name}.s")]
        made = [
            helper.make_node("DynamicQuantizeLinear", [source], [f"{out}.x", f"{out}.xs", f"{out}.xz"]),
            helper.make_node("MatMulInteger", [f"{out}.x", f"{name}.q", f"{out}.xz"], [f"{out}.i"]),
            helper.make_node("Cast", [f"{out}.i"], [f"{out}.f"], to=int(onnx.TensorProto.FLOAT)),
            helper.make_node("Mul", [f"{out}.xs", f"{name}.s"], [f"{out}.xw"]),
            helper.make_node("Mul", [f"{out}.f", f"{out}.xw"], [out]),
        ]
        return made, stored

    return _replaced(model, convert)


def few_bits_products(model: onnx.ModelProto, bits: int = 4, accuracy_level: int = 4) -> onnx.ModelProto:
    """The model with every constant matrix in ``bits`` bits (MatMulNBits), random ones: made to be timed only."""

    def convert(node: onnx.NodeProto, weight: np.ndarray) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        name, (source, _), (out,) = node.input[1], node.input, node.output
        inputs, outputs = weight.shape
        blocks = -(-inputs // _ROUND)
        packed = np.random.default_rng(0).integers(0, 256, (outputs, blocks, _ROUND * bits // 8), dtype=np.uint8)
        scales = np.full(outputs * blocks, 0.01, np.float32)
        made = helper.make_node(
            "MatMulNBits", [source, f"{name}.q", f"{name}.s"], [out], domain="com.microsoft", K=inputs, N=outputs,
            bits=bits, block_size=_ROUND, accuracy_level=accuracy_level,
        )  # fmt: skip
        stored = [numpy_helper.from_array(packed, f"{name}.q"), numpy_helper.from_array(scales, f"{name}.s")]
        return [made], stored

    made = _replaced(model, convert)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


def _replaced(
    model: onnx.ModelProto,
    convert: Callable[[onnx.NodeProto, np.ndarray], tuple[list[onnx.NodeProto], list[onnx.TensorProto]]],
) -> onnx.ModelProto:
    """A copy with every product with a constant matrix converted."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    gone: set[str] = set()
    for node in made.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            fresh, stored = convert(node, numpy_helper.to_array(constants[node.input[1]]))
            nodes += fresh
            made.graph.initializer.extend(stored)
            gone.add(node.input[1])
        else:
            nodes.append(node)
    _refill(made.graph.node, nodes)
    _refill(made.graph.initializer, [tensor for tensor in made.graph.initializer if tensor.name not in gone])
    return made


def _refill(field: Any, items: Iterable[Any]) -> None:
    kept = list(items)
    del field[:]
    field.extend(kept)
