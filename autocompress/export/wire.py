"""The outermost level of an ONNX file: its fields as they lie in it, so that one is replaced and the rest not touched.

A ``ModelProto`` on disk is a sequence of (key, value) pairs (https://protobuf.dev/programming-guides/encoding): the
weights are one of them, metadata are a few others.  Reading these few parses nothing of the rest.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from autocompress.errors import UsageError

GRAPH, METADATA = 7, 14
"""Field numbers of ``ModelProto.graph`` and ``ModelProto.metadata_props``."""

_INITIALIZER, _DATA_TYPE, _RAW_DATA, _EXTERNAL_DATA = 5, 2, 9, 13
"""Field numbers of ``GraphProto.initializer`` and of ``TensorProto``."""

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a file: its number, where it begins with its key, where its value begins, and where it ends."""

    number: int
    start: int
    value: int
    stop: int


class NotOnnxError(ValueError):
    """Bytes that are no ONNX model."""


@dataclass(frozen=True)
class WeightSpan:
    """Where the numbers of an initializer lie in a file, and their ``TensorProto.DataType``."""

    start: int
    stop: int
    data_type: int


def top_fields(data: bytes | mmap.mmap) -> list[Field]:
    """The fields of a serialized ``ModelProto``, in order.

    Raises:
        NotOnnxError: the bytes break the encoding, or hold no graph.
    """
    fields = list(_fields(data, 0, len(data)))
    if not any(field.number == GRAPH for field in fields):
        raise NotOnnxError("there is no graph in it")
    return fields


def weight_spans(data: bytes) -> list[WeightSpan]:
    """The raw numbers of all initializers, in the order they lie in.

    Raises:
        NotOnnxError: the bytes are no model, or weights lie in another file.
    """
    spans = []
    for graph in (field for field in top_fields(data) if field.number == GRAPH):
        for tensor in _fields(data, graph.value, graph.stop):
            if tensor.number != _INITIALIZER:
                continue
            kind, raw = 0, None
            for part in _fields(data, tensor.value, tensor.stop):
                if part.number == _DATA_TYPE:
                    kind = _varint(data, part.value)[0]
                elif part.number == _RAW_DATA:
                    raw = part
                elif part.number == _EXTERNAL_DATA:
                    raise NotOnnxError("its weights lie in another file")
            if raw is not None:
                spans.append(WeightSpan(raw.value, raw.stop, kind))
    return spans


def _fields(data: bytes | mmap.mmap, place: int, end: int) -> Iterator[Field]:
    """The fields of the message between two places."""
    while place < end:
        start = place
        key, place = _varint(data, place)
        kind = key & 7
        if kind == _LENGTH:
            length, place = _varint(data, place)
        elif kind == _VARINT:
            length = _varint(data, place)[1] - place
        elif kind in (_EIGHT, _FOUR):
            length = 8 if kind == _EIGHT else 4
        else:
            raise NotOnnxError(f"unknown wire type {kind} at byte {start}")
        if place + length > end:
            raise NotOnnxError(f"the field at byte {start} ends behind what holds it")
        yield Field(key >> 3, start, place, place + length)
        place += length


def metadata_of(data: bytes | mmap.mmap, fields: list[Field]) -> dict[str, str]:
    """The metadata among the fields; of two with one key the last counts."""
    found: dict[str, str] = {}
    for field in fields:
        if field.number != METADATA:
            continue
        try:
            entry = onnx.StringStringEntryProto.FromString(bytes(data[field.value : field.stop]))
            found[entry.key] = entry.value
        except Exception as error:  # protobuf's own error type differs between its implementations
            raise NotOnnxError(f"the metadata at byte {field.start} cannot be read") from error
    return found


@contextmanager
def opened(path: Path) -> Iterator[tuple[mmap.mmap, list[Field]]]:
    """A file's bytes, mapped rather than read, and its fields.

    Raises:
        UsageError: the file is missing or no ONNX model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data, top_fields(data)
    except NotOnnxError as error:
        raise UsageError(f"{path} is not an ONNX model: {error}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _varint(data: bytes | mmap.mmap, place: int) -> tuple[int, int]:
    """The number that begins at ``place``, and where it ends."""
    number = shift = 0
    while shift < 70:
        if place >= len(data):
            raise NotOnnxError("it ends within a number")
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
    raise NotOnnxError(f"a number of more than ten bytes before byte {place}")
