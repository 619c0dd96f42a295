"""Weights as the integers that files hold: on their grid, and packed so that a number takes the bits it needs."""

from __future__ import annotations

import numpy as np

from autocompress.errors import UsageError
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import is_integer
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Layer, LayerPlan, NumFormat, weight_of


def weight_integers(compressed: CompressedModel, layer: Layer, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights as the integers its plan stores (int8 array of the weight's shape), and their float32 scales.

    The scales are ``[out_channels]`` or ``[out_channels, blocks]``.  Of a codebook the integers are the values that its
    indices stand for.

    Raises:
        UsageError: the layer has no scales, or the plan stores no integers.
    """
    storage = plan.storage
    if not is_integer(storage):
        raise UsageError(f"layer {layer.name!r} stores {storage.scheme} of {storage.bits} bits: no integers")
    if layer.name not in compressed.weight_scales:
        raise UsageError(f"layer {layer.name!r} stores {storage.bits}-bit weights, but has no scales for them")
    weight = compressed.weights[weight_of(layer)].detach().cpu().numpy()
    scale = compressed.weight_scales[layer.name].detach().cpu().numpy().astype(np.float32)
    half = 128 if storage.scheme == "codebook" else 2 ** (storage.bits - 1)
    integers = np.clip(np.rint(weight / grid_scale(layer, weight, scale, storage)), -half, half - 1)
    return integers.astype(np.int8), scale


def grid_scale(layer: Layer, weight: np.ndarray, scale: np.ndarray, storage: NumFormat) -> np.ndarray:
    """``scale`` shaped so that it multiplies ``weight``: one an output channel, or one for each weight."""
    axis = weight_axis(layer)
    if scale.ndim == 1:
        return scale.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    columns = weight.size // weight.shape[axis]
    each = np.repeat(scale, storage.block or columns, axis=1)[:, :columns]
    return each.reshape(weight.shape) if axis == 0 else np.ascontiguousarray(each.T)


def codebook(integers: np.ndarray, storage: NumFormat, axis: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tables that integers come from, and each one's index in its own.

    Args:
        integers: the weights.
        storage: a codebook format.
        axis: of the output channels.
        name: of the layer, for the error.

    Returns:
        The tables, ``[1 or out_channels, 2 ** bits]`` (int8, ascending, the last repeated where there are fewer), and
        the indices (uint8) in the shape of ``integers``.

    Raises:
        UsageError: there are more different values than the table holds.
    """
    size = 2**storage.bits
    moved = np.moveaxis(integers, axis, 0)
    rows = moved.reshape(1 if storage.granularity == "tensor" else len(moved), -1)
    tables = np.empty((len(rows), size), np.int8)
    indices = np.empty(rows.shape, np.uint8)
    for place, row in enumerate(rows):
        values = np.unique(row)
        if len(values) > size:
            raise UsageError(
                f"layer {name!r} has {len(values)} different weights where its plan stores {storage.bits}-bit indices; "
                "round them to a table first"
            )
        tables[place] = np.pad(values, (0, size - len(values)), mode="edge")
        indices[place] = np.searchsorted(values, row)
    return tables, np.ascontiguousarray(np.moveaxis(indices.reshape(moved.shape), 0, axis))


def pack_fields(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers of 2, 4 or 8 bits (signed ones by their low bits) into bytes, the first lowest, as ONNX does.

    >>> pack_fields(np.array([1, -1, 3]), 4)
    array([241,   3], dtype=uint8)
    """
    flat = values.reshape(-1).astype(np.int16).astype(np.uint8) & np.uint8(2**bits - 1)
    count = 8 // bits
    fields = np.pad(flat, (0, -flat.size % count)).reshape(-1, count)
    shifted = fields << (np.arange(count, dtype=np.uint8) * np.uint8(bits))
    return np.asarray(np.bitwise_or.reduce(shifted, axis=1), dtype=np.uint8)


def unpack_fields(packed: np.ndarray, bits: int, shape: tuple[int, ...], signed: bool = True) -> np.ndarray:
    """The array of ``shape`` that :func:`pack_fields` packed: int8, or uint8 where not ``signed``.

    >>> unpack_fields(pack_fields(np.array([1, -1, 3]), 4), 4, (3,))
    array([ 1, -1,  3], dtype=int8)
    """
    count = 8 // bits
    fields = (packed.reshape(-1, 1) >> (np.arange(count, dtype=np.uint8) * np.uint8(bits))) & np.uint8(2**bits - 1)
    return _signed(fields.reshape(-1)[: int(np.prod(shape))].reshape(shape), bits, signed)


def pack_planes(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers of any number of bits as ``[bits, (n + 7) // 8]`` bytes: all lowest bits, then the next, ...

    >>> pack_planes(np.array([1, -1, 3]), 3)
    array([[7],
           [6],
           [2]], dtype=uint8)
    """
    flat = values.reshape(-1).astype(np.int16).astype(np.uint8)
    return np.stack([np.packbits((flat >> np.uint8(bit)) & np.uint8(1), bitorder="little") for bit in range(bits)])


def unpack_planes(packed: np.ndarray, bits: int, shape: tuple[int, ...], signed: bool = True) -> np.ndarray:
    """The array of ``shape`` that :func:`pack_planes` packed: int8, or uint8 where not ``signed``.

    >>> unpack_planes(pack_planes(np.array([1, -1, 3]), 3), 3, (3,))
    array([ 1, -1,  3], dtype=int8)
    """
    count = int(np.prod(shape))
    planes = np.unpackbits(packed.reshape(bits, -1), axis=1, count=count, bitorder="little")
    weights = (1 << np.arange(bits, dtype=np.uint8)).astype(np.uint8)
    fields = np.bitwise_or.reduce(planes * weights[:, None], axis=0) if count else np.zeros(0, np.uint8)
    return _signed(fields.astype(np.uint8).reshape(shape), bits, signed)


def _signed(fields: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    if not signed:
        return np.asarray(fields, dtype=np.uint8)
    half = 2 ** (bits - 1)
    return np.asarray((fields.astype(np.int16) ^ half) - half, dtype=np.int8)
