"""How integer weights lie in a file: in the fewest bytes from which a session makes int8 when it loads the file.

ONNX has integers of 8, 4 and (from opset 25) 2 bits; a Cast of an initializer is folded when the model is loaded, so
these cost nothing at run time.  Numbers of 3, 5 and 6 bits lie as planes: all lowest bits, then all second ones, ...  A
byte of a plane looks up its eight bits in a table of 256 rows, and a product with ``[1, 2, 4, ..., -2^(bits-1)]`` joins
the planes: also folded, and faster than shifting and masking (measured on 10 million 3-bit weights: 55 ms against 130
to 280, where plain int8 takes 12).  One blob holds the planes of many layers, since each node costs bytes.

What a layer's integers lie in is what takes fewest bytes: a layer of few weights may stay int8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from autocompress.export.builder import GraphBuilder
from autocompress.export.integers import codebook, pack_planes, weight_integers
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.formats import is_integer
from autocompress.methods.quantization import weight_axis
from autocompress.plan import Layer, LayerPlan, NumFormat, weight_of

CAST_BYTES = 28
"""What a Cast of an initializer adds to a file."""

TABLE_BYTES = {"tensor": 50, "channel": 90}
"""What looking up codebooks adds, beside the tables."""

PART_BYTES = 45
"""What taking one layer's numbers out of a blob of planes adds."""

BLOB_BYTES = 600
"""What the first blob adds."""

CHUNK_WEIGHTS = 1 << 20
"""Weights unpacked together: while a model is loaded, each takes four bytes for every bit."""

_SIGNED = {2: int(TensorProto.INT2), 4: int(TensorProto.INT4)}
_UNSIGNED = {2: int(TensorProto.UINT2), 4: int(TensorProto.UINT4)}


def field_bits(storage: NumFormat, least: int = 2) -> int:
    """Bits of ONNX's smallest type that holds a format's numbers: 2, 4 or 8, and ``least`` at least."""
    return next(bits for bits in (2, 4, 8) if bits >= max(storage.bits, least))


def packed_bytes(
    storage: NumFormat, count: np.ndarray, channels: np.ndarray, planes: bool, least: int = 2
) -> np.ndarray:
    """Bytes of ``count`` integers of a format in a file, what unpacks them included and scales not.

    Args:
        storage: an affine (by tensor or channel) or codebook format.
        count: weights of a layer.
        channels: its output channels.
        planes: as planes in a blob, whose own bytes are not counted; else in ONNX's types, or as int8 if that is less.
        least: bits of the smallest of those types.
    """
    table = np.zeros(np.shape(count))
    if storage.scheme == "codebook":
        tables = np.asarray(1 if storage.granularity == "tensor" else channels)
        table = table + TABLE_BYTES[storage.granularity] + 2.0**storage.bits * tables
    if planes:
        return np.asarray(storage.bits * np.ceil(count / 8) + PART_BYTES + table)
    bits = field_bits(storage, least)
    fields = np.ceil(count * bits / 8) + (CAST_BYTES if bits < 8 else 0) + table
    return np.asarray(np.minimum(fields, count))


def best_in_planes(storage: NumFormat, least: int = 2) -> bool:
    """Whether large layers of a format lie in planes."""
    return storage.bits in (3, 5, 6) or storage.bits < least


@dataclass(frozen=True)
class _Packed:
    """A layer's numbers in ``bits``, waiting for their place in a blob."""

    key: str
    values: np.ndarray
    bits: int
    signed: bool


