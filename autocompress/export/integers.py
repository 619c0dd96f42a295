"""Weights as the integers that files hold: on their grid, and of four bits two a byte."""

from __future__ import annotations

import numpy as np

from autocompress.errors import UsageError
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Layer, LayerPlan


def weight_integers(compressed: CompressedModel, layer: Layer, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights as the integers its plan stores (int8 array), and float32 scales, one an output channel."""
    if layer.name not in compressed.weight_scales:
        raise UsageError(f"layer {layer.name!r} stores {plan.storage.bits}-bit weights, but has no scales for them")
    if plan.storage.scheme != "affine" or plan.storage.bits not in (4, 8):
        raise UsageError(
            f"layer {layer.name!r} stores weights as {plan.storage.scheme} of {plan.storage.bits} bits; "
            "int8 computation and integer storage take affine of 4 or 8"
        )
    weight = compressed.weights[layer.inputs[1]].detach().cpu().numpy()
    scale = compressed.weight_scales[layer.name].detach().cpu().numpy().astype(np.float32)
    half = 2 ** (plan.storage.bits - 1)
    integers = np.clip(np.rint(weight / along_channels(layer, weight, scale)), -half, half - 1)
    return integers.astype(np.int8), scale


def along_channels(layer: Layer, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``scale`` shaped so that it multiplies each output channel of ``weight``."""
    axis = weight_axis(layer)
    return scale.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Packs integers in ``[-8, 7]`` into ``(n + 1) // 2`` bytes, the first of each pair in the low half, as ONNX does.

    >>> pack_int4(np.array([1, -1, 3]))
    array([241,   3], dtype=uint8)
    """
    flat = values.astype(np.int8).reshape(-1).view(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | (flat[1::2] << 4), dtype=np.uint8)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 array of ``shape`` that :func:`pack_int4` packed.

    >>> unpack_int4(pack_int4(np.array([1, -1, 3])), (3,))
    array([ 1, -1,  3], dtype=int8)
    """
    halves = np.empty(packed.size * 2, np.uint8)
    halves[0::2], halves[1::2] = packed & 0xF, packed >> 4
    signed = (halves.astype(np.int8) ^ 8) - 8
    return np.asarray(signed[: int(np.prod(shape))].reshape(shape), dtype=np.int8)