class StoredWeights:
    """The integer weights of one model, each layer's in the container that takes fewest bytes.

    Args:
        compressed: what a plan made of a model.
        out: where initializers and the nodes that unpack them go; those of blobs at once.
        transposed: layers whose integers are wanted the other way round.
        least: bits of the smallest of ONNX's types that may be used: OpenVINO reads none of 2.
    """

    def __init__(
        self, compressed: CompressedModel, out: GraphBuilder, transposed: Iterable[str] = (), least: int = 2
    ) -> None:
        self.least = least
        self.compressed = compressed
        self.out = out
        self.transposed = frozenset(transposed)
        self._table = ""
        self._made: dict[str, str] = {}
        self._numbers: dict[str, str] = {}
        waiting: dict[str, tuple[_Packed, float]] = {}
        for layer in compressed.graph.stored:
            plan = compressed.plan.layers.get(layer.name, LayerPlan())
            count = compressed.weights[weight_of(layer)].numel()
            saved = _saved_by_planes(plan.storage, count, self._channels(layer), least)
            if saved > 0 and self._key(layer) not in waiting:
                waiting[self._key(layer)] = (self._packed(layer, plan), saved)
        if sum(saved for _, saved in waiting.values()) > BLOB_BYTES:
            groups: dict[tuple[int, bool], list[_Packed]] = {}
            for packed, _ in waiting.values():
                groups.setdefault((packed.bits, packed.signed), []).append(packed)
            for group in groups.values():
                self._write(group)

    def integers(self, layer: Layer) -> str:
        """The name of a tensor with the layer's int8 weights."""
        key = self._key(layer)
        if key not in self._made:
            self._made[key] = self._unpacked(layer, key)
        return self._made[key]

    def _key(self, layer: Layer) -> str:
        storage = self.compressed.plan.layers.get(layer.name, LayerPlan()).storage
        return f"{weight_of(layer)} {storage.model_dump_json()} {layer.name in self.transposed}"

    def _channels(self, layer: Layer) -> int:
        return int(self.compressed.weights[weight_of(layer)].shape[weight_axis(layer)])

    def _array(self, layer: Layer, plan: LayerPlan) -> tuple[np.ndarray, int]:
        """A layer's integers as they are wanted, and the axis of output channels in them."""
        integers, axis = weight_integers(self.compressed, layer, plan)[0], weight_axis(layer)
        return (np.ascontiguousarray(integers.T), 1 - axis) if layer.name in self.transposed else (integers, axis)

    def _unpacked(self, layer: Layer, key: str) -> str:
        plan = self.compressed.plan.layers[layer.name]
        storage = plan.storage
        integers, axis = self._array(layer, plan)
        if key not in self._numbers:
            small = packed_bytes(storage, np.array(integers.size), np.array(integers.shape[axis]), False, self.least)
            if small >= integers.size:
                return self.out.constant(integers)
        if storage.scheme != "codebook":
            return self._numbers.get(key) or self._cast(
                integers, _SIGNED[field_bits(storage, self.least)], TensorProto.INT8
            )
        tables, indices = codebook(integers, storage, axis, layer.name)
        found = self._numbers.get(key) or self._cast(
            indices, _UNSIGNED[field_bits(storage, self.least)], TensorProto.INT32
        )
        return self._looked_up(tables, found, integers.shape, axis)

    def _cast(self, values: np.ndarray, kind: int, to: int) -> str:
        return self.out.node("Cast", [self.out.constant(values, kind)], to=int(to))

    def _looked_up(self, tables: np.ndarray, indices: str, shape: tuple[int, ...], axis: int) -> str:
        """Values of one table, or of one an output channel."""
        if len(tables) == 1:
            return self.out.node("Gather", [self.out.constant(tables[0]), indices])
        if axis == 1:
            return self.out.node("GatherElements", [self.out.constant(np.ascontiguousarray(tables.T)), indices])
        if len(shape) == 2:
            return self.out.node("GatherElements", [self.out.constant(tables), indices], axis=1)
        rows = self.out.node("Reshape", [indices, self.out.constant(np.array([0, -1]))])
        found = self.out.node("GatherElements", [self.out.constant(tables), rows], axis=1)
        return self.out.node("Reshape", [found, self.out.constant(np.array(shape))])

    # ----------------------------------------------------------------------------------------------------- blobs

    def _packed(self, layer: Layer, plan: LayerPlan) -> _Packed:
        integers, axis = self._array(layer, plan)
        signed = plan.storage.scheme != "codebook"
        values = integers if signed else codebook(integers, plan.storage, axis, layer.name)[1]
        return _Packed(self._key(layer), values, plan.storage.bits, signed)

    def _write(self, group: list[_Packed]) -> None:
        """Adds the planes of some layers' numbers, and the nodes that give each layer its own."""
        bits, signed = group[0].bits, group[0].signed
        flat = np.concatenate([packed.values.reshape(-1) for packed in group])
        parts = [self._chunk(flat[i : i + CHUNK_WEIGHTS], bits, signed) for i in range(0, flat.size, CHUNK_WEIGHTS)]
        whole = self.out.node("Concat", parts, axis=1) if len(parts) > 1 else parts[0]
        sizes = [packed.values.size for packed in group]
        sizes += [-flat.size % 8] if flat.size % 8 else []
        names = [self.out.name() for _ in sizes]
        self.out.layer("Split", [whole, self.out.constant(np.array(sizes))], names, {"axis": 1})
        for packed, name in zip(group, names, strict=False):
            shape = self.out.constant(np.array(packed.values.shape))
            self._numbers[packed.key] = self.out.node("Reshape", [name, shape])

    def _chunk(self, flat: np.ndarray, bits: int, signed: bool) -> str:
        """Some numbers as a row: of int8, or of int32 where they are indices."""
        signs = np.exp2(np.arange(bits, dtype=np.float32))
        signs[-1] *= -1 if signed else 1
        places = self._cast(pack_planes(flat, bits), TensorProto.UINT8, TensorProto.INT32)
        found = self.out.node("Gather", [self._bits_of_bytes(), places])
        rows = self.out.node("Reshape", [found, self.out.constant(np.array([0, -1]))])
        joined = self.out.node("MatMul", [self.out.constant(signs[None]), rows])
        return self.out.node("Cast", [joined], to=int(TensorProto.INT8 if signed else TensorProto.INT32))

    def _bits_of_bytes(self) -> str:
        """A table with the eight bits of each byte, as floats."""
        if not self._table:
            every = self.out.constant(np.arange(256, dtype=np.uint8)[:, None])
            masks = self.out.constant((1 << np.arange(8)).astype(np.uint8))
            found = self.out.node("Cast", [self.out.node("BitwiseAnd", [every, masks])], to=int(TensorProto.BOOL))
            self._table = self.out.node("Cast", [found], to=int(TensorProto.FLOAT))
        return self._table


def _saved_by_planes(storage: NumFormat, count: int, channels: int, least: int) -> float:
    """Bytes that planes save for a layer, against the best other container."""
    if not is_integer(storage) or storage.granularity == "block" or not best_in_planes(storage, least):
        return 0.0
    sizes = [packed_bytes(storage, np.array(count), np.array(channels), planes, least) for planes in (True, False)]
    return float(sizes[1] - sizes[0])
